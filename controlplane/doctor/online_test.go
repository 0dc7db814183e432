package doctor

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// live is a gateway where all is well.
type live struct {
	wg    wireguard.Status
	store store.Status
	snap  *routing.Snapshot
	g     Gateway
}

func newLive(t *testing.T) *live {
	t.Helper()
	l := &live{
		wg: wireguard.Status{Interface: "wg0", Mode: wireguard.Kernel, Reason: "the kernel has WireGuard", Up: true, Peers: 3, Applied: 3, InSync: true, Refreshed: now.Add(-4 * time.Second)},
		store: store.Status{Mode: store.Embedded, Connected: true, Writable: true, Since: now.Add(-time.Hour), Keys: 12, HasLeader: true, DBBytes: 20 << 20, DBUsedBytes: 1 << 20,
			BackupAt: now.Add(-time.Minute)},
		snap: routing.Empty(),
	}
	for i := range 6 {
		l.add(fmt.Sprintf("inst%d", i), time.Duration(i)*time.Minute)
	}
	l.snap = l.snap.WithBases([]*routing.Base{baseOf(t, "apps.example", now.Add(60*24*time.Hour))})
	l.g = Gateway{
		Version: "0.6.0", Started: now.Add(-50 * time.Hour), Now: func() time.Time { return now },
		WireGuard: func() wireguard.Status { return l.wg }, Store: func() store.Status { return l.store },
		Snapshot: func() *routing.Snapshot { return l.snap }, Mono: func() int64 { return int64(time.Hour) },
		Selection:   routing.Selection{TopN: 3, Stale: 30 * time.Minute, Penalty: 10 * time.Second},
		Connections: func() int64 { return 17 },
		Listeners: func() []Listener {
			return []Listener{{Name: "main", Address: "0.0.0.0:8010"}, {Name: "proxy", Address: "0.0.0.0:443"}}
		},
		PolicyFetches:    func() PolicyFetches { return PolicyFetches{InFlight: 1} },
		AccessLogDropped: func() uint64 { return 0 },
		Panics:           func() uint64 { return 0 },
		Capabilities: func() []Capability {
			return []Capability{{Name: "splice", On: true, Reason: "traffic decides"}, {Name: "kTLS", Reason: "core.proxy.ktls is not set"}}
		},
	}
	return l
}

func (l *live) add(id string, age time.Duration) {
	l.snap = l.snap.With([]routing.Record{{ID: id, AppID: "app", Addr: netip.MustParseAddr("10.8.0.2"), Policy: routing.Policy{Known: true}}}, nil)
	l.snap.Instance(id).State.Handshake.Store(now.Add(-age).Unix())
	if age < 0 {
		l.snap.Instance(id).State.Handshake.Store(0)
	}
}

func baseOf(t *testing.T, domain string, until time.Time) *routing.Base {
	t.Helper()
	c := tlsPair(t, until.Add(-90*24*time.Hour), until, "*."+domain)
	return &routing.Base{Domain: domain, Configured: true, TLS: &tls.Config{Certificates: []tls.Certificate{c}}}
}

func TestOnlineChecks(t *testing.T) {
	for _, tt := range []struct {
		name   string
		setup  func(*live)
		check  string
		status finding.Status
		says   string
		hint   string
	}{
		{name: "process", check: "process", status: finding.OK, says: "version 0.6.0, up for 2d, 17 connections open"},
		{name: "listeners", check: "listeners", status: finding.OK, says: "2 of 2"},
		{name: "listener down", setup: func(l *live) {
			l.g.Listeners = func() []Listener {
				return []Listener{{Name: "main", Address: "a"}, {Name: "control", Address: "b", Err: "path too long"}}
			}
		}, check: "listeners", status: finding.Fail, says: "not listening: control"},

		{name: "wireguard", check: "wireguard", status: finding.OK, says: "wg0 is up, kernel"},
		{name: "wireguard none", setup: func(l *live) { l.wg.Mode = wireguard.None }, check: "wireguard", status: finding.Skip},
		{name: "wireguard unmanaged", setup: func(l *live) { l.wg.Mode, l.wg.Reason = wireguard.Unmanaged, "it is a dummy" }, check: "wireguard", status: finding.Fail, says: "it is a dummy", hint: "ip link delete wg0"},
		{name: "wireguard down", setup: func(l *live) { l.wg.Up = false }, check: "wireguard", status: finding.Fail, says: "no app can be reached"},
		{name: "wireguard error", setup: func(l *live) { l.wg.LastError = "no buffer space" }, check: "wireguard", status: finding.Warn, says: "no buffer space"},
		{name: "wireguard slow and old", setup: func(l *live) { l.wg.Mode, l.wg.Refreshed = wireguard.Userspace, now.Add(-5*time.Minute) }, check: "wireguard", status: finding.Warn, says: "; the handshakes of wg0 were last read 5m ago", hint: "modprobe wireguard"},

		{name: "store", check: "store", status: finding.OK, says: "embedded, writable, 12 keys"},
		{name: "store without leader", setup: func(l *live) { l.store.Writable, l.store.HasLeader, l.store.Reason = false, false, "no quorum" }, check: "store", status: finding.Fail, says: "cannot be written since 2026-05-04T02:00:00Z: no quorum", hint: "majority"},
		{name: "store down", setup: func(l *live) { l.store.Writable, l.store.Connected = false, false }, check: "store", status: finding.Fail, says: "no reason given", hint: "data directory"},
		{name: "store alarm", setup: func(l *live) { l.store.Alarms = []string{"NOSPACE"} }, check: "store", status: finding.Fail, says: "NOSPACE", hint: "quota_bytes"},
		{name: "store volatile", setup: func(l *live) { l.store.Volatile, l.store.Pending = 2, 3 }, check: "store", status: finding.Fail, says: "2 registrations in memory only"},
		{name: "store undecodable", setup: func(l *live) { l.store.Undecodable = 1 }, check: "store", status: finding.Warn, says: "1 key cannot be read"},
		{name: "store backup", setup: func(l *live) { l.store.BackupError = "no space left" }, check: "store", status: finding.Warn, says: "backup.json cannot be written"},
		{name: "store moved", setup: func(l *live) { l.store.MovedAside = []string{"/data/store/db.bad"} }, check: "store", status: finding.Warn, says: "/data/store/db.bad"},
		{name: "store trouble of the past", setup: func(l *live) { l.store.LastError, l.store.LastErrorAt = "x", now.Add(-time.Hour) }, check: "store", status: finding.OK},

		{name: "certificates", check: "certificates", status: finding.OK, says: "1 base domain, each with a valid certificate"},
		{name: "no base domain", setup: func(l *live) { l.snap = l.snap.WithBases(nil) }, check: "certificates", status: finding.Warn, hint: "AddZtDomain"},
		{name: "certificate missing", setup: func(l *live) {
			l.snap = l.snap.WithBases([]*routing.Base{{Domain: "new.example", Configured: true}})
			l.g.CertificateNote = func(string) (string, bool) { return "DNS credential refused", false }
		}, check: "certificates", status: finding.Fail, says: "1 of 1 base domain without a usable certificate: new.example", hint: "RenewZtDomainCert"},
		{name: "certificate pending", setup: func(l *live) {
			l.snap = l.snap.WithBases([]*routing.Base{{Domain: "new.example", Configured: true}})
			l.g.CertificateNote = func(string) (string, bool) { return "being issued", true }
		}, check: "certificates", status: finding.Warn},
		{name: "certificate expired", setup: func(l *live) {
			l.snap = l.snap.WithBases([]*routing.Base{baseOf(t, "old.example", now.Add(-48*time.Hour)), baseOf(t, "apps.example", now.Add(60*24*time.Hour))})
		}, check: "certificates", status: finding.Fail, says: "1 of 2 base domains without a usable certificate: old.example"},
		{name: "certificate of tomorrow", setup: func(l *live) {
			l.snap = l.snap.WithBases([]*routing.Base{baseOf(t, "old.example", now.Add(91*24*time.Hour))})
		}, check: "certificates", status: finding.Fail},
		{name: "certificate ends", setup: func(l *live) {
			l.snap = l.snap.WithBases([]*routing.Base{baseOf(t, "old.example", now.Add(14*24*time.Hour))})
		}, check: "certificates", status: finding.Warn, says: "old.example should have been renewed"},

		{name: "instances", check: "instances", status: finding.OK, says: "6 of 6 instances had a WireGuard handshake in the last 30m"},
		{name: "no instance", setup: func(l *live) { l.snap = routing.Empty() }, check: "instances", status: finding.OK, says: "none is registered"},
		{name: "a stale one", setup: func(l *live) { l.add("inst0", time.Hour) }, check: "instances", status: finding.OK, says: "5 of 6"},
		{name: "a third stale", setup: func(l *live) { l.add("inst0", time.Hour); l.add("inst1", -1) }, check: "instances", status: finding.Warn, says: "4 of 6", hint: "dstack-gw explain"},
		{name: "all stale", setup: func(l *live) {
			for i := range 15 {
				l.add(fmt.Sprintf("inst%d", i), time.Duration(i)*time.Hour+31*time.Minute)
			}
		}, check: "instances", status: finding.Fail, says: "none of 15 instances", hint: "core.wg.endpoint"},

		{name: "policies", check: "port policies", status: finding.OK, says: "1 under way"},
		{name: "policies fail", setup: func(l *live) {
			l.g.PolicyFetches = func() PolicyFetches { return PolicyFetches{Failed: 3, Last: "inst1: connection refused"} }
		}, check: "port policies", status: finding.Warn, says: "3 times", hint: "agent_port"},
		{name: "access log", setup: func(l *live) { l.g.AccessLogDropped = func() uint64 { return 9 } }, check: "access log", status: finding.Warn, says: "9 lines"},
		{name: "panics", setup: func(l *live) { l.g.Panics = func() uint64 { return 1 } }, check: "panics", status: finding.Warn, hint: "bug"},
		{name: "features", check: "features", status: finding.OK, says: "1 of 2 are on"},
		{name: "feature wanted", setup: func(l *live) {
			l.g.Capabilities = func() []Capability {
				return []Capability{{Name: "kTLS", Wanted: true, Reason: "the kernel has no TLS ULP"}}
			}
		}, check: "features", status: finding.Warn, says: "configured but off: kTLS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLive(t)
			if tt.setup != nil {
				tt.setup(l)
			}
			for _, c := range Online(l.g) {
				if c.Name != tt.check {
					continue
				}
				r := c.Run(t.Context())
				if r.Status != tt.status || !strings.Contains(r.Text, tt.says) || !strings.Contains(hints(r), tt.hint) {
					t.Errorf("%+v; want %s, %q, hint %q", r, tt.status, tt.says, tt.hint)
				}
				return
			}
			t.Errorf("no check %q", tt.check)
		})
	}
}

func TestOnlineGolden(t *testing.T) {
	l := newLive(t)
	l.add("inst0", time.Hour)
	l.add("inst1", -1)
	l.store.Writable, l.store.Reason, l.store.Pending = false, "disk is full", 4
	l.snap = l.snap.WithBases([]*routing.Base{baseOf(t, "apps.example", now.Add(60*24*time.Hour)), baseOf(t, "old.example", now.Add(5*24*time.Hour)), {Domain: "new.example", Configured: true}})
	l.g.CertificateNote = func(d string) (string, bool) {
		return map[string]string{"new.example": "issuance failed 2m ago: 403 from the DNS provider"}[d], false
	}
	var text bytes.Buffer
	if err := fixed(Run(t.Context(), Online(l.g))).WriteText(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "online.txt", text.Bytes())
}

// Nil functions leave checks out instead of failing.
func TestOnlineParts(t *testing.T) {
	r := Run(t.Context(), Online(Gateway{Version: "x", Started: time.Now()}))
	if len(r.Checks) != 1 || r.ExitCode() != 0 {
		t.Errorf("%+v", r)
	}
}

func TestRun(t *testing.T) {
	check := func(name string, f func(ctx context.Context) Result) Check {
		return Check{Name: name, Group: GroupMachine, Run: f}
	}
	var checks []Check
	for i := range 30 {
		checks = append(checks, check(fmt.Sprint(i), func(context.Context) Result { return ok("%d", i) }))
	}
	checks = append(checks,
		Check{"first", GroupConfig, func(context.Context) Result { return ok("") }},
		check("panics", func(context.Context) Result { panic("boom") }),
		check("waits", func(ctx context.Context) Result { <-ctx.Done(); return warn("x", "gave up") }))
	r := run(t.Context(), checks, 50*time.Millisecond)
	if len(r.Checks) != 33 || r.Checks[0].Name != "first" || r.Checks[1].Text != "0" || r.Checks[30].Text != "29" || r.Status != finding.Fail {
		t.Errorf("%+v", r)
	}
	if p := find(r, "panics"); p.Status != finding.Fail || !strings.Contains(p.Text, "boom") || p.Details["stack"] == "" {
		t.Errorf("%+v", p)
	}
	if w := find(r, "waits"); w.Text != "gave up" {
		t.Errorf("%+v", w)
	}
}

// A check that does not even notice the end of its time costs itself only.
func TestRunHanging(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		began := time.Now()
		r := Run(t.Context(), []Check{
			{"hangs", GroupMachine, func(context.Context) Result { <-release; return ok("late") }},
			{"works", GroupMachine, func(context.Context) Result { return ok("fine") }},
		})
		if took := time.Since(began); took != checkTimeout+grace {
			t.Errorf("took %s", took)
		}
		if r.Checks[0].Status != finding.Fail || !strings.Contains(r.Checks[0].Text, "no result within 5s") || r.Checks[1].Text != "fine" {
			t.Errorf("%+v", r.Checks)
		}
		close(release)
	})
}

func TestHandler(t *testing.T) {
	l := newLive(t)
	started, release := make(chan struct{}, 1), make(chan struct{})
	slow := false
	l.g.Panics = func() uint64 {
		if slow {
			started <- struct{}{}
			<-release
		}
		return 0
	}
	h := Handler(l.g)
	get := func(method, accept string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, Path, nil)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	var r Report
	if w := get("GET", ""); w.Code != 200 || json.Unmarshal(w.Body.Bytes(), &r) != nil || r.Status != finding.OK || len(r.Checks) != 10 {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if w := get("GET", "text/plain"); !strings.Contains(w.Body.String(), "Fine: 10 checks.") {
		t.Errorf("%s", w.Body)
	}
	if w := get("PUT", ""); w.Code != 405 {
		t.Errorf("PUT: %d", w.Code)
	}
	slow = true
	done := make(chan int)
	go func() { done <- get("GET", "").Code }()
	<-started
	if w := get("GET", ""); w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("second at the same time: %d", w.Code)
	}
	close(release)
	if code := <-done; code != 200 {
		t.Errorf("first: %d", code)
	}
}

func TestRunCLI(t *testing.T) {
	h := machineOf(t)
	l := newLive(t)
	// The gateway sees what the command does not: it lives in another namespace.
	inside := machineOf(t)
	inside.put("proc/sys/net/core/somaxconn", "128")
	l.g.Config, l.g.Host = configOf(t, base), inside
	socket := filepath.Join(t.TempDir(), "control.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(Path, Handler(l.g))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) })
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { srv.Serve(ln); close(done) }()
	defer func() { srv.Close(); <-done }()

	cli := func(c CLI) (int, string, *Report) {
		var out bytes.Buffer
		c.Out, c.Host = &out, h
		code := RunCLI(t.Context(), c)
		r := new(Report)
		if c.JSON {
			if err := json.Unmarshal(out.Bytes(), r); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
		}
		return code, out.String(), r
	}

	code, _, r := cli(CLI{Setup: setup(t, base), Socket: socket, JSON: true})
	if code != 1 || find(r, "accept queue").Status != finding.Warn || find(r, "gateway").Status != finding.OK || find(r, "store") == nil || find(r, "ports") == nil {
		t.Errorf("exit %d, %+v", code, r)
	}
	seen := map[string]int{}
	for i, c := range r.Checks {
		seen[c.Name]++
		if i > 0 && c.Group == GroupConfig && r.Checks[i-1].Group != GroupConfig {
			t.Error("groups are not together")
		}
	}
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s is there %d times", name, n)
		}
	}

	// Nobody there: the machine alone, and that is no fault.
	code, _, r = cli(CLI{Setup: setup(t, base), Socket: socket + "x", JSON: true})
	if g := find(r, "gateway"); code != 0 || g.Status != finding.Skip || !strings.Contains(g.Text, "no gateway answers") || find(r, "store") != nil {
		t.Errorf("exit %d, %+v", code, r)
	}
	// Somebody else there.
	mux2 := &http.Server{Handler: http.NotFoundHandler()}
	other := filepath.Join(t.TempDir(), "s")
	ln2, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	done2 := make(chan struct{})
	go func() { mux2.Serve(ln2); close(done2) }()
	defer func() { mux2.Close(); <-done2 }()
	code, _, r = cli(CLI{Setup: setup(t, base), Socket: other, JSON: true})
	if g := find(r, "gateway"); code != 1 || g.Status != finding.Warn || !strings.Contains(g.Text, "404") {
		t.Errorf("exit %d, %+v", code, g)
	}
	// No configuration.
	code, text, _ := cli(CLI{Setup: setup(t, "[tls\n")})
	if code != 2 || !strings.Contains(text, "does not load") || !strings.Contains(text, "without a configuration its control socket is not known") {
		t.Errorf("exit %d\n%s", code, text)
	}
	code, text, _ = cli(CLI{Setup: setup(t, base), Socket: socket + "x", Style: finding.Style{Color: true}})
	if code != 0 || !strings.Contains(text, "\x1b[32mFine:") {
		t.Errorf("exit %d\n%s", code, text)
	}
}
