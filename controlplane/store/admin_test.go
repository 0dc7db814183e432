package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestDNSCredentials(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	ctx := context.Background()
	c := DNSCredential{ID: "18c", Name: "n", Provider: "cloudflare", Settings: map[string]string{"api_token": "tok"}, MaxWait: 5 * time.Minute, TXTTTL: 60, CreatedAt: 1, UpdatedAt: 2}
	steps := []struct {
		name string
		do   func() error
		want error
	}{
		{"set a missing default", func() error { return s.SetDefaultDNSCredential(ctx, c.ID) }, ErrNotFound},
		{"update a missing one", func() error {
			_, err := s.UpdateDNSCredential(ctx, c.ID, func(*DNSCredential) error { return nil })
			return err
		}, ErrNotFound},
		{"create", func() error { return s.CreateDNSCredential(ctx, c, false) }, nil},
		{"create again", func() error { return s.CreateDNSCredential(ctx, c, true) }, ErrExists},
		{"make it the default", func() error { return s.SetDefaultDNSCredential(ctx, c.ID) }, nil},
		{"delete the default", func() error { return s.DeleteDNSCredential(ctx, c.ID) }, ErrInUse},
		{"create a second as default", func() error { return s.CreateDNSCredential(ctx, DNSCredential{ID: "2", Provider: "cloudflare"}, true) }, nil},
		{"domain with a missing credential", func() error {
			return s.CreateZTDomain(ctx, ZTDomain{Domain: "a.org", DNSCredID: "zz", Port: 443})
		}, ErrNoCredential},
		{"domain", func() error {
			return s.CreateZTDomain(ctx, ZTDomain{Domain: "a.org", DNSCredID: c.ID, Port: 443})
		}, nil},
		{"delete a used one", func() error { return s.DeleteDNSCredential(ctx, c.ID) }, ErrInUse},
		{"domain lets go", func() error { return s.UpdateZTDomain(ctx, ZTDomain{Domain: "a.org", Port: 443}) }, nil},
		{"delete", func() error { return s.DeleteDNSCredential(ctx, c.ID) }, nil},
		{"delete again", func() error { return s.DeleteDNSCredential(ctx, c.ID) }, ErrNotFound},
		{"bad id", func() error { return s.CreateDNSCredential(ctx, DNSCredential{ID: "a/b"}, false) }, errAny},
	}
	for _, step := range steps {
		if err := step.do(); !errors.Is(err, step.want) && !(step.want == errAny && err != nil) {
			t.Errorf("%s: %v, want %v", step.name, err, step.want)
		}
		if step.name == "make it the default" {
			if got := s.DNSCredentials(); len(got) != 1 || fmt.Sprintf("%+v", got[0].Settings) != fmt.Sprintf("%+v", c.Settings) || got[0].MaxWait != c.MaxWait || got[0].TXTTTL != 60 || got[0].ID != c.ID {
				t.Errorf("%#v", got)
			}
			if s.DefaultDNSCredential() != c.ID {
				t.Error("not the default")
			}
			got, err := s.UpdateDNSCredential(ctx, c.ID, func(c *DNSCredential) error { c.Name = "other"; return nil })
			if err != nil || got.Name != "other" || got.MaxWait != c.MaxWait || got.Settings["api_token"] != "tok" {
				t.Errorf("%+v %v", got, err)
			}
		}
	}
	stop := errors.New("stop")
	if _, err := s.UpdateDNSCredential(ctx, "2", func(*DNSCredential) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	for _, text := range []string{fmt.Sprint(c), fmt.Sprintf("%+v", c), fmt.Sprintf("%#v", c), fmt.Sprintf("%v", []any{c})} {
		if strings.Contains(text, "tok") {
			t.Errorf("the secret is printed: %s", text)
		}
	}
}

var errAny = errors.New("any")

func TestCertbotConfig(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	if got := s.CertbotConfig(); got != (CertbotConfig{RenewInterval: 12 * time.Hour, RenewBefore: 720 * time.Hour, RenewTimeout: 5 * time.Minute}) {
		t.Errorf("defaults %+v", got)
	}
	// Concurrent partial updates must not undo each other.
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			_, err := s.UpdateCertbotConfig(context.Background(), func(c *CertbotConfig) error {
				switch n {
				case 0:
					c.RenewInterval = 0
				case 1:
					c.RenewBefore = time.Hour
				case 2:
					c.RenewTimeout = 1<<63 - 1
				case 3:
					c.ACMEURL = "https://acme.test"
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	want := CertbotConfig{RenewInterval: 0, RenewBefore: time.Hour, RenewTimeout: (1<<63 - 1) / time.Second * time.Second, ACMEURL: "https://acme.test"}
	if got := s.CertbotConfig(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if duration(1<<64-1) != 1<<63-1 {
		t.Error("a large number must saturate")
	}
}

func TestDomainsAndCerts(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	ctx := context.Background()
	node := uint32(3)
	d := ZTDomain{Domain: "b.org", Port: 8443, Node: &node, Priority: -5}
	if err := s.UpdateZTDomain(ctx, d); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if err := s.CreateZTDomain(ctx, d); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateZTDomain(ctx, d); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	if err := s.CreateZTDomain(ctx, ZTDomain{Domain: "a.org", Port: 1}); err != nil {
		t.Fatal(err)
	}
	if got := s.ZTDomains(); len(got) != 2 || got[0].Domain != "a.org" || got[1].Domain != "b.org" || *got[1].Node != 3 || got[1].Priority != -5 {
		t.Errorf("%+v", got)
	}
	cert := CertData{CertPEM: "C", KeyPEM: "SECRETKEY", NotAfter: 1707776000, IssuedBy: 1, IssuedAt: 1700000000}
	if err := s.PutCertData(ctx, "b.org", cert, nil); err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%v %+v %#v", cert, cert, []CertData{cert}); strings.Contains(text, "SECRETKEY") {
		t.Errorf("the key is printed: %s", text)
	}
	if err := s.DeleteZTDomain(ctx, "b.org"); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteZTDomain(ctx, "b.org"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if got, ok := s.CertData("b.org"); !ok || got != cert || len(s.Certs()) != 1 {
		t.Error("the certificate went with the domain")
	}
	if _, ok := s.ZTDomain("b.org"); ok {
		t.Error("still configured")
	}
	for _, bad := range []string{"", "a/b", strings.Repeat("x", 254), "a\x00"} {
		if s.CreateZTDomain(ctx, ZTDomain{Domain: bad}) == nil || s.PutCertData(ctx, bad, cert, nil) == nil || s.AddCertAttestation(ctx, bad, CertAttestation{}, 1, time.Now()) == nil {
			t.Errorf("domain %q accepted", bad)
		}
		if _, err := s.LockCert(ctx, bad, time.Minute); err == nil {
			t.Errorf("lock of domain %q accepted", bad)
		}
	}
}

func TestAttestationHistory(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	ctx := context.Background()
	for n := range 10 {
		a := CertAttestation{PublicKey: []byte{0x30, 0x59, byte(n)}, Quote: "{}", GeneratedBy: 1, GeneratedAt: uint64(1000 + n)}
		if err := s.AddCertAttestation(ctx, "a.org", a, 3, time.Unix(1005, 0)); err != nil {
			t.Fatal(err)
		}
	}
	latest, history := s.CertAttestations("a.org")
	if latest == nil || latest.GeneratedAt != 1009 || !bytes.Equal(latest.PublicKey, []byte{0x30, 0x59, 9}) {
		t.Errorf("%+v", latest)
	}
	var at []uint64
	for _, h := range history {
		at = append(at, h.GeneratedAt)
	}
	// Three at least, and those from 1005 on whose certificates may still be in use.
	if fmt.Sprint(at) != "[1009 1008 1007 1006 1005]" {
		t.Errorf("%v", at)
	}
	if latest, history := s.CertAttestations("b.org"); latest != nil || history != nil {
		t.Error("another domain's attestations")
	}
}

func TestACMEAccount(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	ctx := context.Background()
	if _, found, err := s.ACMECredentials(); found || err != nil {
		t.Fatal(found, err)
	}
	// Two issuers register at once: one account stays.
	var won atomic.Int32
	var wg sync.WaitGroup
	for n := range 4 {
		wg.Go(func() {
			err := s.CreateACMECredentials(ctx, fmt.Sprintf(`{"account_id":"%d"}`, n), nil)
			if err == nil {
				won.Add(1)
			} else if !errors.Is(err, ErrExists) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d accounts", won.Load())
	}
	l, err := s.LockACMERotation(ctx, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ReplaceACMECredentials(ctx, "{}", l); err != nil {
		t.Fatal(err)
	}
	if text, found, err := s.ACMECredentials(); text != "{}" || !found || err != nil {
		t.Error(text, found, err)
	}
	l.Release(ctx)
	l.Release(ctx)
	if err := s.ReplaceACMECredentials(ctx, "late", l); !errors.Is(err, ErrFenced) {
		t.Error(err)
	}
	a := ACMEAttestation{AccountURI: "u", Quote: "q", Attestation: "a", GeneratedBy: 1, GeneratedAt: 2}
	if err := s.PutACMEAttestation(ctx, a); err != nil {
		t.Fatal(err)
	}
	if got, ok := s.ACMEAttestation(); !ok || got != a {
		t.Errorf("%+v", got)
	}
}

// raw puts a value past the codec.
func raw(t *testing.T, s *Store, key, value string) {
	t.Helper()
	if _, err := s.currentBackend().kv.Put(context.Background(), key, value); err != nil {
		t.Fatal(err)
	}
	eventually(t, key, func() bool { v, _ := s.mirror.get(key); return string(v) == value })
}

// TestBadRecords: what cannot be read is skipped and counted; only the ACME account fails closed.
func TestBadRecords(t *testing.T) {
	s, buf := mustOpen(t, t.TempDir())
	put(t, s, instance(1), Stored)
	for n, bad := range []string{"[]", "null", "x", `{"v":2,"data":{}}`, `{"v":1,"data":{"ip":"nonsense-SECRET"}}`, `{"v":1,"data":"SECRET"}`, `{"v":1}`, `{"v":1,"sealed":"AAAA"}`} {
		raw(t, s, fmt.Sprintf("inst/bad%d", n), bad)
	}
	for range 2 {
		if got := s.Instances(); len(got) != 1 || got[0].ID != instance(1).ID {
			t.Errorf("%d instances", len(got))
		}
	}
	if st := s.Status(); st.Undecodable != 8 {
		t.Errorf("%d undecodable", st.Undecodable)
	}
	if n := strings.Count(buf.String(), "a record is skipped"); n != 8 {
		t.Errorf("%d messages, want one for each", n)
	}
	if strings.Contains(buf.String(), "SECRET") {
		t.Errorf("a value is in the log:\n%s", buf)
	}
	s.DeleteInstance(context.Background(), "bad0")
	if st := s.Status(); st.Undecodable != 7 {
		t.Errorf("%d undecodable after a deletion", st.Undecodable)
	}
	raw(t, s, KeyACMECredentials, "garbage")
	if _, _, err := s.ACMECredentials(); err == nil {
		t.Error("an unreadable account is not an error")
	}
	if err := s.CreateACMECredentials(context.Background(), "{}", nil); !errors.Is(err, ErrExists) {
		t.Error("an unreadable account was replaced", err)
	}
}

func TestSealing(t *testing.T) {
	dir := t.TempDir()
	opts, _ := testOptions(t, dir)
	s := openWith(t, opts)
	ctx := context.Background()
	secret := "cf-token-in-clear-text"
	cred := DNSCredential{ID: "c", Provider: "cloudflare", Settings: map[string]string{"api_token": secret}}
	if err := s.CreateDNSCredential(ctx, cred, true); err != nil {
		t.Fatal(err)
	}
	s.Close()

	opts.Secret = bytes.Repeat([]byte{7}, 32)
	s = openWith(t, opts)
	if c, ok := s.DNSCredential("c"); !ok || c.Settings["api_token"] != secret {
		t.Fatal("values in clear must stay readable")
	}
	if err := s.PutCertData(ctx, "a.org", CertData{KeyPEM: "key-in-clear-text"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateACMECredentials(ctx, "acme-in-clear-text", nil); err != nil {
		t.Fatal(err)
	}
	if c, ok := s.CertData("a.org"); !ok || c.KeyPEM != "key-in-clear-text" {
		t.Fatal(c)
	}
	// A value moved to another key does not open.
	value, _ := s.mirror.get(certKey("a.org", "data"))
	raw(t, s, certKey("b.org", "data"), string(value))
	if _, ok := s.CertData("b.org"); ok {
		t.Error("a sealed value can be moved")
	}
	s.Close()
	for _, name := range []string{"backup.json", "etcd/member/snap/db"} {
		data, err := os.ReadFile(filepath.Join(dir, "store", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, clear := range []string{"key-in-clear-text", "acme-in-clear-text"} {
			if bytes.Contains(data, []byte(clear)) {
				t.Errorf("%s holds %q", name, clear)
			}
		}
	}

	for name, other := range map[string][]byte{"other secret": bytes.Repeat([]byte{8}, 32), "no secret": nil} {
		opts.Secret = other
		s = openWith(t, opts)
		if _, ok := s.CertData("a.org"); ok {
			t.Errorf("%s opens the certificate", name)
		}
		if _, _, err := s.ACMECredentials(); err == nil {
			t.Errorf("%s: the account must fail closed", name)
		}
		s.Close()
	}
}

func TestLockLost(t *testing.T) {
	t.Parallel()
	s, _ := mustOpen(t, t.TempDir())
	ctx := context.Background()
	l, err := s.LockCert(ctx, "a.org", time.Second) // at least 5 s are given
	if err != nil {
		t.Fatal(err)
	}
	if h, ok := s.CertLockHolder("a.org"); !ok || h.Node != 1 || time.Since(time.Unix(int64(h.Since), 0)) > time.Minute {
		t.Errorf("%+v %v", h, ok)
	}
	time.Sleep(6 * time.Second) // longer than the lease
	select {
	case <-l.Lost():
		t.Fatal("the lock was not kept alive")
	default:
	}
	if err := s.PutCertData(ctx, "a.org", CertData{}, l); err != nil {
		t.Fatal(err)
	}
	if err := s.ForceReleaseCertLock(ctx, "a.org"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-l.Lost():
	case <-time.After(10 * time.Second):
		t.Fatal("the loss was not noticed")
	}
	l.Release(ctx)

	// Closing the store under a holder tells it.
	l, err = s.LockCert(ctx, "a.org", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	<-l.Lost()
}

func TestLockDiesWithItsHolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, _ := mustOpen(t, dir)
	if _, err := s.LockCert(context.Background(), "a.org", 5*time.Second); err != nil {
		t.Fatal(err)
	}
	s.Close() // nobody released it
	s, _ = mustOpen(t, dir)
	if _, err := s.LockCert(context.Background(), "a.org", 5*time.Second); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	var l *Lock
	eventually(t, "the lease to run out", func() bool {
		var err error
		l, err = s.LockCert(context.Background(), "a.org", 5*time.Second)
		return err == nil
	})
	l.Release(context.Background())
	if data, err := os.ReadFile(s.backupPath()); err == nil && bytes.Contains(data, []byte("cert/a.org/lock")) {
		t.Error("a lock is in the backup")
	}
}
