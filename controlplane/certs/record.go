package certs

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"time"
)

// Record is a certificate as the store keeps it (gateway spec 8.3, CertData).
type Record struct {
	CertPEM  string // chain, leaf first
	KeyPEM   string // PKCS #8, PKCS #1 or SEC 1
	NotAfter uint64 // Unix seconds; decides about expiry, not the X.509 field
	IssuedBy uint32 // node id
	IssuedAt uint64 // Unix seconds
}

// maxPEM bounds one PEM text. A chain of a dozen RSA certificates has 25 KiB;
// records come from other nodes and are parsed on every change.
const maxPEM = 256 << 10

// ErrExpired is wrapped by the error for a record whose time is over.
var ErrExpired = errors.New("certificate is expired")

// Accept applies the rules of gateway spec 7.1: not expired by the record's own
// number, the chain parses, the key parses and belongs to the leaf. It also
// signs once, because a key may parse and still be refused at every handshake
// (RSA below 1024 bits). The result has Leaf set.
func (r Record) Accept(now time.Time) (*tls.Certificate, error) {
	if unix := now.Unix(); unix >= 0 && r.NotAfter <= uint64(unix) {
		return nil, fmt.Errorf("%w: since %s", ErrExpired, time.Unix(int64(r.NotAfter), 0).UTC().Format(time.RFC3339))
	}
	return parsePair([]byte(r.CertPEM), []byte(r.KeyPEM))
}

// expiry is when clients or the store stop accepting the certificate,
// whichever is first.
func (r Record) expiry(leaf *x509.Certificate) time.Time {
	if r.NotAfter > math.MaxInt64 {
		return leaf.NotAfter
	}
	if t := time.Unix(int64(r.NotAfter), 0); t.Before(leaf.NotAfter) {
		return t
	}
	return leaf.NotAfter
}

// sum identifies the record's content.
func (r Record) sum() [32]byte {
	h := sha256.New()
	var n [8]byte
	for _, s := range []string{r.CertPEM, r.KeyPEM} {
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	return [32]byte(h.Sum(nil))
}

// parsePair reads a chain and its key. Errors never show key material.
func parsePair(certPEM, keyPEM []byte) (*tls.Certificate, error) {
	if len(certPEM) > maxPEM || len(keyPEM) > maxPEM {
		return nil, fmt.Errorf("parse certificate: the PEM text has %d bytes, at most %d are read", max(len(certPEM), len(keyPEM)), maxPEM)
	}
	if _, err := parseChain(certPEM); err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("parse private key: %w", err)
	}
	if pair.Leaf == nil { // switched off by GODEBUG
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return nil, fmt.Errorf("parse certificate: %w", err)
		}
	}
	if err := probe(pair.PrivateKey); err != nil {
		return nil, fmt.Errorf("sign with the private key: %w", err)
	}
	return &pair, nil
}

// parseChain parses every certificate of a PEM text, of which there must be at
// least one.
func parseChain(text []byte) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d of the chain: %w", len(chain)+1, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, errors.New("parse certificate: the text has no PEM block CERTIFICATE")
	}
	return chain, nil
}

// probe makes one signature of the kind TLS asks for.
func probe(key crypto.PrivateKey) error {
	signer, ok := key.(crypto.Signer)
	if !ok {
		return fmt.Errorf("a key of type %T cannot sign", key)
	}
	digest := sha256.Sum256([]byte("probe"))
	var err error
	switch signer.Public().(type) {
	case *rsa.PublicKey:
		_, err = signer.Sign(rand.Reader, digest[:], &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256})
	case ed25519.PublicKey:
		_, err = signer.Sign(rand.Reader, digest[:], crypto.Hash(0))
	default:
		_, err = signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	}
	return err
}

// keyKind names a certificate's key for logs.
func keyKind(c *x509.Certificate) string {
	switch k := c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	}
	return c.PublicKeyAlgorithm.String()
}

func sameChain(a, b *tls.Certificate) bool {
	if len(a.Certificate) != len(b.Certificate) {
		return false
	}
	for i := range a.Certificate {
		if !bytes.Equal(a.Certificate[i], b.Certificate[i]) {
			return false
		}
	}
	return true
}
