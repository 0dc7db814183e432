package ratls

import (
	"context"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// What report data is about; the first argument of ReportData.
const (
	ReportRATLS       = "ratls-cert"   // SubjectPublicKeyInfo of an RA-TLS certificate
	ReportZTCert      = "zt-cert"      // SubjectPublicKeyInfo of a domain's certificate
	ReportACMEAccount = "acme-account" // URL of an ACME account
)

// ReportData binds content to a quote: SHA-512(prefix ":" content). The content
// of a certificate is its DER SubjectPublicKeyInfo.
func ReportData(prefix string, content []byte) [64]byte {
	h := sha512.New()
	h.Write([]byte(prefix + ":"))
	h.Write(content)
	return [64]byte(h.Sum(nil))
}

// Evidence is what a certificate carries to prove that its key lives in a TEE.
// Either Attestation is set or TDXQuote and EventLog are.
type Evidence struct {
	Attestation []byte // the versioned container
	TDXQuote    []byte // a raw quote, from guests up to 0.5.8
	EventLog    []byte // its event log, JSON
}

// Verifier checks evidence.
type Verifier interface {
	// VerifyAttestation succeeds only if the evidence is genuine and was made for
	// reportData, and returns what it says about the app.
	VerifyAttestation(ctx context.Context, att Evidence, reportData [64]byte) (*AppInfo, error)
}

// Identity is who a peer is, as far as its certificate tells. The zero value is
// an anonymous peer.
type Identity struct {
	// Certificate is the peer's leaf, nil without one.
	Certificate *x509.Certificate
	// AppID is the app id extension, nil without one.
	AppID []byte
	// Info is the app info extension, nil without one. It is the word of the CA.
	Info *AppInfo
	// Attested is what verified evidence says, nil without evidence.
	Attested *AppInfo
}

// AppInfo is the best statement about the app: the certificate's app info, else
// what the evidence says. Without either the error is the one that guests of
// every release understand.
func (id *Identity) AppInfo() (*AppInfo, error) {
	switch {
	case id.Info != nil:
		return id.Info, nil
	case id.Attested != nil:
		return id.Attested, nil
	default:
		return nil, errors.New("neither app-info nor attestation provided")
	}
}

// Identify reads who the owner of a certificate is. TLS must have verified the
// certificate's chain and the possession of its key before; a nil certificate is
// an anonymous peer.
//
// App id and app info are read first, then evidence is looked for. Evidence is
// always verified, also when app info is there: a failure gives an error that
// begins with "invalid quote". A nil Verifier refuses all evidence.
func Identify(ctx context.Context, cert *x509.Certificate, v Verifier) (*Identity, error) {
	id := &Identity{Certificate: cert}
	if cert == nil {
		return id, nil
	}
	var err error
	if id.AppID, err = AppID(cert); err != nil {
		return nil, fmt.Errorf("failed to read client certificate: %w", err)
	}
	info, err := optional(cert, ExtAppInfo)
	if err != nil {
		return nil, fmt.Errorf("failed to read client certificate: %w", err)
	}
	if info != nil {
		if id.Info, err = DecodeAppInfo(info); err != nil {
			return nil, fmt.Errorf("failed to read client certificate: %w", err)
		}
	}
	evidence, found, err := readEvidence(cert)
	if err != nil {
		return nil, err
	}
	if !found {
		return id, nil
	}
	if v == nil {
		return nil, errors.New("invalid quote: this build cannot verify attestations yet; " +
			"present a certificate with app info (extension " + ExtAppInfo.OID().String() + ") and without attestation")
	}
	id.Attested, err = v.VerifyAttestation(ctx, evidence, ReportData(ReportRATLS, cert.RawSubjectPublicKeyInfo))
	if err != nil {
		return nil, &quoteError{err}
	}
	return id, nil
}

// readEvidence prefers the container over the older pair of quote and log.
func readEvidence(cert *x509.Certificate) (e Evidence, found bool, err error) {
	for _, part := range []struct {
		ext Extension
		to  *[]byte
	}{{ExtAttestation, &e.Attestation}, {ExtTDXQuote, &e.TDXQuote}, {ExtEventLog, &e.EventLog}} {
		if *part.to, err = optional(cert, part.ext); err != nil {
			return Evidence{}, false, fmt.Errorf("failed to read client certificate: %w", err)
		}
	}
	switch {
	case e.Attestation != nil:
		return Evidence{Attestation: e.Attestation}, true, nil
	case e.TDXQuote == nil:
		return Evidence{}, false, nil // an event log alone proves nothing
	case e.EventLog == nil:
		return Evidence{}, false, errors.New("TDX event log missing")
	default:
		return e, true, nil
	}
}

// quoteError is evidence that does not hold.
type quoteError struct{ err error }

// Guests take the words "no attestation provided" anywhere in an answer for a
// gateway older than 0.5.6 and register again in another way, so they must not
// come out of a cause by accident (gateway spec 3.2).
func (e *quoteError) Error() string {
	return "invalid quote: " + strings.ReplaceAll(e.err.Error(), "no attestation provided", "attestation is absent")
}

func (e *quoteError) Unwrap() error { return e.err }

type identityKey struct{}

// WithIdentity attaches an identity to a context.
func WithIdentity(ctx context.Context, id *Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// FromContext is the identity that WithIdentity attached, else the anonymous
// one; never nil.
func FromContext(ctx context.Context) *Identity {
	if id, ok := ctx.Value(identityKey{}).(*Identity); ok && id != nil {
		return id
	}
	return new(Identity)
}

// IdentifyRequest makes the Identify option of a prpc handler: it reads the TLS
// client certificate of a request and attaches the identity to its context.
//
// A certificate whose chain the server has not verified is refused: anybody can
// write anything into one.
func IdentifyRequest(v Verifier) func(*http.Request) (context.Context, error) {
	return func(r *http.Request) (context.Context, error) {
		var leaf *x509.Certificate
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			if len(r.TLS.VerifiedChains) == 0 {
				return nil, errors.New("client certificate was not verified: the server does not check client certificates against a CA")
			}
			leaf = r.TLS.PeerCertificates[0]
		}
		id, err := Identify(r.Context(), leaf, v)
		if err != nil {
			return nil, err
		}
		return WithIdentity(r.Context(), id), nil
	}
}
