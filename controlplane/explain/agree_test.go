package explain

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// hooks connect a real data plane with the fake world.
type hooks struct {
	w      *world
	closed chan dataplane.Record
}

func (h *hooks) CachedCustom(name string) (string, uint16, error, bool) { return "", 0, nil, false }
func (h *hooks) ResolveCustom(ctx context.Context, name string) (string, uint16, error) {
	a, err := h.w.Resolve(ctx, name)
	return a.ID, a.Port, err
}
func (h *hooks) NeedPolicy(string) {}
func (h *hooks) ServeBuiltin(_ hostname.Service, _ hostname.Mode, _ *routing.Base, c net.Conn) {
	c.Close()
}
func (h *hooks) Closed(r *dataplane.Record) { h.closed <- *r }

// TestAgreesWithDataplane asks a real data plane and compares what it did with what
// the report said it would do.
func TestAgreesWithDataplane(t *testing.T) {
	// An app that takes connections, and a port where nobody listens.
	app, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	go func() {
		for {
			c, err := app.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	port := app.Addr().(*net.TCPAddr).Port
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closedPort := free.Addr().(*net.TCPAddr).Port
	free.Close()

	w := newWorld(t)
	loopback := netip.MustParseAddr("127.0.0.1")
	policy := routing.Policy{Known: true, Restrict: true, Ports: map[uint16]bool{uint16(port): false, uint16(closedPort): false}}
	w.snap = w.snap.With([]routing.Record{
		{ID: instP, AppID: appP, Addr: loopback, Policy: policy},
		{ID: instU, AppID: appU, Addr: loopback},
		{ID: instS, AppID: appS, Addr: loopback, Policy: policy},
		{ID: instB, AppID: "full", Addr: loopback, Policy: policy},
	}, []string{instA, instC})
	unix := time.Now().Unix()
	for _, id := range []string{instP, instU, instB} {
		w.snap.Instance(id).State.Handshake.Store(unix)
	}
	w.snap.App("full").State.Active.Store(2000)
	// As good as now to clients that look at the real clock.
	w.bases(w.base("gw.example", time.Now().Add(60*24*time.Hour)), &routing.Base{Domain: "new.example", Configured: true})
	w.custom("good.example", instP, uint16(port))
	w.custom("gone.example", "gone", 443)
	w.resolved["bad.example"] = resolved{err: customdomain.ErrMalformed}

	h := &hooks{w: w, closed: make(chan dataplane.Record, 16)}
	probe, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(probe.Addr().String())
	probe.Close()
	srv, err := dataplane.New(dataplane.Options{
		Logger: slog.New(slog.DiscardHandler), Hooks: h, Listen: []netip.AddrPort{at}, Workers: 1, Selection: w.deps.Selection,
		HeadStart: 100 * time.Millisecond, MaxPerApp: 2000, Handshake: 2 * time.Second, Resolve: 2 * time.Second, Connect: 2 * time.Second, PolicyHold: 50 * time.Millisecond,
		Splice: relay.Gate{Off: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	srv.SetSnapshot(w.snap)
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	w.deps.Snapshot, w.deps.Mono = srv.Snapshot, srv.Mono
	w.deps.Now, w.deps.Dial, w.deps.LookupTXT = time.Now, nil, nil
	w.deps.Listeners = []netip.AddrPort{at}

	label := func(id string, port int, suffix string) string {
		return fmt.Sprintf("%s-%d%s.gw.example", id, port, suffix)
	}
	for _, name := range []string{
		label(appP, port, ""), label(instP, port, ""), label(instP, port, "s"), label(instP, port, "g"),
		"good.example", "gone.example", "bad.example", "none.example", "gw.example", "www.deep.gw.example",
		label(appP, 22, ""), label(instP, 22, "s"), label(appP, closedPort, ""), label(instP, closedPort, "s"),
		label(appU, port, ""), label(appS, port, "s"), label(instS, port, ""), label("nobody", port, ""), label("full", port, ""),
		label(appP, 0, ""), label(appP, port, "gs"), label(appP, port, "sg"), label(appP, port, "-1"), "-80.gw.example",
		"gateway-81.gw.example", "health-8080.gw.example", "gateway-80s.gw.example", "localhost-80.gw.example",
		appP + "-" + fmt.Sprint(port) + ".new.example", appP + "-" + fmt.Sprint(port) + "s.new.example",
	} {
		c, err := net.Dial("tcp4", at.String())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		tc := tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true})
		_ = tc.Handshake() // how it ends is what the record tells
		c.Close()
		var rec dataplane.Record
		select {
		case rec = <-h.closed:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the data plane did not close the connection", name)
		}
		r := w.explain(name)
		did := "served"
		if !rec.Reason.Served() {
			did = rec.Reason.String()
		}
		said := r.Reason
		if r.Outcome == Served || r.Outcome == Broken {
			said = "served" // what the app does is not the gateway's doing
		}
		if did != said {
			t.Errorf("%s: the data plane did %s (%v), explain said %s (%s)", name, did, rec.Detail, said, r.Verdict)
		}
	}
}
