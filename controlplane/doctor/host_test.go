package doctor

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
)

func TestAskResolver(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var rcode atomic.Int32
	var recurses atomic.Bool
	up, done := make(chan struct{}), make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(up) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetRcode(q, int(rcode.Load()))
		m.RecursionAvailable = recurses.Load()
		_ = w.WriteMsg(m)
	})}
	go func() { _ = srv.ActivateAndServe(); close(done) }()
	<-up
	defer func() { _ = srv.Shutdown(); <-done }()
	at := netip.MustParseAddrPort(pc.LocalAddr().String())
	for _, tt := range []struct {
		rcode    int
		recurses bool
		err      string
	}{
		{dns.RcodeSuccess, true, ""}, {dns.RcodeNameError, true, ""}, {dns.RcodeRefused, true, "REFUSED"}, {dns.RcodeServerFailure, true, "SERVFAIL"},
		{dns.RcodeSuccess, false, "does not recurse"},
	} {
		rcode.Store(int32(tt.rcode))
		recurses.Store(tt.recurses)
		err := askResolver(t.Context(), at)
		if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%+v: %v", tt, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if askResolver(ctx, at) == nil {
		t.Error("asked after the end of the context")
	}
}

func TestTryWrite(t *testing.T) {
	dir := t.TempDir()
	if err := tryWrite(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := tryWrite(filepath.Join(dir, "none")); err == nil || strings.Contains(err.Error(), dir) {
		t.Errorf("%v", err) // the caller names the directory
	}
}

func TestSpace(t *testing.T) {
	s, err := space(t.TempDir())
	if err != nil || s.Total == 0 || s.Free > s.Total {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := space("/nonexistent"); err == nil {
		t.Error("space of nothing")
	}
}

// Relative paths are relative to the working directory, as the gateway's own.
func TestPaths(t *testing.T) {
	h := &Host{WorkDir: "/srv/dir"}
	for in, want := range map[string]string{"/a/b": "a/b", "a": "srv/dir/a", "../a": "srv/a", "/": ".", "/a/../..": "."} {
		if got := h.in(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
