package certs

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// opensslCA is an authority whose files another implementation made.
type opensslCA struct {
	t    testing.TB
	dir  string
	cert string // path
	key  string
}

func openssl(t testing.TB, args ...string) {
	t.Helper()
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func newOpensslCA(t testing.TB, name string) *opensslCA {
	t.Helper()
	dir := t.TempDir()
	ca := &opensslCA{t: t, dir: dir, cert: filepath.Join(dir, "ca.crt"), key: filepath.Join(dir, "ca.key")}
	openssl(t, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
		"-keyout", ca.key, "-out", ca.cert, "-days", "30", "-subj", "/CN="+name,
		"-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
	return ca
}

// keys are the commands that make a private key of each kind and encoding.
var keys = map[string][]string{
	"ecdsa-pkcs8": {"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"},
	"ecdsa-sec1":  {"ecparam", "-genkey", "-noout", "-name", "prime256v1"},
	"ecdsa-p384":  {"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"},
	"rsa-pkcs8":   {"genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"},
	"rsa-pkcs1":   {"genrsa", "-traditional", "2048"},
	"ed25519":     {"genpkey", "-algorithm", "ED25519"},
}

// issue makes a leaf for names (openssl's subjectAltName) and returns the paths
// of chain and key. usage is an extended key usage.
func (ca *opensslCA) issue(base, kind, subject, names, usage string) (cert, key string) {
	ca.t.Helper()
	key = filepath.Join(ca.dir, base+".key")
	csr := filepath.Join(ca.dir, base+".csr")
	cert = filepath.Join(ca.dir, base+".crt")
	ext := filepath.Join(ca.dir, base+".ext")
	args := keys[kind]
	if kind == "rsa-pkcs1" { // the size comes last
		args = []string{"genrsa", "-traditional", "-out", key, "2048"}
	} else {
		args = append(append([]string{}, args...), "-out", key)
	}
	openssl(ca.t, args...)
	openssl(ca.t, "req", "-new", "-key", key, "-out", csr, "-subj", subject)
	text := "basicConstraints=CA:FALSE\nextendedKeyUsage=" + usage + "\n"
	if names != "" {
		text += "subjectAltName=" + names + "\n"
	}
	if err := os.WriteFile(ext, []byte(text), 0o600); err != nil {
		ca.t.Fatal(err)
	}
	openssl(ca.t, "x509", "-req", "-in", csr, "-CA", ca.cert, "-CAkey", ca.key, "-CAcreateserial",
		"-days", "20", "-extfile", ext, "-out", cert)
	// The chain has the authority too, as ACME chains do.
	leaf, root := readText(ca.t, cert), readText(ca.t, ca.cert)
	if err := os.WriteFile(cert, []byte(leaf+root), 0o600); err != nil {
		ca.t.Fatal(err)
	}
	return cert, key
}

// record issues a wildcard for domain as a store record.
func (ca *opensslCA) record(base, kind, domain string) Record {
	ca.t.Helper()
	cert, key := ca.issue(base, kind, "/CN=*."+domain, "DNS:*."+domain, "serverAuth")
	return Record{
		CertPEM: readText(ca.t, cert), KeyPEM: readText(ca.t, key),
		NotAfter: uint64(time.Now().Add(20 * 24 * time.Hour).Unix()), IssuedBy: 1, IssuedAt: uint64(time.Now().Unix()),
	}
}

func (ca *opensslCA) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AppendCertsFromPEM([]byte(readText(ca.t, ca.cert)))
	return p
}

func readText(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func newStore(t testing.TB, opt Options) *Store {
	t.Helper()
	if opt.Logger == nil {
		opt.Logger = quiet()
	}
	s, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// handshake runs client against server over a real socket pair and exchanges a
// byte each way, so that session tickets arrive.
func handshake(t testing.TB, server, client *tls.Config) (cs, ss tls.ConnectionState, err error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		tc := tls.Server(c, server)
		defer tc.Close()
		tc.SetDeadline(time.Now().Add(10 * time.Second))
		if err := tc.Handshake(); err != nil {
			done <- err
			return
		}
		ss = tc.ConnectionState()
		_, err = tc.Write([]byte{1})
		if err == nil {
			_, err = tc.Read(make([]byte, 1))
		}
		done <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	tc := tls.Client(c, client)
	tc.SetDeadline(time.Now().Add(10 * time.Second))
	err = tc.Handshake()
	if err == nil {
		cs = tc.ConnectionState()
		if _, err = tc.Read(make([]byte, 1)); err == nil {
			_, err = tc.Write([]byte{1})
		}
	}
	if err != nil {
		tc.Close()
		<-done
		return cs, ss, err
	}
	err = <-done
	tc.Close()
	return cs, ss, err
}

// edit changes one byte of the DER in the nth PEM block.
func editPEM(t testing.TB, text string, n int, edit func([]byte) []byte) string {
	t.Helper()
	var out []byte
	rest := []byte(text)
	for i := 0; ; i++ {
		var b *pem.Block
		b, rest = pem.Decode(rest)
		if b == nil {
			break
		}
		if i == n {
			b.Bytes = edit(b.Bytes)
		}
		out = append(out, pem.EncodeToMemory(b)...)
	}
	return string(out)
}
