package ratls

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Extension is the last number of an extension's OID (KMS spec 6.1).
type Extension int

// The extensions and what their payloads are.
const (
	ExtTDXQuote     Extension = 1 // a raw DCAP quote, of guests up to 0.5.8
	ExtEventLog     Extension = 2 // the JSON event log that goes with it
	ExtAppID        Extension = 3 // the app id, 20 bytes
	ExtSpecialUsage Extension = 4 // text: UsageKMS, UsageAppCA, UsageApp
	ExtAttestation  Extension = 8 // the versioned attestation
	ExtAppInfo      Extension = 9 // AppInfo in MessagePack
)

// Values of ExtSpecialUsage.
const (
	UsageKMS   = "kms:rpc"    // the KMS's server certificate
	UsageAppCA = "app:ca"     // the CA of one app
	UsageApp   = "app:custom" // a certificate of an app
)

// OID is the object identifier of the extension.
func (e Extension) OID() asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, int(e)}
}

func (e Extension) String() string {
	switch e {
	case ExtTDXQuote:
		return "TDX quote"
	case ExtEventLog:
		return "event log"
	case ExtAppID:
		return "app id"
	case ExtSpecialUsage:
		return "special usage"
	case ExtAttestation:
		return "attestation"
	case ExtAppInfo:
		return "app info"
	default:
		return e.OID().String()
	}
}

// Encode wraps a payload: the value of the extension is itself a DER OCTET
// STRING, so that a certificate holds two of them inside each other.
func (e Extension) Encode(payload []byte) pkix.Extension {
	var b cryptobyte.Builder
	b.AddASN1OctetString(payload)
	// Only a payload beyond 4 GiB cannot be wrapped.
	return pkix.Extension{Id: e.OID(), Value: b.BytesOrPanic()}
}

// errNoExtension is returned by payload for what a certificate does not have.
var errNoExtension = errors.New("no such extension")

// payload finds and unwraps an extension. An extension that is there twice is
// an error: two readers might each believe another one.
func payload(cert *x509.Certificate, e Extension) ([]byte, error) {
	oid := e.OID()
	found := -1
	for i, ext := range cert.Extensions {
		if !ext.Id.Equal(oid) {
			continue
		}
		if found >= 0 {
			return nil, fmt.Errorf("certificate has two %s extensions (%s)", e, oid)
		}
		found = i
	}
	if found < 0 {
		return nil, errNoExtension
	}
	p, err := unwrap(cert.Extensions[found].Value)
	if err != nil {
		return nil, fmt.Errorf("%s extension (%s): %w", e, oid, err)
	}
	return p, nil
}

func unwrap(value []byte) ([]byte, error) {
	s := cryptobyte.String(value)
	var p cryptobyte.String
	if !s.ReadASN1(&p, cbasn1.OCTET_STRING) || !s.Empty() {
		return nil, errors.New("value is not a single OCTET STRING")
	}
	return p, nil
}

// optional turns the absence of an extension into a nil payload; a present one
// is never nil.
func optional(cert *x509.Certificate, e Extension) ([]byte, error) {
	p, err := payload(cert, e)
	if errors.Is(err, errNoExtension) {
		return nil, nil
	}
	if err == nil && p == nil {
		p = []byte{}
	}
	return p, err
}

// SpecialUsage reads what a certificate is for, "" when it does not say.
func SpecialUsage(cert *x509.Certificate) (string, error) {
	p, err := optional(cert, ExtSpecialUsage)
	if err != nil {
		return "", err
	}
	if !utf8.Valid(p) {
		return "", fmt.Errorf("%s extension (%s): not UTF-8", ExtSpecialUsage, ExtSpecialUsage.OID())
	}
	return string(p), nil
}

// AppID reads the app id, nil when the certificate has none. It is not checked
// for its length.
func AppID(cert *x509.Certificate) ([]byte, error) { return optional(cert, ExtAppID) }
