package dev

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/dstack-gw/dstack-gw/ratls"
)

const (
	webCAValidity = 3650 * 24 * time.Hour
	siteValidity  = 397 * 24 * time.Hour // browsers refuse more
	renewBefore   = 30 * 24 * time.Hour
)

// webCA signs the certificates that browsers and curl see, in the place of a
// public CA. It is confined by name constraints: whoever trusts it trusts it for
// the development domains and nothing else.
type webCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	now  func() time.Time
}

// openWebCA loads the CA for the domains, or makes a new one when there is none,
// it covers other domains, or it is about to end.
func openWebCA(certPath, keyPath string, domains []string, now func() time.Time) (*webCA, error) {
	pair, err := tls.LoadX509KeyPair(certPath, keyPath)
	if err == nil {
		cert, key := pair.Leaf, pair.PrivateKey
		k, ok := key.(*ecdsa.PrivateKey)
		if ok && slices.Equal(cert.PermittedDNSDomains, domains) && cert.NotAfter.Sub(now()) > siteValidity {
			return &webCA{cert, k, now}, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load the web CA: %w (remove %s to get a new one)", err, certPath)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key for the web CA: %w", err)
	}
	template := &x509.Certificate{
		Subject:                     pkix.Name{Organization: []string{"dstack dev"}, CommonName: "dstack dev web CA"},
		NotBefore:                   now().Add(-time.Hour),
		NotAfter:                    now().Add(webCAValidity),
		IsCA:                        true,
		BasicConstraintsValid:       true,
		MaxPathLenZero:              true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         domains,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make the web CA: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make the web CA: %w", err)
	}
	if err := writeKey(keyPath, key); err != nil {
		return nil, err
	}
	// Everybody may read the certificate: it is what curl --cacert takes.
	if err := writePublic(certPath, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		return nil, err
	}
	return &webCA{cert, key, now}, nil
}

// site makes sure that there is a certificate for the names, signed by this CA
// and good for a while.
func (ca *webCA) site(certPath, keyPath string, names []string) error {
	if pair, err := tls.LoadX509KeyPair(certPath, keyPath); err == nil {
		leaf := pair.Leaf
		if slices.Equal(leaf.DNSNames, names) && leaf.CheckSignatureFrom(ca.cert) == nil && leaf.NotAfter.Sub(ca.now()) > renewBefore {
			return nil
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key for %s: %w", names[0], err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		Subject:     pkix.Name{CommonName: "dstack dev site"},
		DNSNames:    names,
		NotBefore:   ca.now().Add(-time.Hour),
		NotAfter:    ca.now().Add(siteValidity),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return fmt.Errorf("make a certificate for %s: %w", names[0], err)
	}
	if err := writeKey(keyPath, key); err != nil {
		return err
	}
	var chain bytes.Buffer
	for _, c := range [][]byte{der, ca.cert.Raw} {
		if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c}); err != nil {
			return err
		}
	}
	return ratls.WriteFile(certPath, chain.Bytes())
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode a key: %w", err)
	}
	return ratls.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// writePublic is ratls.WriteFile for what everybody may read.
func writePublic(path string, data []byte) error {
	if err := ratls.WriteFile(path, data); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}
