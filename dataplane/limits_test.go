package dataplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/loop/looptest"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// max_connections_per_app holds exactly: never one more, and never one less while
// connections come and go on all loops.
func TestMaxPerAppIsExact(t *testing.T) {
	for _, suffix := range []string{"", "s"} {
		t.Run("suffix "+suffix, func(t *testing.T) {
			const limit = 20
			r := newRig(t, func(o *Options) { o.MaxPerApp = limit; o.Handshake = 20 * time.Second })
			var now, most atomic.Int64
			port := backend(t, "127.0.0.1:0", func(c net.Conn) {
				n := now.Add(1)
				defer now.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				_, _ = io.Copy(io.Discard, c)
			})
			r.instance("i1", testApp, "127.0.0.1", open)
			name := fmt.Sprintf("%s-%d%s.%s", testApp, port, suffix, testBase)
			hello := recordHello(t, name, nil)
			dial := func() net.Conn {
				raw, err := net.Dial("tcp", r.addr)
				if err != nil {
					t.Error(err)
					return nil
				}
				if suffix == "s" {
					_, _ = raw.Write(hello)
					return raw
				}
				c := tls.Client(raw, &tls.Config{ServerName: name, RootCAs: r.pool})
				_ = c.Handshake()
				return c
			}
			var wg sync.WaitGroup
			var mu sync.Mutex
			var conns []net.Conn
			for range 3 * limit {
				wg.Go(func() {
					if c := dial(); c != nil {
						mu.Lock()
						conns = append(conns, c)
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			app := r.Snapshot().App(testApp)
			looptest.Wait(t, "all are decided", func() bool { return len(r.hooks.ended) == 2*limit })
			if n := app.State.Active.Load(); n != limit {
				t.Errorf("%d connections of %d asked for, limit %d", n, 3*limit, limit)
			}
			for range 2 * limit {
				if rec := r.waitEnd(); rec.Reason != ReasonAppLimit {
					t.Errorf("refused for %s", rec.Reason)
				}
			}
			looptest.Wait(t, "the app sees them", func() bool { return now.Load() == limit })
			if n := most.Load(); n > limit {
				t.Errorf("the app had %d connections at a time", n)
			}
			for _, c := range conns {
				c.Close()
			}
			r.quiet()

			// One less than the limit, then one after the other: nobody is refused.
			for len(r.hooks.ended) > 0 {
				r.waitEnd()
			}
			conns = conns[:0]
			for range limit - 1 {
				conns = append(conns, dial())
			}
			looptest.Wait(t, "they are counted", func() bool { return app.State.Active.Load() == limit-1 })
			for range 20 {
				c := dial()
				looptest.Wait(t, "it is counted", func() bool { return app.State.Active.Load() == limit })
				c.Close()
				if rec := r.waitEnd(); rec.Reason == ReasonAppLimit {
					t.Error("refused below the limit")
				}
			}
			for _, c := range conns {
				c.Close()
			}
			r.quiet()
		})
	}
}

// Clients that drag out their handshakes do not take an app's connections away.
func TestHandshakesDoNotCountForTheApp(t *testing.T) {
	r := newRig(t, func(o *Options) { o.MaxPerApp = 1; o.Handshake = 20 * time.Second })
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	name := fmt.Sprintf("%s-%d.%s", testApp, port, testBase)
	hello := recordHello(t, name, nil)
	for range 5 {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil { // the server's flight has begun
			t.Fatal(err)
		}
	}
	c, err := r.dialTLS(name, nil)
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, c, 100)
}

func TestHalfOpenLimits(t *testing.T) {
	t.Parallel()
	silent := func(t *testing.T, addr, source string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := c.Write([]byte{22, 3, 1}); err != nil {
			t.Fatal(err)
		}
		return c
	}
	refused := func(c net.Conn) bool {
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, err := c.Read(make([]byte, 1))
		ne, ok := err.(net.Error)
		return !ok || !ne.Timeout()
	}
	t.Run("per source", func(t *testing.T) {
		const limit = 7 // on any number of loops
		r := newRig(t, func(o *Options) { o.MaxHalfOpenPeer = limit; o.Workers = 4; o.Handshake = 20 * time.Second })
		var conns []net.Conn
		for range limit {
			conns = append(conns, silent(t, r.addr, "127.0.0.1"))
		}
		looptest.Wait(t, "all are counted", func() bool { return r.half.total.Load() == limit })
		if !refused(silent(t, r.addr, "127.0.0.1")) {
			t.Error("one more than the limit was let in")
		}
		if rec := r.waitEnd(); rec.Reason != ReasonOverload {
			t.Errorf("refused for %s", rec.Reason)
		}
		other := silent(t, r.addr, "127.0.0.9")
		if refused(other) {
			t.Error("another source was refused")
		}
		conns[0].Close()
		looptest.Wait(t, "one is gone", func() bool { return r.half.total.Load() == limit })
		if refused(silent(t, r.addr, "127.0.0.1")) {
			t.Error("refused below the limit")
		}
	})
	t.Run("total", func(t *testing.T) {
		const limit = 10
		r := newRig(t, func(o *Options) { o.MaxHalfOpen = limit; o.Workers = 4; o.Handshake = 20 * time.Second })
		port := backend(t, "127.0.0.1:0", echo)
		r.instance("i1", testApp, "127.0.0.1", open)
		for i := range limit {
			silent(t, r.addr, fmt.Sprintf("127.0.0.%d", 1+i))
		}
		looptest.Wait(t, "all are counted", func() bool { return r.half.total.Load() == limit })
		for range 5 {
			if !refused(silent(t, r.addr, "127.0.0.99")) {
				t.Error("one more than the limit was let in")
			}
		}
		// A hello that comes at once is never half-open.
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c, 100)
	})
	t.Run("behind a proxy", func(t *testing.T) {
		r := newRig(t, func(o *Options) { o.MaxHalfOpenPeer = 1; o.InboundPROXY = true; o.PPHeader = 20 * time.Second })
		for range 3 {
			c := silent(t, r.addr, "127.0.0.1") // 22 is no PROXY header
			if !refused(c) {
				t.Error("TLS without a PROXY header was let in")
			}
			if rec := r.waitEnd(); rec.Reason != ReasonPPHeader {
				t.Errorf("refused for %s", rec.Reason)
			}
		}
		var conns []net.Conn
		for range 3 {
			c, err := net.Dial("tcp", r.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, "PROXY TCP4")
			conns = append(conns, c)
		}
		for _, c := range conns {
			if refused(c) {
				t.Error("the proxy's own address was limited")
			}
		}
	})
}

func TestHalfOpenSources(t *testing.T) {
	h := newHalfOpen(0, 2)
	in := func(a string) bool { return h.enter(netip.MustParseAddr(a)) }
	for _, tc := range []struct {
		addr string
		want bool
	}{
		{"10.0.0.1", true}, {"::ffff:10.0.0.1", true}, {"10.0.0.1", false}, // the same source
		{"2001:db8:0:1::1", true}, {"2001:db8:0:1:2:3:4:5", true}, {"2001:db8:0:1::9", false}, // one /64
		{"2001:db8:0:2::1", true},
	} {
		if got := in(tc.addr); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.addr, got, tc.want)
		}
	}
	h.leave(netip.MustParseAddr("10.0.0.1"))
	if !in("10.0.0.1") || in("10.0.0.1") {
		t.Error("a place that became free was not given away once")
	}
	if n := h.total.Load(); n != 5 {
		t.Errorf("total %d, want 5", n)
	}
}

// Concurrent takers never exceed the limit and leave no place unused.
func TestTakeBelow(t *testing.T) {
	var n, got atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				if takeBelow(&n, 500) {
					got.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n.Load() != 500 || got.Load() != 500 {
		t.Errorf("%d places taken by %d", n.Load(), got.Load())
	}
}

// blackhole occupies addr:port with a listener that answers no SYN: its queue is full.
func blackhole(t *testing.T, addr string, port uint16) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	sa := &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4(), Port: int(port)}
	if err := unix.Bind(fd, sa); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 4 { // one or two fit; the others are never answered
		c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(c) })
		if err := unix.Connect(c, sa); err != nil && err != unix.EINPROGRESS {
			t.Fatal(err)
		}
	}
	time.Sleep(20 * time.Millisecond)
	d := net.Dialer{Timeout: 200 * time.Millisecond}
	if c, err := d.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(addr), port).String()); err == nil {
		c.Close()
		t.Fatal("the black hole answers")
	}
}

// An instance that answers nothing costs the connection that finds out one head
// start; the next ones try it last.
func TestSilentInstanceIsSkipped(t *testing.T) {
	const headStart = time.Second // far above what a busy machine adds
	r := newRig(t, func(o *Options) { o.HeadStart = headStart; o.Connect = 5 * time.Second })
	port := backend(t, "127.0.0.3:0", echo)
	blackhole(t, "127.0.0.2", port)
	r.instance("live", testApp, "127.0.0.3", open)
	r.instance("silent", testApp, "127.0.0.2", open)
	silent := r.Snapshot().Instance("silent")
	live := r.Snapshot().Instance("live")
	live.State.Active.Add(1) // the silent one looks idle and is chosen first
	defer live.State.Active.Add(-1)
	for i := range 10 {
		begin := time.Now()
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c, 10)
		d := time.Since(begin)
		c.Close()
		if rec := r.waitEnd(); rec.Instance != "live" {
			t.Errorf("record %+v", rec)
		}
		switch {
		case i == 0 && (d < headStart || d > headStart+2*time.Second):
			t.Errorf("the first connection took %s", d)
		case i > 0 && d > headStart:
			t.Errorf("connection %d took %s although the silent instance is known", i, d)
		}
	}
	if silent.State.FailedAt.Load() == 0 || live.State.FailedAt.Load() != 0 {
		t.Error("the wrong instance is remembered as slow")
	}
	if n := silent.State.Active.Load(); n != 0 {
		t.Errorf("the silent instance keeps %d connections", n)
	}
}

// With nothing but silence the connection fails at the connect limit, whatever the
// number of candidates and the head start.
func TestAllInstancesSilent(t *testing.T) {
	t.Parallel()
	for _, headStart := range []time.Duration{0, 100 * time.Millisecond, time.Minute} {
		t.Run(headStart.String(), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(o *Options) { o.HeadStart, o.Connect = headStart, 700*time.Millisecond })
			port := freePort(t)
			for i := range 3 {
				addr := fmt.Sprintf("127.0.1.%d", 1+i)
				blackhole(t, addr, port)
				r.instance(fmt.Sprint(i), testApp, addr, open)
			}
			c, _ := r.passthrough(port)
			begin := time.Now()
			if b, err := io.ReadAll(c); len(b) > 0 {
				t.Errorf("got %d bytes, %v", len(b), err)
			}
			if d := time.Since(begin); d < 600*time.Millisecond || d > 2*time.Second {
				t.Errorf("took %s", d)
			}
			if rec := r.waitEnd(); rec.Reason != ReasonDial {
				t.Errorf("recorded as %s, %v", rec.Reason, rec.Detail)
			}
			r.quiet()
		})
	}
}

// A head start of nothing tries all at once.
func TestNoHeadStart(t *testing.T) {
	r := newRig(t, func(o *Options) { o.HeadStart = 0; o.Connect = 5 * time.Second })
	port := backend(t, "127.0.0.3:0", echo)
	blackhole(t, "127.0.0.2", port)
	r.instance("live", testApp, "127.0.0.3", open)
	r.instance("silent", testApp, "127.0.0.2", open)
	live := r.Snapshot().Instance("live")
	live.State.Active.Add(1)
	defer live.State.Active.Add(-1)
	c, hello := r.passthrough(port)
	begin := time.Now()
	got := make([]byte, len(hello))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != string(hello) {
		t.Fatalf("echo of the hello: %v", err)
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("took %s", d)
	}
	if r.Snapshot().Instance("silent").State.FailedAt.Load() != 0 {
		t.Error("an instance that lost the race at once is taken for slow")
	}
}

// An instance that works again is as good as any other.
func TestSuccessClearsFailure(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	s := r.Snapshot().Instance("i1").State
	s.FailedAt.Store(r.Mono())
	c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, c, 10)
	if s.FailedAt.Load() != 0 {
		t.Error("the failure is still remembered")
	}
}

// Instances whose policy nobody knows must not keep one that may be used from being
// used: unused as they are, they look least busy.
func TestUnknownPoliciesDoNotStarveTheApp(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.9:0", echo)
	for i := range 5 {
		r.instance(fmt.Sprintf("unknown%d", i), testApp, fmt.Sprintf("127.0.0.%d", 10+i), routing.Policy{})
	}
	r.instance("good", testApp, "127.0.0.9", open)
	r.Snapshot().Instance("good").State.Active.Add(1)
	defer r.Snapshot().Instance("good").State.Active.Add(-1)
	for range 10 {
		begin := time.Now()
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c, 10)
		c.Close()
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("took %s", d)
		}
	}
}

// A custom domain that names an instance goes to that instance, also after it was
// held for the policy.
func TestHeldCustomDomainKeepsItsInstance(t *testing.T) {
	r := newRig(t, nil)
	whoami := func(name string) func(net.Conn) {
		return func(c net.Conn) { _, _ = io.WriteString(c, name); _, _ = io.Copy(io.Discard, c) }
	}
	port := backend(t, "127.0.0.2:0", whoami("wrong"))
	backend(t, fmt.Sprintf("127.0.0.3:%d", port), whoami("right"))
	r.instance("wrong", testApp, "127.0.0.2", open)
	r.instance("right", testApp, "127.0.0.3", routing.Policy{})
	r.hooks.mu.Lock()
	r.hooks.custom["www.shop.example"], r.hooks.port = "right", port
	r.hooks.policy = func(string) {
		go func() {
			time.Sleep(50 * time.Millisecond)
			r.instance("right", testApp, "127.0.0.3", open)
		}()
	}
	r.hooks.mu.Unlock()
	for range 6 {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(recordHello(t, "www.shop.example", nil)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 5)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "right" {
			t.Fatalf("got %q, %v", b, err)
		}
		r.SetSnapshot(r.Snapshot().With([]routing.Record{{ID: "right", AppID: testApp, Addr: netip.MustParseAddr("127.0.0.3")}}, nil))
	}
}

// Snapshots that come at any moment around a held connection never leave it waiting.
func TestPolicyHoldRace(t *testing.T) {
	r := newRig(t, func(o *Options) { o.PolicyHold = 20 * time.Second; o.Connect = 20 * time.Second })
	port := backend(t, "127.0.0.1:0", echo)
	put := func(known bool) {
		r.SetSnapshot(r.Snapshot().With([]routing.Record{{ID: "i1", AppID: testApp, Addr: loopback, Policy: routing.Policy{Known: known}}}, nil))
	}
	put(false)
	r.Snapshot().Instance("i1").State.Handshake.Store(time.Now().Unix())
	need := make(chan struct{}, 1)
	r.hooks.mu.Lock()
	r.hooks.policy = func(string) {
		select {
		case need <- struct{}{}:
		default:
		}
	}
	r.hooks.mu.Unlock()
	hello := recordHello(t, fmt.Sprintf("%s-%ds.%s", testApp, port, testBase), nil)
	for i := range 300 {
		put(false)
		for len(need) > 0 {
			<-need
		}
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(hello); err != nil {
			t.Fatal(err)
		}
		<-need // the loop is between its look at the snapshot and the hold
		if i%3 == 0 {
			time.Sleep(time.Duration(i) * time.Microsecond)
		}
		put(true)
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		c.Close()
	}
	r.quiet()
}

// A snapshot that comes from within the question for the policy, the narrowest moment
// there is, is not missed.
func TestPolicyHoldSeesASnapshotOfTheHook(t *testing.T) {
	r := newRig(t, func(o *Options) { o.PolicyHold = 20 * time.Second })
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", routing.Policy{})
	known := r.Snapshot().With([]routing.Record{{ID: "i1", AppID: testApp, Addr: loopback, Policy: open}}, nil)
	r.hooks.mu.Lock()
	r.hooks.policy = func(string) { r.SetSnapshot(known) }
	r.hooks.mu.Unlock()
	c, hello := r.passthrough(port)
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, len(hello))); err != nil {
		t.Error(err)
	}
}

// stuckHooks never come back by themselves.
type stuckHooks struct {
	testHooks
	lookups, builtins atomic.Int64
}

func (h *stuckHooks) ResolveCustom(ctx context.Context, _ string) (string, uint16, error) {
	h.lookups.Add(1)
	<-ctx.Done()
	return "", 0, ctx.Err()
}

func (h *stuckHooks) ServeBuiltin(_ hostname.Service, _ hostname.Mode, _ *routing.Base, c net.Conn) {
	h.builtins.Add(1)
	_, _ = io.Copy(io.Discard, c)
}

// Close ends connections in every state, at once, and waits for nothing outside.
func TestCloseInEveryState(t *testing.T) {
	h := &stuckHooks{testHooks: testHooks{ended: make(chan Record, 64)}}
	r := newRig(t, func(o *Options) {
		o.Hooks = h
		o.Resolve, o.Handshake, o.Connect, o.PolicyHold = time.Hour, time.Hour, time.Hour, time.Hour
	})
	port, apps := handover(t, "127.0.0.1:0")
	blackhole(t, "127.0.0.2", port)
	r.instance("i1", testApp, "127.0.0.1", open)
	r.instance("silent", strings.Repeat("b", 40), "127.0.0.2", open)
	r.instance("unknown", strings.Repeat("c", 40), "127.0.0.1", routing.Policy{})
	send := func(name string) net.Conn {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		b := []byte{22, 3}
		if name != "" {
			b = recordHello(t, name, nil)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		return c
	}
	conns := []net.Conn{
		send(""),                    // reading the hello
		send("www.shop.example"),    // asking DNS
		send("gateway." + testBase), // handed over
		send(fmt.Sprintf("%s-%ds.%s", strings.Repeat("c", 40), port, testBase)), // waiting for a policy
		send(fmt.Sprintf("%s-%d.%s", testApp, port, testBase)),                  // TLS handshake
		send(fmt.Sprintf("%s-%ds.%s", strings.Repeat("b", 40), port, testBase)), // dialling
		send(fmt.Sprintf("%s-%ds.%s", testApp, port, testBase)),                 // relaying
	}
	<-apps
	looptest.Wait(t, "all are where they should be", func() bool {
		return h.lookups.Load() == 1 && h.builtins.Load() == 1 && r.held.Load() == 1 && r.Connections() == int64(len(conns)-1) &&
			r.Snapshot().Instance("silent").State.Active.Load() == 1 && r.half.total.Load() == 1
	})
	begin := time.Now()
	r.Close()
	if d := time.Since(begin); d > time.Second {
		t.Errorf("Close took %s", d)
	}
	r.Close()
	r.StopAccepting()
	r.SetSnapshot(r.Snapshot())
	r.quiet()
	for i, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil && !isReset(err) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}

func isReset(err error) bool { return errors.Is(err, syscall.ECONNRESET) }

// A server that never starts, and one that cannot, leave nothing behind.
func TestCloseWithoutStart(t *testing.T) {
	before := looptest.Descriptors(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	for _, start := range []bool{false, true} {
		h := &testHooks{ended: make(chan Record, 1)}
		s, err := New(Options{Logger: discard, Hooks: h, Workers: 3, Listen: []netip.AddrPort{netip.AddrPortFrom(loopback, freePort(t)), netip.MustParseAddrPort(taken.Addr().String())}})
		if err != nil {
			t.Fatal(err)
		}
		if start {
			if err := s.Start(); err == nil || !strings.Contains(err.Error(), "another process") {
				t.Errorf("start on a taken port: %v", err)
			}
		}
		s.StopAccepting()
		s.Close()
		if err := s.Start(); err == nil {
			t.Error("a closed server starts")
		}
	}
	taken.Close()
	if after := looptest.Descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
