package dev

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func verify(t *testing.T, ca *webCA, leaf *x509.Certificate, name string) error {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: ca.now()})
	return err
}

func TestWebCA(t *testing.T) {
	dir := t.TempDir()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	domains := []string{"apps.dstack.test", "www.shop.test"}
	caCert, caKey := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	open := func(domains []string) *webCA {
		ca, err := openWebCA(caCert, caKey, domains, clock)
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	ca := open(domains)
	for path, mode := range map[string]os.FileMode{caCert: 0o644, caKey: 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v (%v), want %v", path, info.Mode(), err, mode)
		}
	}
	cert, key := filepath.Join(dir, "site.crt"), filepath.Join(dir, "site.key")
	site := func(ca *webCA) *x509.Certificate {
		if err := ca.site(cert, key, []string{"*.apps.dstack.test"}); err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf
	}
	first := site(ca)
	if err := verify(t, ca, first, "abc-8080.apps.dstack.test"); err != nil {
		t.Error(err)
	}

	again := open(domains)
	if !again.cert.Equal(ca.cert) || !site(again).Equal(first) {
		t.Error("the second start makes new certificates")
	}
	now = now.Add(siteValidity - renewBefore + time.Hour)
	if renewed := site(again); renewed.Equal(first) {
		t.Error("a certificate that is about to end is kept")
	}
	other := open([]string{"apps.other.test", "www.shop.test"})
	if other.cert.Equal(ca.cert) {
		t.Error("a CA for other domains is kept")
	}
	if old := site(other); verify(t, other, old, "x.apps.dstack.test") == nil {
		t.Error("the CA is believed for a domain it is not for")
	}
}

// Whoever imports the CA into a browser trusts it for its domains only, also if
// its key gets into wrong hands.
func TestWebCAIsConfined(t *testing.T) {
	dir := t.TempDir()
	ca, err := openWebCA(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"), []string{"apps.dstack.test"}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(name string) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), DNSNames: []string{name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}, ca.cert, &key.PublicKey, ca.key)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return leaf
	}
	if err := verify(t, ca, sign("a.apps.dstack.test"), "a.apps.dstack.test"); err != nil {
		t.Error(err)
	}
	if verify(t, ca, sign("bank.example"), "bank.example") == nil {
		t.Error("the CA can pose as any site")
	}
}
