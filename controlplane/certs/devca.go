package certs

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
	"math/big"
	"os"
	"path/filepath"
	"time"
)

const (
	devCAKeyFile  = "dev-ca.pem" // certificate and key, 0600
	devCACertFile = "dev-ca.crt" // certificate alone, for clients

	devCALife   = 10 * 365 * 24 * time.Hour
	devLeafLife = 365 * 24 * time.Hour
	clockSlack  = time.Hour // clients' clocks may be behind
)

// DevCA is a certificate authority for development machines: clients trust one
// file (curl --cacert CertPath) and every base domain works.
type DevCA struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	now  func() time.Time
}

// LoadOrCreateDevCA opens the authority in dir, making both if need be. now may
// be nil.
func LoadOrCreateDevCA(dir string, now func() time.Time) (*DevCA, error) {
	if now == nil {
		now = time.Now
	}
	ca := &DevCA{dir: dir, now: now}
	path := filepath.Join(dir, devCAKeyFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		text, err = ca.create(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open development CA: %w", err)
	}
	if err := ca.parse(text); err != nil {
		return nil, fmt.Errorf("open development CA: %s: %w (delete it to have a new one made, clients must then trust %s anew)", path, err, ca.CertPath())
	}
	// Rewritten when lost: it is derived.
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
	if old, err := os.ReadFile(ca.CertPath()); err != nil || !bytes.Equal(old, public) {
		if err := writeAtomically(ca.CertPath(), public, 0o644); err != nil {
			return nil, fmt.Errorf("write the development CA's certificate: %w", err)
		}
	}
	return ca, nil
}

// CertPath is the file clients trust.
func (ca *DevCA) CertPath() string { return filepath.Join(ca.dir, devCACertFile) }

// Issue makes a key and a certificate for baseDomain and *.baseDomain, valid
// for a year, in the form Store.Pin takes.
func (ca *DevCA) Issue(baseDomain string) (Record, error) {
	domain := canonical(baseDomain)
	if domain == "" {
		return Record{}, errors.New("issue development certificate: the base domain is empty")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Record{}, fmt.Errorf("issue development certificate for %s: %w", domain, err)
	}
	now := ca.now()
	notAfter := now.Add(devLeafLife)
	if ca.cert.NotAfter.Before(notAfter) {
		notAfter = ca.cert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(),
		// The subject is for people; a longer one is not valid X.509.
		Subject:     pkix.Name{CommonName: truncate("*."+domain, 64)},
		DNSNames:    []string{"*." + domain, domain},
		NotBefore:   now.Add(-clockSlack),
		NotAfter:    notAfter,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return Record{}, fmt.Errorf("issue development certificate for %s: %w", domain, err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Record{}, fmt.Errorf("issue development certificate for %s: %w", domain, err)
	}
	var chain bytes.Buffer
	for _, b := range [][]byte{der, ca.cert.Raw} {
		if err := pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: b}); err != nil {
			return Record{}, err
		}
	}
	return Record{
		CertPEM:  chain.String(),
		KeyPEM:   string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})),
		NotAfter: uint64(notAfter.Unix()),
		IssuedAt: uint64(now.Unix()),
	}, nil
}

// create makes the authority and returns the text of its file. Of two processes
// that do so at once, both use the first one's.
func (ca *DevCA) create(path string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	n := serial()
	now := ca.now()
	tmpl := &x509.Certificate{
		SerialNumber:          n,
		Subject:               pkix.Name{CommonName: fmt.Sprintf("dstack-gw development CA %.8s", n.Text(16))},
		NotBefore:             now.Add(-clockSlack),
		NotAfter:              now.Add(devCALife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	if err := os.MkdirAll(ca.dir, 0o700); err != nil {
		return nil, err
	}
	// One file for both, linked into place when complete: there is no moment
	// with a key and the wrong certificate.
	tmp, err := writeTemp(path, text, 0o600)
	if err != nil {
		return nil, err
	}
	defer os.Remove(tmp)
	if err := os.Link(tmp, path); errors.Is(err, fs.ErrExist) {
		return os.ReadFile(path)
	} else if err != nil {
		return nil, err
	}
	return text, nil
}

func (ca *DevCA) parse(text []byte) error {
	pair, err := tls.X509KeyPair(text, text)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	switch {
	case !ok:
		return fmt.Errorf("the key is a %T, not ECDSA", pair.PrivateKey)
	case !cert.IsCA:
		return errors.New("the certificate is not one of an authority")
	case !ca.now().Before(cert.NotAfter):
		return fmt.Errorf("%w: since %s", ErrExpired, cert.NotAfter.UTC().Format(time.RFC3339))
	}
	ca.cert, ca.key = cert, key
	return nil
}

func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[0] &= 0x7f    // positive
	b[0] |= 0x40    // and of full length
	return new(big.Int).SetBytes(b[:])
}

func truncate(s string, n int) string { return s[:min(len(s), n)] }

// writeTemp writes data to a new file beside path and returns its name.
func writeTemp(path string, data []byte, mode fs.FileMode) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// writeAtomically replaces path: readers see the old or the new content.
func writeAtomically(path string, data []byte, mode fs.FileMode) error {
	tmp, err := writeTemp(path, data, mode)
	if err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return nil
}
