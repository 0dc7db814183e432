package rpc

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
)

func testCertificate(t testing.TB, domain string, now time.Time) store.CertData {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: domain}, DNSNames: []string{"*." + domain}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(365 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return store.CertData{
		CertPEM:  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		KeyPEM:   string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})),
		NotAfter: 1707776000, IssuedBy: 1, IssuedAt: 1700000000,
	}
}

func (f *fixture) attest(domain string, key byte, at uint64) {
	f.t.Helper()
	a := store.CertAttestation{PublicKey: []byte{0x30, 0x59, key}, Quote: fmt.Sprintf(`{"quote":"%d"}`, key), Attestation: "att", GeneratedBy: 1, GeneratedAt: at}
	if err := f.store.AddCertAttestation(f.t.Context(), domain, a, 1000, time.Unix(0, 0)); err != nil {
		f.t.Fatal(err)
	}
}

const accountJSON = `{"account_id":"https://acme.example/acct/1","acme_url":"https://acme.example/dir","credentials":{"id":"https://acme.example/acct/1","key_pkcs8":"SECRETKEY","directory":"https://acme.example/dir"}}`

func TestAcmeInfo(t *testing.T) {
	f := newFixture(t, nil)
	extra := func(base string) string { return `,"hist_keys":[],"base_domain":"` + base + `"}` }
	f.equal(f.main, "AcmeInfo", "null", `{"account_uri":"","quoted_hist_keys":[],"account_quote":"","account_attestation":""`+extra(""))

	// Without published credentials the attestation record names the account.
	if err := f.store.PutACMEAttestation(t.Context(), store.ACMEAttestation{AccountURI: "https://acme.example/acct/1", Quote: "Q", Attestation: "A", GeneratedBy: 1, GeneratedAt: 5}); err != nil {
		t.Fatal(err)
	}
	account := `{"account_uri":"https://acme.example/acct/1","quoted_hist_keys":[],"account_quote":"Q","account_attestation":"A"`
	f.equal(f.main, "AcmeInfo", "", account+extra(""))
	if err := f.store.CreateACMECredentials(t.Context(), accountJSON, nil); err != nil {
		t.Fatal(err)
	}
	f.equal(f.main, "AcmeInfo", "", account+extra(""))

	// Keys of configured domains, newest first for each; others are left out.
	f.ok(f.admin, "AddZtDomain", `{"domain":"a.example","port":443}`)
	f.ok(f.admin, "AddZtDomain", `{"domain":"b.example","port":443,"priority":9}`)
	f.attest("a.example", 1, 1000)
	f.attest("b.example", 2, 1500)
	f.attest("a.example", 3, 2000)
	f.attest("gone.example", 4, 3000)
	cert := testCertificate(t, "b.example", f.clock.now())
	if err := f.store.PutCertData(t.Context(), "b.example", cert, nil); err != nil {
		t.Fatal(err)
	}
	key := func(n int) string {
		return fmt.Sprintf(`{"public_key":"30590%d","quote":"{\"quote\":\"%d\"}","attestation":"att"}`, n, n)
	}
	full := `{"account_uri":"https://acme.example/acct/1","quoted_hist_keys":[` + key(3) + `,` + key(1) + `,` + key(2) + `],"account_quote":"Q","account_attestation":"A","hist_keys":["305903","305901","305902"]`
	f.equal(f.main, "AcmeInfo", "", full+`,"base_domain":"b.example"}`)
	// The certificate shows once it is in use.
	f.ok(f.admin, "ReloadCert", "")
	chain, err := json.Marshal(cert.CertPEM)
	if err != nil {
		t.Fatal(err)
	}
	loaded := full + `,"active_cert":` + string(chain) + `,"base_domain":"b.example"}`
	f.equal(f.main, "AcmeInfo", "", loaded)
	f.equal(f.main, "Gateway.Tproxy.AcmeInfo", "", loaded)

	// The protobuf form has the fields of the message and no others.
	w := httptest.NewRecorder()
	f.main.ServeHTTP(w, httptest.NewRequest("POST", "/prpc/AcmeInfo", strings.NewReader("garbage")))
	msg := new(gatewaypb.AcmeInfoResponse)
	if err := proto.Unmarshal(w.Body.Bytes(), msg); w.Code != 200 || w.Header().Get("Content-Type") != "application/octet-stream" || err != nil || len(msg.GetQuotedHistKeys()) != 3 || len(msg.ProtoReflect().GetUnknown()) != 0 {
		t.Errorf("%d %v %v %v", w.Code, w.Header(), err, msg)
	}
	// The other ways to ask for JSON.
	for _, r := range []*http.Request{
		httptest.NewRequest("GET", "/prpc/AcmeInfo", nil),
		httptest.NewRequest("POST", "/prpc/AcmeInfo?json=true", nil),
		httptest.NewRequest("POST", "/prpc/AcmeInfo?json=1", nil),
		func() *http.Request {
			r := httptest.NewRequest("POST", "/prpc/AcmeInfo", nil)
			r.Header.Set("Content-Type", "application/json; charset=utf-8")
			return r
		}(),
	} {
		w := httptest.NewRecorder()
		f.main.ServeHTTP(w, r)
		if w.Code != 200 || w.Body.String() != loaded || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: %d %s", r.Method, r.URL, w.Code, w.Header().Get("Content-Type"))
		}
	}
	w = httptest.NewRecorder()
	f.main.ServeHTTP(w, httptest.NewRequest("POST", "/prpc/AcmeInfo?json=0", nil))
	if w.Header().Get("Content-Type") != "application/octet-stream" {
		t.Errorf("?json=0 gives %s", w.Header().Get("Content-Type"))
	}
	w = httptest.NewRecorder()
	f.main.ServeHTTP(w, httptest.NewRequest("PUT", "/prpc/AcmeInfo", nil))
	if w.Code != 404 {
		t.Errorf("PUT: %d", w.Code)
	}

	// An attestation of another account is not shown.
	if err := f.store.PutACMEAttestation(t.Context(), store.ACMEAttestation{AccountURI: "https://acme.example/acct/2", Quote: "Q", Attestation: "A"}); err != nil {
		t.Fatal(err)
	}
	if got := f.ok(f.main, "AcmeInfo", ""); !strings.Contains(got, `"account_uri":"https://acme.example/acct/1"`) || !strings.Contains(got, `"account_quote":"","account_attestation":""`) {
		t.Error(got)
	}
	// A record without JSON in it names no account, and no other one takes its place.
	if err := f.store.ReplaceACMECredentials(t.Context(), "not json", nil); err != nil {
		t.Fatal(err)
	}
	if got := f.ok(f.main, "AcmeInfo", ""); !strings.Contains(got, `"account_uri":""`) || !strings.Contains(got, `"account_quote":""`) {
		t.Error(got)
	}
	if strings.Contains(f.log.String(), "SECRETKEY") {
		t.Error("the account key is in the log")
	}
}

// TestAcmeInfoFailsClosed: a record that cannot be read is not "no account".
func TestAcmeInfoFailsClosed(t *testing.T) {
	dir := t.TempDir()
	secret := bytes.Repeat([]byte{7}, 32)
	sealed, err := store.Open(t.Context(), store.Options{Dir: dir, NodeID: 1, Secret: secret, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := sealed.CreateACMECredentials(t.Context(), accountJSON, nil); err != nil {
		t.Fatal(err)
	}
	sealed.Close()
	unsealed, err := store.Open(t.Context(), store.Options{Dir: dir, NodeID: 1, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer unsealed.Close()
	f := newFixture(t, func(d *Deps) { d.Store = unsealed })
	for range 2 {
		code, out := f.ask(f.main, "AcmeInfo", "")
		if code != 400 || !strings.Contains(out, "failed to read the ACME credentials: ") {
			t.Errorf("%d %s", code, out)
		}
	}
	srv := httptest.NewServer(f.s.Builtin(gatewayService))
	defer srv.Close()
	if _, err := srv.Client().Get(srv.URL + "/acme-info"); err == nil {
		t.Error("/acme-info answers without an account")
	}
}

func TestAcmeInfoIsCappedCachedAndCompressed(t *testing.T) {
	f := newFixture(t, nil)
	f.ok(f.admin, "AddZtDomain", `{"domain":"a.example","port":443}`)
	f.ok(f.admin, "AddZtDomain", `{"domain":"b.example","port":443}`)
	for n := range maxHistory/2 + 10 {
		f.attest("a.example", byte(n), uint64(1000+n))
		f.attest("b.example", byte(n), uint64(5000+n))
	}
	var got struct {
		QuotedHistKeys []struct{ PublicKey string } `json:"quoted_hist_keys"`
		HistKeys       []string                     `json:"hist_keys"`
	}
	body := f.ok(f.main, "AcmeInfo", "")
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.QuotedHistKeys) != maxHistory || len(got.HistKeys) != maxHistory {
		t.Errorf("%d and %d keys", len(got.QuotedHistKeys), len(got.HistKeys))
	}
	a, err := f.s.acmeInfo()
	if err != nil {
		t.Fatal(err)
	}
	// The oldest ones are left out: those of a.example.
	if a.at[0] != 1000+maxHistory/2+9 || a.at[maxHistory-1] != 5000 || a.at[maxHistory/2-11] != 1020 {
		t.Errorf("times %d ... %d ... %d", a.at[0], a.at[maxHistory/2-11], a.at[maxHistory-1])
	}
	if b, _ := f.s.acmeInfo(); b != a {
		t.Error("rendered again without a change")
	}
	f.attest("a.example", 1, 9000)
	if b, _ := f.s.acmeInfo(); b == a {
		t.Error("not rendered again after a change")
	}

	srv := httptest.NewServer(f.s.Builtin(gatewayService))
	defer srv.Close()
	get := func(query, accept string) (*http.Response, []byte) {
		r, err := http.NewRequest("GET", srv.URL+"/.dstack/acme-info"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Accept-Encoding", accept)
		resp, err := srv.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, b
	}
	plainResp, plain := get("", "identity")
	if plainResp.Header.Get("Cache-Control") != "max-age=60" || plainResp.Header.Get("Content-Encoding") != "" {
		t.Errorf("headers %v", plainResp.Header)
	}
	for _, accept := range []string{"gzip", "br, GZIP;q=0.5", "deflate,gzip"} {
		resp, packed := get("", accept)
		if resp.Header.Get("Content-Encoding") != "gzip" || len(packed)*3 > len(plain) {
			t.Fatalf("%q: %v, %d of %d bytes", accept, resp.Header, len(packed), len(plain))
		}
		z, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			t.Fatal(err)
		}
		if unpacked, err := io.ReadAll(z); err != nil || !bytes.Equal(unpacked, plain) {
			t.Errorf("%q: unpacks to something else (%v)", accept, err)
		}
	}
	if resp, _ := get("", "gzip;q=0"); resp.Header.Get("Content-Encoding") != "" {
		t.Error("compressed for a client that refuses it")
	}
	for _, tc := range []struct {
		query string
		n     int
	}{{"?limit=3", 3}, {"?since=9000", 1}, {"?since=5001&limit=10", 10}, {"?limit=0", 0}, {"?limit=", maxHistory}, {"?since=99999999999", 0}} {
		resp, part := get(tc.query, "gzip")
		var got struct {
			Keys []json.RawMessage `json:"quoted_hist_keys"`
			Hist []string          `json:"hist_keys"`
		}
		if err := json.Unmarshal(part, &got); err != nil || resp.StatusCode != 200 || len(got.Keys) != tc.n || len(got.Hist) != tc.n {
			t.Errorf("%s: %d, %d keys, want %d (%v)", tc.query, resp.StatusCode, len(got.Keys), tc.n, err)
		}
	}
	for _, bad := range []string{"?limit=x", "?since=-1", "?limit=99999999999999999999"} {
		if resp, b := get(bad, "gzip"); resp.StatusCode != 400 || len(b) != 0 {
			t.Errorf("%s: %d %s", bad, resp.StatusCode, b)
		}
	}
}

func TestListCertAttestations(t *testing.T) {
	f := newFixture(t, nil)
	f.equal(f.admin, "ListCertAttestations", `{"domain":"a.example"}`, `{"latest":null,"history":[]}`)
	for n := range 3 {
		f.attest("a.example", byte(n), uint64(1000+n))
	}
	entry := func(n int) string {
		return fmt.Sprintf(`{"public_key":"30590%d","quote":"{\"quote\":\"%d\"}","generated_by":1,"generated_at":100%d}`, n, n, n)
	}
	f.equal(f.admin, "ListCertAttestations", `{"domain":"*.A.example"}`, `{"latest":`+entry(2)+`,"history":[`+entry(2)+`,`+entry(1)+`,`+entry(0)+`]}`)
	f.equal(f.admin, "ListCertAttestations", `{"domain":"a.example","limit":2}`, `{"latest":`+entry(2)+`,"history":[`+entry(2)+`,`+entry(1)+`]}`)
	f.equal(f.admin, "ListCertAttestations", `{"domain":"a.example","limit":4294967295}`, `{"latest":`+entry(2)+`,"history":[`+entry(2)+`,`+entry(1)+`,`+entry(0)+`]}`)
}

func TestForceReleaseCertLock(t *testing.T) {
	f := newFixture(t, nil)
	lock, err := f.store.LockCert(t.Context(), "App.example", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Release(context.WithoutCancel(t.Context()))
	f.equal(f.admin, "ForceReleaseCertLock", `{"domain":"app.example"}`, "null") // another name: not normalised
	if _, held := f.store.CertLockHolder("App.example"); !held {
		t.Fatal("the lock of another domain was released")
	}
	f.equal(f.admin, "ForceReleaseCertLock", `{"domain":"App.example"}`, "null")
	if _, held := f.store.CertLockHolder("App.example"); held {
		t.Error("the lock is still held")
	}
}

func TestReloadCertNamesWhatFails(t *testing.T) {
	f := newFixture(t, nil)
	for _, d := range []string{"bad.example", "good.example", "none.example"} {
		f.ok(f.admin, "AddZtDomain", `{"domain":"`+d+`","port":443}`)
	}
	good := testCertificate(t, "good.example", f.clock.now())
	expired := testCertificate(t, "bad.example", f.clock.now())
	expired.NotAfter = 1699999999
	for domain, c := range map[string]store.CertData{"good.example": good, "bad.example": expired, "leftover.example": expired} {
		if err := f.store.PutCertData(t.Context(), domain, c, nil); err != nil {
			t.Fatal(err)
		}
	}
	code, out := f.ask(f.admin, "ReloadCert", "")
	if code != 400 || !strings.Contains(out, "certificates were reloaded, but 1 of 3 domains have none that can be used: bad.example: ") || strings.Contains(out, "leftover") {
		t.Errorf("%d %s", code, out)
	}
	if f.certs.Get("good.example") == nil {
		t.Error("the good one is not in use")
	}
}

func TestGetPeers(t *testing.T) {
	f := newFixture(t, nil)
	f.refused(f.main, "GetPeers", "null", "Client authentication is required")
	f.caller = guest(t, "aabb", inst1, compose1) // only the app id extension counts
	f.refused(f.main, "GetPeers", "null", "Client authentication is required")
	for _, app := range []string{"", "aa", "aabbcc", "bbaa"} {
		raw, err := hex.DecodeString(app)
		if err != nil {
			t.Fatal(err)
		}
		f.caller = &ratls.Identity{AppID: raw}
		f.refused(f.main, "GetPeers", "", "Remote app id is not from dstack-gateway")
	}
	f.caller = &ratls.Identity{AppID: []byte{0xaa, 0xbb}}
	f.equal(f.main, "GetPeers", "null", `{"my_id":1,"my_url":"https://gw1.example.com:9202","peers":[{"id":1,"url":"https://gw1.example.com:9202"}]}`)
	f.ok(f.admin, "SetNodeUrl", `{"id":10,"url":"https://gw10"}`)
	f.ok(f.admin, "SetNodeUrl", `{"id":2,"url":"https://gw2"}`)
	f.equal(f.main, "GetPeers", "null", `{"my_id":1,"my_url":"https://gw1.example.com:9202","peers":[{"id":1,"url":"https://gw1.example.com:9202"},{"id":2,"url":"https://gw2"},{"id":10,"url":"https://gw10"}]}`)
}

func TestGetPeersWithoutOwnIdentity(t *testing.T) {
	f := newFixture(t, func(d *Deps) { d.Self.AppID = nil })
	f.caller = &ratls.Identity{AppID: []byte{}}
	f.refused(f.main, "GetPeers", "", "Remote app id is not from dstack-gateway")
	open := newFixture(t, func(d *Deps) { d.Self.AppID, d.SkipAttestation = nil, true })
	open.ok(open.main, "GetPeers", "")
}

// TestAdminWritesNeedTheStore: while the store cannot be written, changes of settings are refused with the reason and
// registrations go on.
func TestAdminWritesNeedTheStore(t *testing.T) {
	f := newFixture(t, nil)
	f.store.Close()
	f.caller = guest(t, appA, inst1, compose1)
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	for method, body := range map[string]string{
		"CreateDnsCredential": `{"name":"n","provider_type":"cloudflare","cf_api_token":"t"}`,
		"AddZtDomain":         `{"domain":"a.example","port":443}`,
		"SetCertbotConfig":    `{"acme_url":"https://acme.example/dir"}`,
		"SetNodeStatus":       `{"id":1,"status":"down"}`,
		"SetNodeUrl":          `{"id":1,"url":"https://gw"}`,
	} {
		if code, out := f.ask(f.admin, method, body); code != 400 || !strings.Contains(out, "failed to ") {
			t.Errorf("%s: %d %s", method, code, out)
		}
	}
	if code, out := f.ask(f.admin, "SetInstancePortPolicy", `{"instance_id":"`+inst1+`","policy":{}}`); code != 400 || !strings.Contains(out, "the change is in force but not durable: ") {
		t.Errorf("SetInstancePortPolicy: %d %s", code, out)
	}
}

func TestMarshalledExtrasAreJSON(t *testing.T) {
	a := &acmeInfo{msg: &gatewaypb.AcmeInfoResponse{AccountUri: `"}],"x":[{`}, extra: acmeExtra{BaseDomain: `}`}}
	text, err := a.marshalJSON()
	if err != nil || !json.Valid(text) {
		t.Fatalf("%s %v", text, err)
	}
	back := new(gatewaypb.AcmeInfoResponse)
	if err := prpc.Unmarshal(text, back); err != nil || back.GetAccountUri() != a.msg.GetAccountUri() {
		t.Errorf("%v %v", back, err)
	}
}

// FuzzAcmeQuery: whatever anybody asks for, the answer is JSON and not larger than the limit.
func FuzzAcmeQuery(f *testing.F) {
	for _, q := range []string{"limit=2", "since=3&limit=1", "limit=0", "since=-1", "limit=99999999999999999999", "since=%zz&limit=1;x", "limit=1&limit=5"} {
		f.Add(q)
	}
	all := &acmeInfo{msg: new(gatewaypb.AcmeInfoResponse)}
	for n := range 5 {
		all.msg.QuotedHistKeys = append(all.msg.QuotedHistKeys, &gatewaypb.QuotedPublicKey{PublicKey: []byte{byte(n)}})
		all.at = append(all.at, uint64(n))
	}
	f.Fuzz(func(t *testing.T, raw string) {
		query, _ := url.ParseQuery(raw) // as URL.Query does, which drops what it cannot read
		part, err := all.since(query)
		if err != nil {
			return
		}
		var got struct {
			Keys []json.RawMessage `json:"quoted_hist_keys"`
		}
		if err := json.Unmarshal(part.json, &got); err != nil {
			t.Fatal(err)
		}
		if limit, err := strconv.Atoi(query.Get("limit")); err == nil && len(got.Keys) > limit {
			t.Fatalf("%d keys for %q", len(got.Keys), raw)
		}
	})
}
