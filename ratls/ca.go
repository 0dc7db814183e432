package ratls

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

const (
	organization = "Dstack"
	rootName     = "Dstack KMS CA"
	appCAName    = "Dstack App CA"

	// validity is what KMSs give when nobody asks for less.
	validity = 3650 * 24 * time.Hour

	appIDSize = 20

	// Names of a KMS's directory, so that either can be pointed at the other's.
	rootCertFile = "root-ca.crt"
	rootKeyFile  = "root-ca.key"
)

// CA is a development root with the names, profiles and files of a KMS's. It
// certifies any app that its owner names: whoever holds its key is every app.
// Safe for concurrent use.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	now  func() time.Time
}

// NewCA makes a root with a new key, in memory only. now is the clock.
func NewCA(now func() time.Time) (*CA, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	return newCA(key, now)
}

func newCA(key *ecdsa.PrivateKey, now func() time.Time) (*CA, error) {
	l := layout{
		organization: organization, commonName: rootName,
		ca: true, pathLen: 1, notAfter: now().Add(validity),
	}
	cert, err := l.sign(&key.PublicKey, issuer{rawName(organization, rootName), key})
	if err != nil {
		return nil, fmt.Errorf("create root CA: %w", err)
	}
	return &CA{cert: cert, key: key, now: now}, nil
}

// OpenCA loads the root from root-ca.crt and root-ca.key in dir, or makes it
// there, and dir too. Both files are written with mode 0600, the key first: a
// key without its certificate, left by a crash, gets a new certificate, while a
// certificate without its key is an error.
func OpenCA(dir string, now func() time.Time) (*CA, error) {
	ca, err := openCA(dir, now)
	if err != nil {
		return nil, fmt.Errorf("development CA in %s: %w", dir, err)
	}
	return ca, nil
}

func openCA(dir string, now func() time.Time) (*CA, error) {
	certPath, keyPath := filepath.Join(dir, rootCertFile), filepath.Join(dir, rootKeyFile)
	keyPEM, keyErr := os.ReadFile(keyPath)
	certPEM, certErr := os.ReadFile(certPath)
	for _, err := range []error{keyErr, certErr} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if keyErr != nil && certErr == nil {
		return nil, fmt.Errorf("%s is there but %s is not: restore the key, or remove the certificate to start a new CA (certificates of the old one become worthless)", rootCertFile, rootKeyFile)
	}
	if keyErr == nil && certErr == nil {
		return parseCA(certPEM, keyPEM, now)
	}

	var ca *CA
	var err error
	if keyErr == nil {
		key, perr := parseKey(keyPEM)
		if perr != nil {
			return nil, fmt.Errorf("%s: %w", rootKeyFile, perr)
		}
		ca, err = newCA(key, now)
	} else {
		ca, err = NewCA(now)
	}
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if keyErr != nil {
		if keyPEM, err = encodeKey(ca.key); err != nil {
			return nil, err
		}
		if err := WriteFile(keyPath, keyPEM); err != nil {
			return nil, err
		}
	}
	if err := WriteFile(certPath, encodeCert(ca.cert)); err != nil {
		return nil, err
	}
	return ca, nil
}

func parseCA(certPEM, keyPEM []byte, now func() time.Time) (*CA, error) {
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", rootKeyFile, err)
	}
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s: no PEM certificate", rootCertFile)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", rootCertFile, err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("%s is not the key of %s", rootKeyFile, rootCertFile)
	}
	if !cert.IsCA {
		return nil, fmt.Errorf("%s is not a CA certificate", rootCertFile)
	}
	return &CA{cert: cert, key: key, now: now}, nil
}

// Certificate is the root certificate.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// CertificatePEM is the root certificate as a file holds it.
func (ca *CA) CertificatePEM() []byte { return encodeCert(ca.cert) }

// App is what Issue puts into an app's certificate.
type App struct {
	ID         []byte   // 20 bytes
	Info       *AppInfo // left out when nil; of the same app
	Subject    string   // common name
	Names      []string // DNS names and IP addresses
	ServerAuth bool
	ClientAuth bool
	// NotBefore is 1975 and NotAfter is ten years from now when zero. NotAfter is
	// cut to the end of the CA.
	NotBefore, NotAfter time.Time
	// Attestation is the versioned container, left out when nil.
	Attestation []byte
}

// Credential is a key with its certificates.
type Credential struct {
	Key *ecdsa.PrivateKey
	// Chain is the leaf, the app's CA and the root.
	Chain []*x509.Certificate
}

// Issue makes a new key for an app and certifies it through a CA of the app, as
// a KMS does. The app's CA has a new key each time.
func (ca *CA) Issue(app App) (*Credential, error) {
	if len(app.ID) != appIDSize {
		return nil, fmt.Errorf("app id has %d bytes, want %d", len(app.ID), appIDSize)
	}
	var info []byte
	if app.Info != nil {
		if !bytes.Equal(app.Info.AppID, app.ID) {
			return nil, errors.New("app info is of another app than the app id")
		}
		info = app.Info.Encode()
		// Nothing leaves this CA that a reader refuses.
		if _, err := DecodeAppInfo(info); err != nil {
			return nil, err
		}
	}
	now := ca.now()
	notAfter := app.NotAfter
	if notAfter.IsZero() {
		notAfter = now.Add(validity)
	}
	caNotAfter := earlier(now.Add(validity), ca.cert.NotAfter)
	if !now.Before(caNotAfter) {
		return nil, fmt.Errorf("root CA ended at %s: remove its files to start a new one", ca.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	notAfter = earlier(notAfter, caNotAfter)
	if !app.NotBefore.Before(notAfter) {
		return nil, fmt.Errorf("certificate of %q would end (%s) before it begins (%s)", app.Subject,
			notAfter.UTC().Format(time.RFC3339), app.NotBefore.UTC().Format(time.RFC3339))
	}

	appCAKey, err := newKey()
	if err != nil {
		return nil, err
	}
	appCA, err := (&layout{
		organization: organization, commonName: appCAName,
		ca: true, pathLen: 0, notAfter: caNotAfter,
		appID: app.ID, usage: UsageAppCA,
	}).sign(&appCAKey.PublicKey, issuer{ca.cert.RawSubject, ca.key})
	if err != nil {
		return nil, err
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	leaf, err := (&layout{
		commonName: app.Subject, names: app.Names,
		serverAuth: app.ServerAuth, clientAuth: app.ClientAuth,
		notBefore: app.NotBefore, notAfter: notAfter,
		appID: app.ID, appInfo: info, usage: UsageApp, attestation: app.Attestation,
	}).sign(&key.PublicKey, issuer{appCA.RawSubject, appCAKey})
	if err != nil {
		return nil, err
	}
	return &Credential{Key: key, Chain: []*x509.Certificate{leaf, appCA, ca.cert}}, nil
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// TLS is the credential for a tls.Config.
func (c *Credential) TLS() tls.Certificate {
	t := tls.Certificate{PrivateKey: c.Key, Leaf: c.Chain[0]}
	for _, cert := range c.Chain {
		t.Certificate = append(t.Certificate, cert.Raw)
	}
	return t
}

// KeyPEM is the key in PKCS#8.
func (c *Credential) KeyPEM() ([]byte, error) { return encodeKey(c.Key) }

// ChainPEM has one certificate an item, leaf first.
func (c *Credential) ChainPEM() []string {
	all := make([]string, 0, len(c.Chain))
	for _, cert := range c.Chain {
		all = append(all, string(encodeCert(cert)))
	}
	return all
}

// WriteFiles writes the whole chain and the key, with mode 0600, each by
// renaming a complete file into place.
func (c *Credential) WriteFiles(certPath, keyPath string) error {
	keyPEM, err := c.KeyPEM()
	if err != nil {
		return err
	}
	var chain []byte
	for _, cert := range c.Chain {
		chain = append(chain, encodeCert(cert)...)
	}
	if err := WriteFile(certPath, chain); err != nil {
		return err
	}
	return WriteFile(keyPath, keyPEM)
}

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate P-256 key: %w", err)
	}
	return key, nil
}

func encodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

// encodeKey writes PKCS#8 with the public key inside, which upstream's parser
// insists on.
func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// parseKey reads a P-256 key. Its errors never show the input.
func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("no PEM block PRIVATE KEY (PKCS#8)")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("not a PKCS#8 key")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("not a P-256 key")
	}
	return key, nil
}
