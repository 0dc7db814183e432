package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestDevCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	ca, err := LoadOrCreateDevCA(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"dev-ca.pem": 0o600, "dev-ca.crt": 0o644} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want mode %v", name, fi.Mode(), err, mode)
		}
	}
	if strings.Contains(readText(t, ca.CertPath()), "PRIVATE") {
		t.Fatal("the public file shows the key")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("the directory holds %v (%v)", entries, err)
	}

	s := newStore(t, Options{})
	for _, domain := range []string{"app.localhost", "Gw.Example.", strings.Repeat("a", 60) + ".example"} {
		r, err := ca.Issue(domain)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Pin(domain, r); err != nil {
			t.Fatal(err)
		}
		name := "x." + canonical(domain)
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM([]byte(readText(t, ca.CertPath())))
		if _, _, err := handshake(t, &tls.Config{GetCertificate: s.GetCertificate}, &tls.Config{RootCAs: pool, ServerName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.Reload(nil)
	if s.Get("app.localhost") == nil {
		t.Error("a reload of the store dropped a pinned certificate")
	}
	if err := s.Pin("app.localhost", Record{}); !errors.Is(err, ErrExpired) || s.Get("app.localhost") == nil {
		t.Errorf("pinning a bad record: %v", err)
	}
	if _, err := ca.Issue(""); err == nil {
		t.Error("a certificate for no domain")
	}

	// A restart has the same authority; the public file comes back.
	if err := os.Remove(ca.CertPath()); err != nil {
		t.Fatal(err)
	}
	again, err := LoadOrCreateDevCA(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !again.cert.Equal(ca.cert) || readText(t, ca.CertPath()) == "" {
		t.Error("a restart made another authority")
	}

	// Its end, and a damaged file, are reported with what to do.
	later := func() time.Time { return time.Now().Add(devCALife + time.Hour) }
	if _, err := LoadOrCreateDevCA(dir, later); err == nil || !strings.Contains(err.Error(), "delete it") {
		t.Errorf("got %v", err)
	}
	almost := func() time.Time { return time.Now().Add(devCALife - 24*time.Hour) }
	old, err := LoadOrCreateDevCA(dir, almost)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := old.Issue("x.example"); err != nil || int64(r.NotAfter) != ca.cert.NotAfter.Unix() {
		t.Errorf("a leaf outlives its authority: %v, %v", r.NotAfter, err)
	}
	write(t, filepath.Join(dir, "dev-ca.pem"), readText(t, ca.CertPath()))
	if _, err := LoadOrCreateDevCA(dir, nil); err == nil || !strings.Contains(err.Error(), "dev-ca.pem") {
		t.Errorf("got %v", err)
	}
}

// Processes that start together share one authority.
func TestDevCACreatedOnce(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	cas := make([]*DevCA, 8)
	for i := range cas {
		wg.Go(func() {
			var err error
			if cas[i], err = LoadOrCreateDevCA(dir, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, ca := range cas {
		if !ca.cert.Equal(cas[0].cert) {
			t.Fatal("two authorities were made")
		}
	}
	if got, err := parseChain([]byte(readText(t, cas[0].CertPath()))); err != nil || !got[0].Equal(cas[0].cert) {
		t.Errorf("the public file is another's (%v)", err)
	}
}

// What the documentation promises: curl --cacert works.
func TestDevCAWithCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		// The same check by another implementation.
		t.Log("no curl on this machine: asking openssl")
	}
	ca, err := LoadOrCreateDevCA(t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	s := newStore(t, Options{})
	r, err := ca.Issue("app.test")
	if err == nil {
		err = s.Pin("app.test", r)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: s.GetCertificate})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("fine")) })}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	defer func() { srv.Close(); <-done }()
	_, port, _ := net.SplitHostPort(l.Addr().String())

	var cmd *exec.Cmd
	if curl != "" {
		cmd = exec.Command(curl, "-sS", "--noproxy", "*", "--cacert", ca.CertPath(), "--resolve", "x.app.test:"+port+":127.0.0.1", "https://x.app.test:"+port+"/")
	} else {
		cmd = exec.Command("openssl", "s_client", "-connect", l.Addr().String(), "-CAfile", ca.CertPath(),
			"-servername", "x.app.test", "-verify_hostname", "x.app.test", "-verify_return_error", "-brief")
		cmd.Stdin = strings.NewReader("GET / HTTP/1.0\r\n\r\n")
	}
	out, err := cmd.CombinedOutput()
	if err != nil || (curl != "" && string(out) != "fine") {
		t.Errorf("%v: %s", err, out)
	}
}
