package ratls

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// KMS spec B.3 and gateway spec B.6.
func TestExtensionVectors(t *testing.T) {
	for _, tt := range []struct {
		ext     Extension
		payload []byte
		want    string
	}{
		{ExtAppID, bytes.Repeat([]byte{0x11}, 20), ""},
		{ExtAppID, bytes.Repeat([]byte{0x41}, 20), "3024060a2b0601040183e73d0103041604144141414141414141414141414141414141414141"},
		{ExtSpecialUsage, []byte(UsageAppCA), "3016060a2b0601040183e73d0104040804066170703a6361"},
		{ExtSpecialUsage, []byte(UsageApp), "301a060a2b0601040183e73d0104040c040a6170703a637573746f6d"},
		{ExtSpecialUsage, []byte(UsageKMS), "3017060a2b0601040183e73d0104040904076b6d733a727063"},
	} {
		got, err := asn1.Marshal(tt.ext.Encode(tt.payload))
		if err != nil {
			t.Fatal(err)
		}
		if tt.want != "" && hex.EncodeToString(got) != tt.want {
			t.Errorf("%s: got %x", tt.ext, got)
		}
		p, err := unwrap(tt.ext.Encode(tt.payload).Value)
		if err != nil || !bytes.Equal(p, tt.payload) {
			t.Errorf("%s: unwrapped %x, %v", tt.ext, p, err)
		}
	}
	id := unhex(t, "8f2a7c1d3e4b5a69788796a5b4c3d2e1f0011223")
	if got := hex.EncodeToString(ExtAppID.Encode(id).Value); got != "04148f2a7c1d3e4b5a69788796a5b4c3d2e1f0011223" {
		t.Errorf("got %s", got)
	}
}

// verifier records what it was asked.
type verifier struct {
	info     *AppInfo
	err      error
	evidence Evidence
	report   [64]byte
	calls    int
}

func (v *verifier) VerifyAttestation(_ context.Context, e Evidence, report [64]byte) (*AppInfo, error) {
	v.calls++
	v.evidence, v.report = e, report
	return v.info, v.err
}

func raw(e Extension, value string) pkix.Extension {
	b, err := hex.DecodeString(value)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: e.OID(), Value: b}
}

func TestIdentify(t *testing.T) {
	appID := ExtAppID.Encode(sample().AppID)
	info := ExtAppInfo.Encode(sample().Encode())
	attestation := ExtAttestation.Encode([]byte{0, 1})
	quote, log := ExtTDXQuote.Encode([]byte("quote")), ExtEventLog.Encode([]byte("[]"))
	attested := &AppInfo{AppID: []byte("attested")}
	boom := errors.New("report data mismatch")

	for _, tt := range []struct {
		name     string
		ext      []pkix.Extension
		v        *verifier // nil: no Verifier
		err      string    // prefix
		appID    bool
		appInfo  string // AppID of Identity.AppInfo, or its error
		evidence Evidence
	}{
		{name: "nothing", appInfo: "neither app-info nor attestation provided"},
		{name: "other extensions", ext: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}}}, appInfo: "neither app-info nor attestation provided"},
		{name: "app id alone", ext: []pkix.Extension{appID}, appID: true, appInfo: "neither app-info nor attestation provided"},
		{name: "app info", ext: []pkix.Extension{appID, info}, appID: true, appInfo: string(sample().AppID)},
		{name: "app info without app id", ext: []pkix.Extension{info}, appInfo: string(sample().AppID)},
		{name: "event log alone is no evidence", ext: []pkix.Extension{info, log}, appInfo: string(sample().AppID)},
		{name: "attestation", ext: []pkix.Extension{appID, attestation}, v: &verifier{info: attested}, appID: true, appInfo: "attested", evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "quote and log", ext: []pkix.Extension{quote, log}, v: &verifier{info: attested}, appInfo: "attested", evidence: Evidence{TDXQuote: []byte("quote"), EventLog: []byte("[]")}},
		{name: "attestation before quote", ext: []pkix.Extension{quote, log, attestation}, v: &verifier{info: attested}, appInfo: "attested", evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "attestation before quote without log", ext: []pkix.Extension{quote, attestation}, v: &verifier{info: attested}, appInfo: "attested", evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "verified although app info is there", ext: []pkix.Extension{info, attestation}, v: &verifier{info: attested}, appInfo: string(sample().AppID), evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "empty attestation is evidence", ext: []pkix.Extension{raw(ExtAttestation, "0400")}, v: &verifier{err: errors.New("Empty attestation bytes")}, err: "invalid quote: Empty attestation bytes", evidence: Evidence{Attestation: []byte{}}},
		{name: "refused", ext: []pkix.Extension{attestation}, v: &verifier{err: boom}, err: "invalid quote: report data mismatch", evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "refused although app info is there", ext: []pkix.Extension{appID, info, attestation}, v: &verifier{err: boom}, err: "invalid quote: report data mismatch", evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "words that guests misunderstand", ext: []pkix.Extension{attestation}, v: &verifier{err: errors.New("x: no attestation provided")}, err: "invalid quote: x: attestation is absent", evidence: Evidence{Attestation: []byte{0, 1}}},
		{name: "no verifier", ext: []pkix.Extension{info, attestation}, err: "invalid quote: this build cannot verify attestations yet; present a certificate with app info"},
		{name: "no verifier for a quote", ext: []pkix.Extension{quote, log}, err: "invalid quote: this build cannot verify attestations yet"},
		{name: "quote without log", ext: []pkix.Extension{info, quote}, v: &verifier{}, err: "TDX event log missing"},
		{name: "malformed app id", ext: []pkix.Extension{raw(ExtAppID, "0c0141"), attestation}, v: &verifier{}, err: "failed to read client certificate: app id extension (1.3.6.1.4.1.62397.1.3): value is not a single OCTET STRING"},
		{name: "app id unwrapped", ext: []pkix.Extension{raw(ExtAppID, "4141")}, err: "failed to read client certificate: app id"},
		{name: "app id with a tail", ext: []pkix.Extension{raw(ExtAppID, "04014100")}, err: "failed to read client certificate: app id"},
		{name: "app id too short for its length", ext: []pkix.Extension{raw(ExtAppID, "040541")}, err: "failed to read client certificate: app id"},
		{name: "length not minimal", ext: []pkix.Extension{raw(ExtAppID, "04810141")}, err: "failed to read client certificate: app id"},
		{name: "empty value", ext: []pkix.Extension{raw(ExtAppID, "")}, err: "failed to read client certificate: app id"},
		{name: "malformed app info wrapping", ext: []pkix.Extension{raw(ExtAppInfo, "98")}, err: "failed to read client certificate: app info"},
		{name: "malformed app info", ext: []pkix.Extension{ExtAppInfo.Encode([]byte{0x97}), attestation}, v: &verifier{}, err: "failed to read client certificate: malformed app info"},
		{name: "malformed attestation", ext: []pkix.Extension{raw(ExtAttestation, "00")}, v: &verifier{}, err: "failed to read client certificate: attestation"},
		{name: "malformed log", ext: []pkix.Extension{quote, raw(ExtEventLog, "00")}, v: &verifier{}, err: "failed to read client certificate: event log"},
		{name: "two app ids", ext: []pkix.Extension{appID, appID}, err: "failed to read client certificate: certificate has two app id extensions"},
		{name: "two app infos", ext: []pkix.Extension{info, info}, err: "failed to read client certificate: certificate has two app info"},
		{name: "two attestations", ext: []pkix.Extension{attestation, attestation}, v: &verifier{}, err: "failed to read client certificate: certificate has two attestation"},
		{name: "two quotes", ext: []pkix.Extension{quote, log, quote}, v: &verifier{}, err: "failed to read client certificate: certificate has two TDX quote"},
		// The gateway has no use for it, and upstream does not look.
		{name: "malformed special usage", ext: []pkix.Extension{info, raw(ExtSpecialUsage, "00")}, appInfo: string(sample().AppID)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cert := &x509.Certificate{Extensions: tt.ext, RawSubjectPublicKeyInfo: []byte{0x30, 0x59}}
			var v Verifier
			if tt.v != nil {
				v = tt.v
			}
			id, err := Identify(t.Context(), cert, v)
			if tt.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tt.err) {
					t.Fatalf("got %v, want %q", err, tt.err)
				}
				if tt.v != nil && tt.v.err != nil && !errors.Is(err, tt.v.err) {
					t.Error("the cause is lost")
				}
			} else {
				if err != nil {
					t.Fatal(err)
				}
				if (id.AppID != nil) != tt.appID {
					t.Errorf("app id %x", id.AppID)
				}
				got, err := id.AppInfo()
				if err != nil && err.Error() != tt.appInfo || err == nil && string(got.AppID) != tt.appInfo {
					t.Errorf("app info %+v, %v", got, err)
				}
			}
			if err != nil && strings.Contains(err.Error(), "no attestation provided") {
				t.Errorf("guests would misunderstand %q", err)
			}
			if tt.v == nil {
				return
			}
			want := 0
			if tt.evidence.Attestation != nil || tt.evidence.TDXQuote != nil {
				want = 1
				if tt.v.report != ReportData(ReportRATLS, []byte{0x30, 0x59}) {
					t.Error("verified for another key")
				}
			}
			if tt.v.calls != want || !bytes.Equal(tt.v.evidence.Attestation, tt.evidence.Attestation) ||
				!bytes.Equal(tt.v.evidence.TDXQuote, tt.evidence.TDXQuote) || !bytes.Equal(tt.v.evidence.EventLog, tt.evidence.EventLog) {
				t.Errorf("verifier saw %+v in %d calls", tt.v.evidence, tt.v.calls)
			}
		})
	}
	id, err := Identify(t.Context(), nil, nil)
	if err != nil || id == nil || id.Certificate != nil {
		t.Errorf("without a certificate: %v, %v", id, err)
	}
}

func TestSpecialUsage(t *testing.T) {
	for _, value := range []string{"0401ff", "00"} {
		cert := &x509.Certificate{Extensions: []pkix.Extension{raw(ExtSpecialUsage, value)}}
		if _, err := SpecialUsage(cert); err == nil || !strings.Contains(err.Error(), "special usage extension") {
			t.Errorf("%s: got %v", value, err)
		}
	}
	for e, want := range map[Extension]string{ExtAttestation: "attestation", 77: "1.3.6.1.4.1.62397.1.77"} {
		if e.String() != want {
			t.Errorf("got %q", e)
		}
	}
}

func TestIdentifyRequest(t *testing.T) {
	cert := &x509.Certificate{Extensions: []pkix.Extension{ExtAppID.Encode([]byte("x"))}}
	bad := &x509.Certificate{Extensions: []pkix.Extension{raw(ExtAppID, "00")}}
	request := func(state *tls.ConnectionState) *http.Request {
		r := httptest.NewRequest("GET", "/", nil)
		r.TLS = state
		return r
	}
	chain := func(c *x509.Certificate) *tls.ConnectionState {
		return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}, VerifiedChains: [][]*x509.Certificate{{c}}}
	}
	identify := IdentifyRequest(nil)
	for name, state := range map[string]*tls.ConnectionState{"plain": nil, "no certificate": {}} {
		ctx, err := identify(request(state))
		if err != nil || FromContext(ctx).Certificate != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, err := identify(request(chain(cert)))
	if err != nil || string(FromContext(ctx).AppID) != "x" {
		t.Errorf("got %v", err)
	}
	if _, err := identify(request(chain(bad))); err == nil {
		t.Error("a malformed certificate was accepted")
	}
	// Nobody vouches for what an unverified certificate says.
	if _, err := identify(request(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}})); err == nil || !strings.Contains(err.Error(), "not verified") {
		t.Errorf("unverified: %v", err)
	}
	if FromContext(context.Background()) == nil {
		t.Error("no identity must be an anonymous one")
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add(uint8(3), ExtAppID.Encode([]byte("x")).Value, uint8(9), ExtAppInfo.Encode(sample().Encode()).Value)
	f.Add(uint8(1), []byte{4, 0}, uint8(2), []byte{4, 0x81, 1})
	f.Add(uint8(8), []byte{4, 1, 0}, uint8(8), []byte{})
	f.Fuzz(func(t *testing.T, a uint8, va []byte, b uint8, vb []byte) {
		cert := &x509.Certificate{Extensions: []pkix.Extension{
			{Id: Extension(a % 10).OID(), Value: va}, {Id: Extension(b % 10).OID(), Value: vb},
		}}
		v := &verifier{info: &AppInfo{}}
		id, err := Identify(t.Context(), cert, v)
		if err != nil {
			return
		}
		if (v.calls == 1) != (id.Attested != nil) {
			t.Fatalf("%d calls, attested %v", v.calls, id.Attested)
		}
		present := false // evidence in the certificate
		for _, e := range cert.Extensions {
			present = present || e.Id.Equal(ExtAttestation.OID()) || e.Id.Equal(ExtTDXQuote.OID())
		}
		if present != (v.calls == 1) {
			t.Fatal("evidence was not verified")
		}
		_, _ = SpecialUsage(cert)
	})
}
