package certs

import (
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// identityRig is the files of a gateway whose authority is ca.
func identityRig(t *testing.T, ca *opensslCA) IdentityOptions {
	t.Helper()
	cert, key := ca.issue("rpc", "ecdsa-pkcs8", "/CN=dstack-gateway", "DNS:gw.example", "serverAuth,clientAuth")
	dir := t.TempDir()
	opt := IdentityOptions{
		KeyPath: filepath.Join(dir, "rpc.key"), CertsPath: filepath.Join(dir, "rpc.cert"), CAPath: filepath.Join(dir, "ca.cert"),
		Logger: quiet(),
	}
	write(t, opt.KeyPath, readText(t, key))
	write(t, opt.CertsPath, readText(t, cert))
	write(t, opt.CAPath, readText(t, ca.cert))
	return opt
}

func loadIdentity(t *testing.T, opt IdentityOptions) *Identity {
	t.Helper()
	id, err := LoadIdentity(opt)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// clientWith is an RPC client that trusts ca and shows the pair, if any.
func clientWith(t *testing.T, ca *opensslCA, paths ...string) *tls.Config {
	t.Helper()
	c := &tls.Config{RootCAs: ca.pool(), ServerName: "gw.example"}
	if len(paths) == 2 {
		pair, err := tls.LoadX509KeyPair(paths[0], paths[1])
		if err != nil {
			t.Fatal(err)
		}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return c
}

func TestIdentityServer(t *testing.T) {
	ca, foreign := newOpensslCA(t, "kms CA"), newOpensslCA(t, "foreign CA")
	opt := identityRig(t, ca)
	guestCert, guestKey := ca.issue("guest", "ecdsa-pkcs8", "/CN=guest", "", "clientAuth")
	noSubjectCert, noSubjectKey := ca.issue("nosubject", "ecdsa-pkcs8", "/", "DNS:guest", "clientAuth")
	serverOnlyCert, serverOnlyKey := ca.issue("serveronly", "ecdsa-pkcs8", "/CN=guest", "", "serverAuth")
	foreignCert, foreignKey := foreign.issue("guest", "ecdsa-pkcs8", "/CN=guest", "", "clientAuth")
	clients := map[string]*tls.Config{
		"anonymous":       clientWith(t, ca),
		"guest":           clientWith(t, ca, guestCert, guestKey),
		"no subject":      clientWith(t, ca, noSubjectCert, noSubjectKey),
		"not for clients": clientWith(t, ca, serverOnlyCert, serverOnlyKey),
		"foreign":         clientWith(t, ca, foreignCert, foreignKey),
	}
	for _, mandatory := range []bool{false, true} {
		opt := opt
		opt.Mandatory = mandatory
		id := loadIdentity(t, opt)
		for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			for name, c := range clients {
				c := c.Clone()
				c.MinVersion, c.MaxVersion = v, v
				c.NextProtos = []string{"http/1.1", "h2"}
				want := name == "guest" || name == "anonymous" && !mandatory
				cs, ss, err := handshake(t, id.ServerConfig(), c)
				if (err == nil) != want {
					t.Errorf("mandatory %v, %s, %s: got %v, want success %v", mandatory, tls.VersionName(v), name, err, want)
					continue
				}
				if err != nil {
					continue
				}
				if cs.NegotiatedProtocol != "h2" {
					t.Errorf("ALPN %q, want h2", cs.NegotiatedProtocol)
				}
				if (name == "guest") != (len(ss.VerifiedChains) > 0) {
					t.Errorf("%s: %d verified chains", name, len(ss.VerifiedChains))
				}
			}
		}
	}
	old := clientWith(t, ca)
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if _, _, err := handshake(t, loadIdentity(t, opt).ServerConfig(), old); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
}

func TestLoadIdentityErrors(t *testing.T) {
	ca := newOpensslCA(t, "kms CA")
	good := identityRig(t, ca)
	other, _ := ca.issue("other", "ecdsa-pkcs8", "/CN=other", "DNS:gw.example", "serverAuth")
	empty := filepath.Join(t.TempDir(), "empty")
	write(t, empty, "")
	for _, tc := range []struct {
		name string
		edit func(*IdentityOptions)
		want string
	}{
		{"no key set", func(o *IdentityOptions) { o.KeyPath = "" }, "tls.key"},
		{"no chain set", func(o *IdentityOptions) { o.CertsPath = "" }, "tls.certs"},
		{"no authorities set", func(o *IdentityOptions) { o.CAPath = "" }, "tls.mutual.ca_certs"},
		{"key missing", func(o *IdentityOptions) { o.KeyPath += "x" }, "rpc.keyx"},
		{"chain empty", func(o *IdentityOptions) { o.CertsPath = empty }, "no PEM block"},
		{"authorities empty", func(o *IdentityOptions) { o.CAPath = empty }, "no PEM block"},
		{"key of another", func(o *IdentityOptions) { o.CertsPath = other }, "does not match"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := good
			tc.edit(&o)
			if _, err := LoadIdentity(o); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// Gateways talk to each other with this identity: the peer's name is verified
// against the first authority only, and the certificate is always shown.
func TestIdentityClient(t *testing.T) {
	ca, second := newOpensslCA(t, "kms CA"), newOpensslCA(t, "second CA")
	opt := identityRig(t, ca)
	write(t, opt.CAPath, readText(t, ca.cert)+readText(t, second.cert))
	id := loadIdentity(t, opt)
	if id.TrustAnchor().Subject.CommonName != "kms CA" {
		t.Errorf("trust anchor %v", id.TrustAnchor().Subject)
	}
	c := id.ClientConfig()
	c.ServerName = "gw.example"
	_, ss, err := handshake(t, id.ServerConfig(), c)
	if err != nil {
		t.Fatal(err)
	}
	if len(ss.PeerCertificates) == 0 || ss.PeerCertificates[0].Subject.CommonName != "dstack-gateway" {
		t.Errorf("the peer saw %v", ss.PeerCertificates)
	}
	// Clients of the second authority are served, servers of it are not trusted.
	guestCert, guestKey := second.issue("guest", "ecdsa-pkcs8", "/CN=guest", "", "clientAuth")
	if _, _, err := handshake(t, id.ServerConfig(), clientWith(t, ca, guestCert, guestKey)); err != nil {
		t.Errorf("a client of the second authority: %v", err)
	}
	fakeCert, fakeKey := second.issue("fake", "ecdsa-pkcs8", "/CN=dstack-gateway", "DNS:gw.example", "serverAuth")
	fake, err := tls.LoadX509KeyPair(fakeCert, fakeKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := handshake(t, &tls.Config{Certificates: []tls.Certificate{fake}}, c); err == nil {
		t.Error("a server of the second authority was trusted")
	}
}

// The files are replaced while clients connect; sessions of an authority that
// is gone do not live on in tickets.
func TestIdentityReload(t *testing.T) {
	ca, next := newOpensslCA(t, "kms CA"), newOpensslCA(t, "next CA")
	opt := identityRig(t, ca)
	id := loadIdentity(t, opt)
	server := id.ServerConfig()
	guestCert, guestKey := ca.issue("guest", "ecdsa-pkcs8", "/CN=guest", "", "clientAuth")
	guests := map[string]*tls.Config{}
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		c := clientWith(t, ca, guestCert, guestKey)
		c.RootCAs.AppendCertsFromPEM([]byte(readText(t, next.cert)))
		c.MinVersion, c.MaxVersion = v, v
		c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		guests[tls.VersionName(v)] = c
	}
	for name, c := range guests {
		if _, _, err := handshake(t, server, c); err != nil {
			t.Fatal(err)
		}
		if !resumes(t, server, c) {
			t.Errorf("%s: a session does not resume", name)
		}
	}

	// Broken files leave everything as it is.
	before := id.Certificate()
	write(t, opt.CertsPath, readText(t, opt.CertsPath)[:300])
	if err := id.Reload(); err == nil {
		t.Fatal("half a chain was loaded")
	}
	if id.Certificate() != before {
		t.Error("a failed reload changed the certificate")
	}

	// A new certificate of the same authority: sessions go on.
	cert, key := ca.issue("rpc2", "ecdsa-pkcs8", "/CN=dstack-gateway", "DNS:gw.example", "serverAuth,clientAuth")
	write(t, opt.CertsPath, readText(t, cert))
	write(t, opt.KeyPath, readText(t, key))
	if err := id.Reload(); err != nil {
		t.Fatal(err)
	}
	for name, c := range guests {
		if !resumes(t, server, c) {
			t.Errorf("%s: a new certificate ended the sessions", name)
		}
	}
	fresh := clientWith(t, ca)
	cs, _, err := handshake(t, server, fresh)
	if err != nil || !cs.PeerCertificates[0].Equal(id.Certificate().Leaf) {
		t.Errorf("a new client did not see the new certificate: %v", err)
	}

	// Another authority altogether, as after a move to another KMS.
	cert, key = next.issue("rpc3", "ecdsa-pkcs8", "/CN=dstack-gateway", "DNS:gw.example", "serverAuth,clientAuth")
	write(t, opt.CertsPath, readText(t, cert))
	write(t, opt.KeyPath, readText(t, key))
	write(t, opt.CAPath, readText(t, next.cert))
	if err := id.Reload(); err != nil {
		t.Fatal(err)
	}
	for name, c := range guests {
		if _, ss, err := handshake(t, server, c); err == nil {
			t.Errorf("%s: a client of the old authority was accepted (resumed: %v)", name, ss.DidResume)
		}
	}
	if id.TrustAnchor().Subject.CommonName != "next CA" {
		t.Errorf("trust anchor %v", id.TrustAnchor().Subject)
	}
}

func TestIdentityWatch(t *testing.T) {
	ca := newOpensslCA(t, "kms CA")
	opt := identityRig(t, ca)
	id := loadIdentity(t, opt)
	cert, key := ca.issue("rpc2", "rsa-pkcs8", "/CN=dstack-gateway", "DNS:gw.example", "serverAuth,clientAuth")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { id.Watch(ctx, 10*time.Millisecond) })
	defer wg.Wait()
	defer cancel()

	before := id.Certificate()
	stop := make(chan struct{})
	var clients sync.WaitGroup
	clients.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, _, err := handshake(t, id.ServerConfig(), clientWith(t, ca)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for src, dst := range map[string]string{cert: opt.CertsPath, key: opt.KeyPath} {
		if err := os.Rename(src, dst); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	deadline := time.Now().Add(5 * time.Second)
	for id.Certificate() == before && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond)
	}
	close(stop)
	clients.Wait()
	if id.Certificate() == before {
		t.Error("the change was not noticed")
	}
}
