package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// syncLog is a log that may be read while others write.
type syncLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *syncLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *syncLog) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func staticFiles(t *testing.T, r Record) StaticFiles {
	dir := t.TempDir()
	f := StaticFiles{BaseDomain: "App.Example", CertPath: filepath.Join(dir, "chain.pem"), KeyPath: filepath.Join(dir, "key.pem")}
	write(t, f.CertPath, r.CertPEM)
	write(t, f.KeyPath, r.KeyPEM)
	return f
}

func TestLoadStatic(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	r, stored := ca.record("static", "ecdsa-pkcs8", "app.example"), ca.record("stored", "ecdsa-pkcs8", "app.example")
	f := staticFiles(t, r)
	s := newStore(t, Options{})
	if rej := s.Reload(map[string]Record{"app.example": stored}); len(rej) != 0 {
		t.Fatal(rej)
	}
	if err := s.LoadStatic(f); err != nil {
		t.Fatal(err)
	}
	cert := s.Get("app.example")
	if got, err := r.Accept(time.Now()); err != nil || !sameChain(got, cert) {
		t.Fatal("the static certificate does not hide the stored one")
	}
	// It outlives every kind of change of records.
	s.Reload(nil)
	s.Reload(map[string]Record{"app.example": stored, "other.example": stored})
	if err := s.Update("app.example", stored); err != nil {
		t.Fatal(err)
	}
	s.Remove("app.example")
	if s.Get("app.example") != cert {
		t.Error("the static certificate was lost")
	}
	if e := s.Expiry()["app.example"]; !e.Equal(cert.Leaf.NotAfter) {
		t.Errorf("expiry %v, want the X.509 field %v", e, cert.Leaf.NotAfter)
	}

	for _, tc := range []struct {
		name string
		edit func(*StaticFiles)
		want string
		is   error
	}{
		{"no domain", func(f *StaticFiles) { f.BaseDomain = "" }, "base_domain", nil},
		{"no chain", func(f *StaticFiles) { f.CertPath += ".missing" }, "chain.pem.missing", fs.ErrNotExist},
		{"no key", func(f *StaticFiles) { f.KeyPath += ".missing" }, "key.pem.missing", fs.ErrNotExist},
		{"a directory", func(f *StaticFiles) { f.KeyPath = filepath.Dir(f.KeyPath) }, "is a directory", nil},
		{"swapped", func(f *StaticFiles) { f.CertPath, f.KeyPath = f.KeyPath, f.CertPath }, "no PEM block CERTIFICATE", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := f
			tc.edit(&f)
			err := newStore(t, Options{}).LoadStatic(f)
			if err == nil || !strings.Contains(err.Error(), tc.want) || (tc.is != nil && !errors.Is(err, tc.is)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// An expired static certificate is served at start, with a warning, but does
// not replace one that is valid.
func TestExpiredStatic(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	short, long := ca.record("short", "ecdsa-pkcs8", "app.example"), ca.record("long", "ecdsa-pkcs8", "app.example")
	f := staticFiles(t, short)
	later := time.Now().Add(25 * 24 * time.Hour)
	var log syncLog
	s := newStore(t, Options{Now: func() time.Time { return later }, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err := s.LoadStatic(f); err != nil {
		t.Fatal(err)
	}
	if s.Get("app.example") == nil || log.count("is expired") != 1 {
		t.Error("the expired certificate is not served, or silently")
	}

	now := time.Now()
	s = newStore(t, Options{Now: func() time.Time { return now }})
	if err := s.LoadStatic(f); err != nil {
		t.Fatal(err)
	}
	cert := s.Get("app.example")
	write(t, f.CertPath, long.CertPEM)
	write(t, f.KeyPath, long.KeyPEM)
	// Between the two ends: pretend that only the new one is over.
	s.mu.Lock()
	e := s.static["app.example"]
	e.expires = later.Add(time.Hour)
	s.static["app.example"] = e
	s.mu.Unlock()
	now = later
	if err := s.loadStatic(f, false); !errors.Is(err, ErrExpired) {
		t.Errorf("got %v", err)
	}
	if s.Get("app.example") != cert {
		t.Error("an expired pair replaced a valid one")
	}
}

// The files change in all the ways deployment tools do it.
func TestWatchStatic(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	one, two, three := ca.record("one", "ecdsa-pkcs8", "app.example"), ca.record("two", "ecdsa-pkcs8", "app.example"), ca.record("three", "rsa-pkcs1", "app.example")
	f := staticFiles(t, one)
	synctest.Test(t, func(t *testing.T) {
		var log syncLog
		// The bubble's clock starts in 2000, before the certificates.
		real := func() time.Time { return time.Unix(int64(one.IssuedAt)+60, 0) }
		s := newStore(t, Options{Now: real, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err := s.LoadStatic(f); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.WatchStatic(ctx, f, 2*time.Second) }()
		cn := func(r Record, what string) {
			t.Helper()
			time.Sleep(5 * time.Second)
			want, err := r.Accept(real())
			if err != nil {
				t.Fatal(err)
			}
			if !sameChain(s.Get("app.example"), want) {
				t.Errorf("%s: the wrong certificate is served", what)
			}
		}
		cn(one, "nothing changed")
		if n := log.count("certificate installed"); n != 1 {
			t.Errorf("installed %d times without a change", n)
		}

		// Chain first, the key much later: mismatch in between.
		write(t, f.CertPath, two.CertPEM)
		cn(one, "mismatching pair")
		time.Sleep(time.Minute)
		if n := log.count("reloading the static certificate failed"); n != 1 {
			t.Errorf("a lasting mismatch was logged %d times, want once", n)
		}
		write(t, f.KeyPath, two.KeyPEM)
		cn(two, "key followed")
		if log.count("readable again") != 1 {
			t.Error("recovery was not logged")
		}

		// Written in pieces, each within the interval: never loaded half.
		failures := log.count("failed")
		for i := range 10 {
			write(t, f.CertPath, three.CertPEM[:len(three.CertPEM)*(i+1)/10])
			time.Sleep(time.Second)
		}
		write(t, f.KeyPath, three.KeyPEM)
		cn(three, "written in pieces")
		if log.count("failed") != failures {
			t.Error("a file being written was loaded")
		}

		// Renamed into place with the times of another file.
		old, err := os.Stat(f.CertPath)
		if err != nil {
			t.Fatal(err)
		}
		for path, text := range map[string]string{f.CertPath: one.CertPEM, f.KeyPath: one.KeyPEM} {
			write(t, path+".new", text)
			if err := os.Chtimes(path+".new", old.ModTime(), old.ModTime()); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".new", path); err != nil {
				t.Fatal(err)
			}
		}
		cn(one, "renamed")

		// Gone, and back.
		if err := os.Remove(f.KeyPath); err != nil {
			t.Fatal(err)
		}
		cn(one, "key deleted")
		write(t, f.KeyPath, two.KeyPEM)
		write(t, f.CertPath, two.CertPEM)
		cn(two, "back")

		// Touched without a change.
		n := log.count("certificate installed")
		if err := os.Chtimes(f.CertPath, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		cn(two, "touched")
		if log.count("certificate installed") != n {
			t.Error("touching a file installed it again")
		}
		cancel()
		<-done
	})
}

// A directory that is swapped by a symbolic link, as Kubernetes does.
func TestWatchStaticBehindASymlink(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	one, two := ca.record("one", "ecdsa-pkcs8", "app.example"), ca.record("two", "ecdsa-pkcs8", "app.example")
	root := t.TempDir()
	for name, r := range map[string]Record{"v1": one, "v2": two} {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(root, name, "tls.crt"), r.CertPEM)
		write(t, filepath.Join(root, name, "tls.key"), r.KeyPEM)
	}
	link := filepath.Join(root, "current")
	if err := os.Symlink("v1", link); err != nil {
		t.Fatal(err)
	}
	f := StaticFiles{"app.example", filepath.Join(link, "tls.crt"), filepath.Join(link, "tls.key")}
	s := newStore(t, Options{})
	if err := s.LoadStatic(f); err != nil {
		t.Fatal(err)
	}
	first := s.Get("app.example")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.WatchStatic(ctx, f, 10*time.Millisecond) })
	defer wg.Wait()
	defer cancel()

	// Clients keep connecting during the swap.
	server := &tls.Config{GetCertificate: s.GetCertificate}
	client := &tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example"}
	if _, _, err := handshake(t, server, client); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("v2", link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for s.Get("app.example") == first {
		if time.Now().After(deadline) {
			t.Fatal("the swap was not noticed")
		}
		if _, _, err := handshake(t, server, client); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := handshake(t, server, client); err != nil {
		t.Fatal(err)
	}
}
