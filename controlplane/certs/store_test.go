package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func TestAcceptRecord(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	good := ca.record("good", "ecdsa-pkcs8", "app.example.com")
	other := ca.record("other", "ecdsa-pkcs8", "app.example.com")
	now := time.Now()
	for _, tc := range []struct {
		name string
		edit func(*Record)
		want string // part of the error, empty: accepted
	}{
		{"good", func(*Record) {}, ""},
		{"a second left", func(r *Record) { r.NotAfter = uint64(now.Unix()) + 1 }, ""},
		{"X.509 says longer", func(r *Record) { r.NotAfter = uint64(now.Unix()) + 60 }, ""},
		{"stored number beyond the X.509 field", func(r *Record) { r.NotAfter = 1 << 40 }, ""},
		{"stored number beyond int64", func(r *Record) { r.NotAfter = 1 << 63 }, ""},
		{"text around the blocks", func(r *Record) { r.CertPEM = "# chain\n" + r.CertPEM + "\ntrailing\n" }, ""},
		{"chain without the authority", func(r *Record) {
			r.CertPEM = r.CertPEM[:strings.Index(r.CertPEM, "-----END")] + "-----END CERTIFICATE-----\n"
		}, ""},
		{"expired this second", func(r *Record) { r.NotAfter = uint64(now.Unix()) }, "certificate is expired"},
		{"no expiry", func(r *Record) { r.NotAfter = 0 }, "certificate is expired"},
		{"empty chain", func(r *Record) { r.CertPEM = "" }, "no PEM block CERTIFICATE"},
		{"chain is a key", func(r *Record) { r.CertPEM = r.KeyPEM }, "no PEM block CERTIFICATE"},
		{"half a chain", func(r *Record) { r.CertPEM = r.CertPEM[:200] }, "no PEM block CERTIFICATE"},
		{"broken leaf", func(r *Record) {
			r.CertPEM = editPEM(t, r.CertPEM, 0, func(b []byte) []byte { return b[:len(b)/2] })
		}, "certificate 1 of the chain"},
		{"broken second certificate", func(r *Record) {
			r.CertPEM = editPEM(t, r.CertPEM, 1, func(b []byte) []byte { return b[:len(b)/2] })
		}, "certificate 2 of the chain"},
		{"huge", func(r *Record) { r.CertPEM += strings.Repeat("\n", maxPEM) }, "at most"},
		{"empty key", func(r *Record) { r.KeyPEM = "" }, "private key"},
		{"key is a certificate", func(r *Record) { r.KeyPEM = r.CertPEM }, "private key"},
		{"broken key", func(r *Record) {
			r.KeyPEM = editPEM(t, r.KeyPEM, 0, func(b []byte) []byte { return b[:len(b)/2] })
		}, "private key"},
		{"key of another certificate", func(r *Record) { r.KeyPEM = other.KeyPEM }, "does not match"},
		{"authority first", func(r *Record) {
			i := strings.Index(r.CertPEM, "-----END CERTIFICATE-----\n") + len("-----END CERTIFICATE-----\n")
			r.CertPEM = r.CertPEM[i:] + r.CertPEM[:i]
		}, "does not match"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := good
			tc.edit(&r)
			cert, err := r.Accept(now)
			if tc.want == "" {
				if err != nil {
					t.Fatalf("rejected: %v", err)
				}
				if cert.Leaf == nil || cert.Leaf.Subject.CommonName != "*.app.example.com" {
					t.Errorf("leaf %+v", cert.Leaf)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want %q", err, tc.want)
			}
			if errors.Is(err, ErrExpired) != (tc.want == "certificate is expired") {
				t.Errorf("errors.Is(ErrExpired) is wrong for %v", err)
			}
			for line := range strings.Lines(good.KeyPEM) {
				if line = strings.TrimSpace(line); len(line) > 20 && !strings.HasPrefix(line, "-") && strings.Contains(err.Error(), line) {
					t.Error("the error shows the key")
				}
			}
		})
	}
}

// Every kind and encoding of key that openssl writes serves a handshake.
func TestKeyKinds(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	for kind := range keys {
		t.Run(kind, func(t *testing.T) {
			s := newStore(t, Options{})
			if err := s.Update("app.example.com", ca.record(kind, kind, "app.example.com")); err != nil {
				t.Fatal(err)
			}
			for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				cs, _, err := handshake(t, &tls.Config{GetCertificate: s.GetCertificate},
					&tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example.com", MinVersion: v, MaxVersion: v})
				if err != nil {
					t.Fatal(err)
				}
				if cs.PeerCertificates[0].Subject.CommonName != "*.app.example.com" {
					t.Errorf("got %v", cs.PeerCertificates[0].Subject)
				}
			}
		})
	}
}

// An RSA key that parses but that crypto/tls will not sign with.
func TestUnusableKeyIsRejected(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	key, crt := ca.dir+"/weak.key", ca.dir+"/weak.crt"
	openssl(t, "genrsa", "-out", key, "512")
	openssl(t, "req", "-x509", "-key", key, "-out", crt, "-days", "5", "-subj", "/CN=weak", "-sha256")
	r := Record{CertPEM: readText(t, crt), KeyPEM: readText(t, key), NotAfter: uint64(time.Now().Add(time.Hour).Unix())}
	if _, err := r.Accept(time.Now()); err == nil {
		t.Error("a 512-bit RSA key was accepted")
	}
}

func TestLookup(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	s := newStore(t, Options{})
	if err := s.Update("App.Example.com.", ca.record("a", "ecdsa-pkcs8", "app.example.com")); err != nil {
		t.Fatal(err)
	}
	cert := s.Get("app.example.com")
	if cert == nil {
		t.Fatal("no certificate under the canonical name")
	}
	for name, want := range map[string]bool{
		"x.app.example.com":   true,
		"X.APP.example.COM":   true,
		"x.app.example.com.":  true,
		"app.example.com":     false,
		"a.b.app.example.com": false,
		"x.example.com":       false,
		"example.com":         false,
		"com":                 false,
		"":                    false,
		".":                   false,
	} {
		if got := s.Lookup(name); (got == cert) != want {
			t.Errorf("Lookup(%q) found: %v, want %v", name, got != nil, want)
		}
	}
	if _, err := s.GetCertificate(&tls.ClientHelloInfo{ServerName: "app.example.com"}); !errors.Is(err, ErrNoCertificate) {
		t.Errorf("got %v", err)
	}
	if n := testing.AllocsPerRun(100, func() { s.Get("app.example.com"); s.Lookup("x.app.example.com") }); n != 0 {
		t.Errorf("a look-up allocates %v times", n)
	}
}

// The two ways records come in differ in what a rejected one leaves behind.
func TestReloadAndUpdate(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	now := time.Now()
	clock := func() time.Time { return now }
	var log bytes.Buffer
	reg := prometheus.NewPedanticRegistry()
	s := newStore(t, Options{Now: clock, Registerer: reg, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	a, b, a2 := ca.record("a", "ecdsa-pkcs8", "a.example"), ca.record("b", "ecdsa-pkcs8", "b.example"), ca.record("a2", "ecdsa-pkcs8", "a.example")
	bad := b
	bad.KeyPEM = a.KeyPEM

	if rej := s.Reload(map[string]Record{"a.example": a, "b.example": bad}); len(rej) != 1 || rej["b.example"] == nil {
		t.Fatalf("rejected %v", rej)
	}
	if s.Get("a.example") == nil || s.Get("b.example") != nil {
		t.Fatal("one bad domain cost another its certificate, or was installed")
	}
	if err := s.Update("b.example", b); err != nil {
		t.Fatal(err)
	}
	certA, certB := s.Get("a.example"), s.Get("b.example")

	// A rejected update leaves the previous one.
	if err := s.Update("b.example", bad); err == nil || !strings.Contains(err.Error(), "b.example") {
		t.Fatalf("got %v", err)
	}
	expired := a
	expired.NotAfter = uint64(now.Unix())
	if err := s.Update("a.example", expired); !errors.Is(err, ErrExpired) {
		t.Fatalf("got %v", err)
	}
	if s.Get("b.example") != certB || s.Get("a.example") != certA {
		t.Error("a rejected update changed what is installed")
	}

	// A reload without changes keeps the very same objects, parsed once.
	if rej := s.Reload(map[string]Record{"a.example": a, "b.example": b}); len(rej) != 0 {
		t.Fatal(rej)
	}
	if s.Get("a.example") != certA || s.Get("b.example") != certB {
		t.Error("an unchanged record was parsed again")
	}
	// A changed one is swapped, a rejected one disappears, an absent one too.
	if rej := s.Reload(map[string]Record{"a.example": a2, "b.example": bad}); len(rej) != 1 {
		t.Fatal(rej)
	}
	if got := s.Get("a.example"); got == certA || got == nil {
		t.Error("the new certificate was not installed")
	}
	if s.Get("b.example") != nil {
		t.Error("the rejected domain did not disappear in a reload")
	}
	if got := s.Domains(); len(got) != 1 || got[0] != "a.example" {
		t.Errorf("domains %v", got)
	}

	// What has expired since it was installed goes with the next reload.
	now = now.Add(30 * 24 * time.Hour)
	if rej := s.Reload(map[string]Record{"a.example": a2}); !errors.Is(rej["a.example"], ErrExpired) {
		t.Errorf("rejected %v", rej)
	}
	if s.Get("a.example") != nil {
		t.Error("an expired certificate survived a reload")
	}
	now = time.Now()
	if err := s.Update("a.example", a); err != nil {
		t.Fatal(err)
	}
	s.Remove("A.EXAMPLE")
	if s.Get("a.example") != nil {
		t.Error("a removed domain is still served")
	}
	if err := s.Update("", a); err == nil {
		t.Error("an empty domain was accepted")
	}
	if text := log.String(); strings.Contains(text, "PRIVATE KEY") || !strings.Contains(text, "ECDSA P-256") {
		t.Errorf("log:\n%s", text)
	}
	if m := gather(t, reg); m["dstack_gateway_cert_rejections_total"] != 6 {
		t.Errorf("rejections %v, want 6", m)
	}
}

func TestCertificateForAnotherDomainIsServedWithAWarning(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	var log bytes.Buffer
	s := newStore(t, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err := s.Update("b.example", ca.record("a", "ecdsa-pkcs8", "a.example")); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "not for this domain") {
		t.Errorf("log:\n%s", log.String())
	}
}

func TestExpiryAndMetrics(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	reg := prometheus.NewPedanticRegistry()
	s := newStore(t, Options{Registerer: reg})
	r := ca.record("a", "ecdsa-pkcs8", "a.example")
	x509End := func() time.Time {
		c, err := r.Accept(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf.NotAfter
	}()
	early, late := r, r
	early.NotAfter = uint64(time.Now().Add(time.Hour).Unix())
	late.NotAfter = 1 << 63
	s.Reload(map[string]Record{"early.example": early, "late.example": late})
	e := s.Expiry()
	if !e["early.example"].Equal(time.Unix(int64(early.NotAfter), 0)) || !e["late.example"].Equal(x509End) {
		t.Errorf("expiry %v, want %v and %v", e, early.NotAfter, x509End)
	}
	m := gather(t, reg)
	if m["dstack_gateway_cert_not_after_timestamp_seconds/early.example"] != float64(early.NotAfter) ||
		m["dstack_gateway_cert_not_after_timestamp_seconds/late.example"] != float64(x509End.Unix()) {
		t.Errorf("metrics %v", m)
	}

	// Many domains: a bounded number of series, the urgent one among them.
	many := map[string]Record{"early.example": early}
	for i := range 300 {
		many[fmt.Sprintf("d%d.example", i)] = r
	}
	s.Reload(many)
	m = gather(t, reg)
	if len(m) != maxSeries+1 {
		t.Errorf("%d series, want %d and the counter", len(m), maxSeries)
	}
	if _, ok := m["dstack_gateway_cert_not_after_timestamp_seconds/early.example"]; !ok {
		t.Error("the domain that expires first has no series")
	}
}

func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range fams {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "/" + l.GetValue()
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

// Certificates are swapped all the time while clients connect: every handshake
// succeeds and shows one of the two.
func TestSwapUnderHandshakes(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	s := newStore(t, Options{})
	recs := []Record{ca.record("one", "ecdsa-pkcs8", "app.example"), ca.record("two", "ecdsa-pkcs8", "app.example")}
	if err := s.Update("app.example", recs[0]); err != nil {
		t.Fatal(err)
	}
	server := &tls.Config{GetCertificate: s.GetCertificate, SessionTicketsDisabled: true}
	client := &tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example"}

	ctx, cancel := context.WithCancel(t.Context())
	var swaps int
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			swaps++
			if swaps%3 == 0 {
				s.Reload(map[string]Record{"app.example": recs[swaps%2]})
			} else if err := s.Update("app.example", recs[swaps%2]); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var mu sync.Mutex
	seen := map[string]int{}
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range 50 {
				cs, _, err := handshake(t, server, client)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				seen[cs.PeerCertificates[0].SerialNumber.String()]++
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	cancel()
	wg.Wait()
	if len(seen) != 2 || swaps < 10 {
		t.Errorf("%d swaps, handshakes by certificate %v, want both seen", swaps, seen)
	}
}

func BenchmarkGet(b *testing.B) {
	ca := newOpensslCA(b, "bench CA")
	s := newStore(b, Options{})
	if err := s.Update("app.example.com", ca.record("a", "ecdsa-pkcs8", "app.example.com")); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if s.Get("app.example.com") == nil {
				b.Error("nothing found")
				return
			}
		}
	})
}

func FuzzAcceptRecord(f *testing.F) {
	// Working pairs made by openssl are in testdata: made anew here, they would
	// differ in every worker.
	f.Add("", "", uint64(0))
	now := time.Now()
	f.Fuzz(func(t *testing.T, cert, key string, notAfter uint64) {
		c, err := Record{CertPEM: cert, KeyPEM: key, NotAfter: notAfter}.Accept(now)
		if (c == nil) == (err == nil) {
			t.Fatal("neither or both of certificate and error")
		}
		if err != nil {
			return
		}
		if notAfter <= uint64(now.Unix()) {
			t.Fatal("an expired record was accepted")
		}
		if c.Leaf == nil || len(c.Certificate) == 0 || c.PrivateKey == nil {
			t.Fatalf("incomplete: %+v", c)
		}
		if err := probe(c.PrivateKey); err != nil {
			t.Fatalf("the accepted key cannot sign: %v", err)
		}
	})
}

// The pairs of the fuzz corpus must be good ones, or the target explores only
// the first error.
func TestFuzzCorpusIsAccepted(t *testing.T) {
	for _, name := range []string{"p8", "sec1", "rsa", "ed25519"} {
		lines := strings.Split(readText(t, "testdata/fuzz/FuzzAcceptRecord/"+name), "\n")
		var r Record
		for i, dst := range []*string{&r.CertPEM, &r.KeyPEM} {
			text, err := strconv.Unquote(strings.TrimSuffix(strings.TrimPrefix(lines[i+1], "string("), ")"))
			if err != nil {
				t.Fatal(err)
			}
			*dst = text
		}
		r.NotAfter = 1 << 62
		if _, err := r.Accept(time.Now()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
