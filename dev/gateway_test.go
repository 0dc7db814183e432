package dev

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// The gateway reads what dev writes, without a complaint, and understands what
// was meant.
func TestGatewayConf(t *testing.T) {
	o := Defaults()
	o.StateDir = t.TempDir()
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	text, err := gatewayConf(&o, "0123456789abcdef0123456789", key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(o.StateDir, fileGatewayConf)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	c, warnings, err := config.Load(config.LoadOptions{Path: path, EtcDir: t.TempDir(), Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range warnings {
		// This one is the point of the switch.
		if !strings.Contains(w.String(), "insecure_skip_attestation") {
			t.Error(w)
		}
	}
	if got := c.Core.WG.Endpoint; got != "10.213.0.1:51830" {
		t.Errorf("endpoint %s", got)
	}
	if !c.Core.Proxy.StaticCert() || !c.Server.TLS.Enabled() || c.Server.TLS.Mutual.CACerts == "" {
		t.Error("a certificate is not configured")
	}
	if got := c.Core.WG.PublicKey; got != key.PublicKey().String() {
		t.Errorf("public key %s", got)
	}
	if s := c.Core.Proxy.AppAddressDNSServers; len(s) != 1 || s[0] != o.DNS {
		t.Errorf("DNS servers %v", s)
	}
	if got := c.Core.WG.ClientIPRange; got != o.Overlay {
		t.Errorf("addresses of guests %v", got)
	}
}

func TestIssueKeepsWhatIsGood(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	ca, err := ratls.NewCA(clock)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key")
	id := gatewayAppID()
	app := ratls.App{ID: id[:], Subject: "dstack-gateway", Names: []string{"10.213.0.1", "gw.test"}, ServerAuth: true}
	issued := func() string {
		t.Helper()
		if err := issue(ca, app, cert, key, clock); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(cert)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	first := issued()
	if issued() != first {
		t.Error("a good certificate is replaced")
	}
	for _, tt := range []struct {
		why    string
		change func()
	}{
		{"another name", func() { app.Names = app.Names[:1] }},
		{"app info", func() { app.Info = &ratls.AppInfo{AppID: id[:], InstanceID: make([]byte, 20)} }},
		{"another instance", func() { app.Info.InstanceID = []byte(strings.Repeat("x", 20)) }},
		{"its end", func() { now = now.Add(rpcCertValidity - renewBefore + time.Hour) }},
		{"another CA", func() {
			if ca, err = ratls.NewCA(clock); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		before := issued()
		tt.change()
		if issued() == before {
			t.Errorf("%s: the old certificate is kept", tt.why)
		}
	}
}

// What the user is told when the gateway does not get ready: its own words.
func TestGatewayReady(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	answers := make(chan int, 10)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ready" || r.Header.Get("Authorization") != "Bearer token" {
			t.Errorf("asked for %s with %q", r.URL, r.Header.Get("Authorization"))
		}
		select {
		case code := <-answers:
			w.WriteHeader(code)
		default:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		io.WriteString(w, `{"wireguard":"no such device"}`)
	})}
	go srv.Serve(l)
	defer srv.Close()
	o := Defaults()
	o.Admin = netip.MustParseAddrPort(l.Addr().String())
	alive := make(chan struct{})
	answers <- 503
	answers <- 200
	if err := gatewayReady(t.Context(), &o, "token", alive, 5*time.Second); err != nil {
		t.Error(err)
	}
	if err := gatewayReady(t.Context(), &o, "token", alive, 200*time.Millisecond); err == nil || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("got %v, want the gateway's reason", err)
	}
	dead := make(chan struct{})
	close(dead)
	if err := gatewayReady(t.Context(), &o, "token", dead, time.Minute); err == nil {
		t.Error("a gateway that ended is waited for")
	}
}
