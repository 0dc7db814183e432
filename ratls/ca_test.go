package ratls

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func clock() time.Time { return time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC) }

func keyOf(t *testing.T, scalar string) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), unhex(t, scalar))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func oids(c *x509.Certificate) string {
	var all []string
	for _, e := range c.Extensions {
		s := e.Id.String()
		if e.Critical {
			s += "!"
		}
		all = append(all, s)
	}
	return strings.Join(all, " ")
}

// The keys of KMS spec B.1 give its serials and key ids.
func TestVectorsOfKeys(t *testing.T) {
	for _, tt := range []struct{ name, scalar, serial, ski string }{
		{"root", "f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1", "6078317e8a0f260d06534a3d2a4d0fa135a75721", "5df9d433e05d122dc5d6b8afa7d0ca8083182348"},
		{"App CA", "5b779e0a9fe80b2e5866d94958daa1a4e29a183228b3f37acd7eae153e18a75f", "41e6a6b89fdb9e8b1c16889f1d0a4c204e7ff10b", "8ab33b7638798003f33d29bc6b751da36d0e7a9f"},
	} {
		ca, err := newCA(keyOf(t, tt.scalar), clock)
		if err != nil {
			t.Fatal(err)
		}
		if got := ca.cert.SerialNumber.Text(16); got != tt.serial {
			t.Errorf("%s: serial %s", tt.name, got)
		}
		if got := hex.EncodeToString(ca.cert.SubjectKeyId); got != tt.ski {
			t.Errorf("%s: subject key id %s", tt.name, got)
		}
	}
}

// KMS spec B.2 and gateway spec B.6.
func TestReportData(t *testing.T) {
	spki := func(scalar string) []byte {
		der, err := x509.MarshalPKIXPublicKey(keyOf(t, scalar).Public())
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	for _, tt := range []struct {
		prefix  string
		content []byte
		want    string
	}{
		{"app-data", []byte("test content"), "7ea0b744ed5e9c0c83ff9f575668e1697652cd349f2027cdf26f918d4c53e8cd50b5ea9b449b4c3d50e20ae00ec29688d5a214e8daff8a10041f5d624dae8a01"},
		{ReportRATLS, spki("f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1"), "d224180bddf1a335755b07626fdc80ce18090be1ff37e7d6e1b53e780e27da0d8fafe99fc41e90333fcb51949ae5a1fc95b7820e142e611256ff4a8dc8997506"},
		{ReportRATLS, spki("5b779e0a9fe80b2e5866d94958daa1a4e29a183228b3f37acd7eae153e18a75f"), "f1db72d28c32437dfa545b7bd81337f4edef7e25515c2713f0a6cfcf3cd3ab54fc5cec1c1ede248cc38cf668c2ea666ad3e7d1591cc8735b39b9e1c7c4186f2a"},
		{ReportRATLS, []byte{0x30, 0x59}, "26433cf75a626210d62df098edba1c5ef11ad602de661020d7d19f0b221d44b198cfcf1b1edfc3a7a17b829406f8aeaa761245e7815918fe053c0ca6ee57d446"},
		{ReportZTCert, []byte{0x30, 0x59}, "ca59115a332c51afb205d1d4d954fd0316505a514559298b422253bc02b544514be244ddc291bb3767899875b529ad2240758b986331bb4dbaf1c51ecfec9366"},
		{ReportACMEAccount, []byte("https://acme-v02.api.letsencrypt.org/acme/acct/123456789"), "65e70f2eae219fedd0e5934d7a8283998c5322a309a183632806fc2d47d38851414b47f31fedb23bb4992a2f6b4638fcc5ebe487ab6bf3e23f75ba3dea1af210"},
	} {
		if got := ReportData(tt.prefix, tt.content); hex.EncodeToString(got[:]) != tt.want {
			t.Errorf("%s: got %x", tt.prefix, got)
		}
	}
}

func TestProfiles(t *testing.T) {
	ca, err := NewCA(clock)
	if err != nil {
		t.Fatal(err)
	}
	appID := bytes.Repeat([]byte{0x11}, 20)
	cred, err := ca.Issue(App{
		ID: appID, Info: sample(), Subject: "gateway", ServerAuth: true, ClientAuth: true,
		Names:       []string{"gateway.example.org", "10.0.0.1", "::1"},
		Attestation: []byte{0},
	})
	if err != nil {
		t.Fatal(err)
	}
	const arc = "1.3.6.1.4.1.62397.1."
	const name = "310f300d060355040a0c0644737461636b" // O=Dstack, UTF8String
	for i, want := range []struct {
		subject, issuer string
		extensions      string
		ku              string
		isCA            bool
		pathLen         int
	}{
		{
			"3012" + "3110300e06035504030c0767617465776179",
			"3029" + name + "311630140603550403" + "0c0d44737461636b20417070204341",
			"2.5.29.17 2.5.29.15! 2.5.29.37 " + arc + "3 " + arc + "9 " + arc + "4 " + arc + "8",
			"03020780", false, -1,
		},
		{
			"3029" + name + "311630140603550403" + "0c0d44737461636b20417070204341",
			"3029" + name + "311630140603550403" + "0c0d44737461636b204b4d53204341",
			"2.5.29.15! 2.5.29.14 2.5.29.19! " + arc + "3 " + arc + "4",
			"03020186", true, 0,
		},
		{
			"3029" + name + "311630140603550403" + "0c0d44737461636b204b4d53204341",
			"3029" + name + "311630140603550403" + "0c0d44737461636b204b4d53204341",
			"2.5.29.15! 2.5.29.14 2.5.29.19!",
			"03020186", true, 1,
		},
	} {
		c := cred.Chain[i]
		if got := hex.EncodeToString(c.RawSubject); got != want.subject {
			t.Errorf("%d: subject %s", i, got)
		}
		if got := hex.EncodeToString(c.RawIssuer); got != want.issuer {
			t.Errorf("%d: issuer %s", i, got)
		}
		if got := oids(c); got != want.extensions {
			t.Errorf("%d: extensions %s", i, got)
		}
		for _, e := range c.Extensions {
			if e.Id.String() == "2.5.29.15" && hex.EncodeToString(e.Value) != want.ku {
				t.Errorf("%d: key usage %x", i, e.Value)
			}
		}
		if c.Version != 3 || c.IsCA != want.isCA || want.isCA && c.MaxPathLen != want.pathLen {
			t.Errorf("%d: version %d, CA %t, path length %d", i, c.Version, c.IsCA, c.MaxPathLen)
		}
		if !c.NotBefore.Equal(time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC)) || !c.NotAfter.Equal(clock().Add(validity).Truncate(time.Second)) {
			t.Errorf("%d: from %v to %v", i, c.NotBefore, c.NotAfter)
		}
		if c.SignatureAlgorithm != x509.ECDSAWithSHA256 {
			t.Errorf("%d: %v", i, c.SignatureAlgorithm)
		}
	}
	leaf := cred.Chain[0]
	if !slices.Equal(leaf.DNSNames, []string{"gateway.example.org"}) || fmt.Sprint(leaf.IPAddresses) != "[10.0.0.1 ::1]" {
		t.Errorf("names %v %v", leaf.DNSNames, leaf.IPAddresses)
	}
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	if usage, err := SpecialUsage(leaf); err != nil || usage != UsageApp {
		t.Errorf("usage %q, %v", usage, err)
	}
	if usage, err := SpecialUsage(cred.Chain[1]); err != nil || usage != UsageAppCA {
		t.Errorf("usage %q, %v", usage, err)
	}
	if usage, err := SpecialUsage(cred.Chain[2]); err != nil || usage != "" {
		t.Errorf("usage %q, %v", usage, err)
	}
	if id, err := AppID(cred.Chain[1]); err != nil || !bytes.Equal(id, appID) {
		t.Errorf("app id %x, %v", id, err)
	}
	if id, err := AppID(cred.Chain[2]); err != nil || id != nil {
		t.Errorf("app id %x, %v", id, err)
	}

	// A leaf of which nothing is said has no extensions.
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	bare, err := (&layout{commonName: "x", notAfter: clock()}).sign(&key.PublicKey, issuer{rawName("", "x"), key})
	if err != nil || len(bare.Extensions) != 0 {
		t.Errorf("%v, %v", bare.Extensions, err)
	}
}

// Both ends of TLS accept what the CA issues.
func TestHandshake(t *testing.T) {
	ca, err := NewCA(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	issue := func(subject string, server bool) *Credential {
		app := App{ID: bytes.Repeat([]byte{0x11}, 20), Info: sample(), Subject: subject, ServerAuth: server, ClientAuth: !server}
		if server {
			app.Names = []string{"gateway.test", "127.0.0.1"}
		}
		c, err := ca.Issue(app)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Certificate())
	server := &tls.Config{Certificates: []tls.Certificate{issue("gateway", true).TLS()}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: roots}
	for _, name := range []string{"gateway.test", "127.0.0.1"} {
		client := &tls.Config{Certificates: []tls.Certificate{issue("dstack-guest-agent", false).TLS()}, RootCAs: roots, ServerName: name}
		a, b := net.Pipe()
		cl, sv := tls.Client(a, client), tls.Server(b, server)
		done := make(chan error, 1)
		go func() {
			_, err := cl.Write([]byte("x"))
			done <- err
		}()
		if _, err := io.ReadFull(sv, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		state := sv.ConnectionState()
		if len(state.VerifiedChains) != 1 {
			t.Fatalf("%s: %d verified chains", name, len(state.VerifiedChains))
		}
		id, err := Identify(t.Context(), state.PeerCertificates[0], nil)
		if err != nil || !bytes.Equal(id.AppID, sample().AppID) {
			t.Errorf("%s: %v, %v", name, id, err)
		}
		a.Close()
		b.Close()
	}
}

func TestIssueLimits(t *testing.T) {
	now := clock()
	ca, err := NewCA(func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	app := func(change func(*App)) App {
		a := App{ID: bytes.Repeat([]byte{0x11}, 20), Subject: "x"}
		change(&a)
		return a
	}
	tooMany := sample()
	tooMany.InitScriptHashes = make([][32]byte, 6)
	other := sample()
	other.AppID = make([]byte, 20)
	for _, tt := range []struct {
		name string
		app  App
		text string
	}{
		{"no app id", app(func(a *App) { a.ID = nil }), "app id has 0 bytes, want 20"},
		{"long app id", app(func(a *App) { a.ID = make([]byte, 32) }), "app id has 32 bytes"},
		{"info of another app", app(func(a *App) { a.Info = other }), "another app"},
		{"info that readers refuse", app(func(a *App) { a.Info = tooMany }), "at most 5"},
		{"name beyond ASCII", app(func(a *App) { a.Names = []string{"é.example"} }), "punycode"},
		{"empty name", app(func(a *App) { a.Names = []string{""} }), "empty name"},
		{"ends before it begins", app(func(a *App) { a.NotBefore, a.NotAfter = now, now.Add(-time.Hour) }), "before it begins"},
	} {
		if _, err := ca.Issue(tt.app); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want an error with %q", tt.name, err, tt.text)
		}
	}

	// Nothing outlives the root.
	now = now.Add(validity / 2)
	cred, err := ca.Issue(app(func(a *App) { a.NotBefore, a.NotAfter = now, now.Add(2*validity) }))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cred.Chain[:2] {
		if !c.NotAfter.Equal(ca.cert.NotAfter) {
			t.Errorf("%s ends %v, the root %v", c.Subject, c.NotAfter, ca.cert.NotAfter)
		}
	}
	if !cred.Chain[0].NotBefore.Equal(now.Truncate(time.Second)) {
		t.Errorf("begins %v", cred.Chain[0].NotBefore)
	}
	now = now.Add(validity)
	if _, err := ca.Issue(app(func(*App) {})); err == nil || !strings.Contains(err.Error(), "root CA ended") {
		t.Errorf("an ended root issued: %v", err)
	}
}

func TestOpenCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state", "ca")
	open := func() *CA {
		t.Helper()
		ca, err := OpenCA(dir, clock)
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	first := open()
	if second := open(); !bytes.Equal(first.cert.Raw, second.cert.Raw) || !first.key.Equal(second.key) {
		t.Error("opened again, it is another CA")
	}
	for _, name := range []string{rootCertFile, rootKeyFile} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, st.Mode(), err)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 {
		t.Errorf("%d files, %v", len(files), err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, rootKeyFile)); err != nil {
		t.Error(err)
	} else if block, _ := pem.Decode(data); block == nil || len(block.Bytes) != 138 {
		t.Error("the key is not PKCS#8 with its public key")
	}
	if data, err := os.ReadFile(filepath.Join(dir, rootCertFile)); err != nil || !bytes.Equal(data, first.CertificatePEM()) {
		t.Errorf("%s is not the root: %v", rootCertFile, err)
	}

	// A crash between the two files.
	if err := os.Remove(filepath.Join(dir, rootCertFile)); err != nil {
		t.Fatal(err)
	}
	if again := open(); !first.key.Equal(again.key) || again.cert.SerialNumber.Cmp(first.cert.SerialNumber) != 0 {
		t.Error("the key was not kept")
	}

	cert, err := os.ReadFile(filepath.Join(dir, rootCertFile))
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, rootKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := NewCA(clock)
	if err != nil {
		t.Fatal(err)
	}
	foreignKey, err := encodeKey(foreign.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := first.Issue(App{ID: make([]byte, 20)})
	if err != nil {
		t.Fatal(err)
	}
	leafKey, err := leaf.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name      string
		cert, key []byte // nil: no file
		text      string
	}{
		{"no key", cert, nil, "restore the key"},
		{"no PEM key", cert, []byte("x"), "root-ca.key: no PEM block"},
		{"broken key", cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("secret")}), "root-ca.key: not a PKCS#8 key"},
		{"broken key alone", nil, []byte("x"), "root-ca.key: no PEM block"},
		{"no PEM certificate", key, key, "root-ca.crt: no PEM certificate"},
		{"broken certificate", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), key, "root-ca.crt: "},
		{"foreign key", cert, foreignKey, "is not the key of"},
		{"not a CA", []byte(leaf.ChainPEM()[0]), leafKey, "not a CA certificate"},
	} {
		dir := t.TempDir()
		for name, data := range map[string][]byte{rootCertFile: tt.cert, rootKeyFile: tt.key} {
			if data != nil {
				if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		_, err := OpenCA(dir, clock)
		if err == nil || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: got %v, want an error with %q", tt.name, err, tt.text)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error shows the key", tt.name)
		}
	}
	if _, err := OpenCA(filepath.Join(dir, rootCertFile), clock); err == nil {
		t.Error("a file was taken for a directory")
	}
}

func TestWriteFiles(t *testing.T) {
	ca, err := NewCA(clock)
	if err != nil {
		t.Fatal(err)
	}
	cred, err := ca.Issue(App{ID: make([]byte, 20), Subject: "x"})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "x.crt"), filepath.Join(dir, "x.key")
	if err := os.WriteFile(cert, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := cred.WriteFiles(cert, key); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil || len(pair.Certificate) != 3 {
		t.Fatalf("%d certificates, %v", len(pair.Certificate), err)
	}
	for _, path := range []string{cert, key} {
		if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}

	missing := filepath.Join(dir, "no", "x")
	if err := WriteFile(missing, nil); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("got %v", err)
	}
	// A directory cannot be replaced by a file; nothing may be left behind.
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "d"), nil); err == nil {
		t.Error("a directory was replaced")
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 3 {
		t.Errorf("%v, %v", files, err)
	}
}
