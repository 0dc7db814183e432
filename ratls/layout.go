package ratls

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// layout is a certificate in terms of KMS spec 6.2. Peers compare names byte by
// byte and existing tools know the order of the extensions, so everything is
// encoded here rather than left to crypto/x509.
type layout struct {
	organization string // left out when empty
	commonName   string
	names        []string // DNS names and IP addresses
	ca           bool
	pathLen      int // of a CA
	serverAuth   bool
	clientAuth   bool
	notBefore    time.Time // 1975 when zero, as KMSs write it
	notAfter     time.Time
	appID        []byte
	appInfo      []byte
	usage        string
	attestation  []byte
}

// issuer is who signs: its raw subject and its key.
type issuer struct {
	subject []byte
	key     *ecdsa.PrivateKey
}

// sign makes the certificate of a P-256 key.
func (l *layout) sign(pub *ecdsa.PublicKey, by issuer) (*x509.Certificate, error) {
	point, err := pub.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	extensions, err := l.extensions(pub)
	if err != nil {
		return nil, err
	}
	notBefore := l.notBefore
	if notBefore.IsZero() {
		notBefore = time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	template := &x509.Certificate{
		SerialNumber:       serial(point),
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		RawSubject:         rawName(l.organization, l.commonName),
		NotBefore:          notBefore,
		NotAfter:           l.notAfter,
		ExtraExtensions:    extensions,
	}
	// A parent without key id leaves the authority key id out, as KMSs do.
	parent := &x509.Certificate{RawSubject: by.subject}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, by.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %q: %w", l.commonName, err)
	}
	return x509.ParseCertificate(der)
}

// serial depends on the key alone: a key that is certified again keeps it.
func serial(point []byte) *big.Int {
	sum := sha256.Sum256(point)
	sum[0] &= 0x7f
	return new(big.Int).SetBytes(sum[:20])
}

// rawName is a distinguished name of UTF8Strings; pkix.Name would choose
// PrintableString.
func rawName(organization, commonName string) []byte {
	var b cryptobyte.Builder
	attribute := func(b *cryptobyte.Builder, last int, value string) {
		b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{2, 5, 4, last})
				b.AddASN1(cbasn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(value)) })
			})
		})
	}
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		if organization != "" {
			attribute(b, 10, organization)
		}
		attribute(b, 3, commonName)
	})
	return b.BytesOrPanic() // only lengths beyond 4 GiB fail
}

// extensions are all there are, in order. There are none at all when nothing
// but the key usage would be said.
func (l *layout) extensions(pub *ecdsa.PublicKey) ([]pkix.Extension, error) {
	var all []pkix.Extension
	add := func(last int, critical bool, f func(*cryptobyte.Builder)) error {
		var b cryptobyte.Builder
		f(&b)
		value, err := b.Bytes()
		if err != nil {
			return err
		}
		all = append(all, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, last}, Critical: critical, Value: value})
		return nil
	}
	if len(l.names) > 0 {
		if err := add(17, false, l.subjectAltNames); err != nil {
			return nil, fmt.Errorf("subject alternative names: %w", err)
		}
	}
	usage := []byte{0x80} // digitalSignature
	if l.ca {
		usage[0] |= 0x06 // keyCertSign, cRLSign
	}
	if err := add(15, true, func(b *cryptobyte.Builder) { addBits(b, usage[0]) }); err != nil {
		return nil, err
	}
	if l.serverAuth || l.clientAuth {
		if err := add(37, false, l.extKeyUsage); err != nil {
			return nil, err
		}
	}
	if l.ca {
		spki, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil {
			return nil, fmt.Errorf("encode public key: %w", err)
		}
		id := sha256.Sum256(spki)
		if err := add(14, false, func(b *cryptobyte.Builder) { b.AddASN1OctetString(id[:20]) }); err != nil {
			return nil, err
		}
		if err := add(19, true, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1Boolean(true)
				b.AddASN1Int64(int64(l.pathLen))
			})
		}); err != nil {
			return nil, err
		}
	}
	if l.appID != nil {
		all = append(all, ExtAppID.Encode(l.appID))
	}
	if l.appInfo != nil {
		all = append(all, ExtAppInfo.Encode(l.appInfo))
	}
	if l.usage != "" {
		all = append(all, ExtSpecialUsage.Encode([]byte(l.usage)))
	}
	if l.attestation != nil {
		all = append(all, ExtAttestation.Encode(l.attestation))
	}
	if len(all) == 1 {
		return nil, nil
	}
	return all, nil
}

func (l *layout) subjectAltNames(b *cryptobyte.Builder) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, name := range l.names {
			tag, value := cbasn1.Tag(2).ContextSpecific(), []byte(name) // dNSName
			if ip, err := netip.ParseAddr(name); err == nil && ip.Zone() == "" {
				tag, value = cbasn1.Tag(7).ContextSpecific(), ip.AsSlice() // iPAddress
			}
			for _, c := range value {
				if tag == cbasn1.Tag(2).ContextSpecific() && c > 0x7f {
					b.SetError(fmt.Errorf("%q is not ASCII; use its punycode form", name))
				}
			}
			if len(value) == 0 {
				b.SetError(errors.New("empty name"))
			}
			b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes(value) })
		}
	})
}

func (l *layout) extKeyUsage(b *cryptobyte.Builder) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		if l.serverAuth {
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1})
		}
		if l.clientAuth {
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2})
		}
	})
}

// addBits writes a named bit list of at most eight bits, without the unused
// ones at its end (X.690, 11.2.2).
func addBits(b *cryptobyte.Builder, bits byte) {
	unused := byte(0)
	for rest := bits; unused < 7 && rest&1 == 0; rest >>= 1 {
		unused++
	}
	b.AddASN1(cbasn1.BIT_STRING, func(b *cryptobyte.Builder) { b.AddBytes([]byte{unused, bits}) })
}
