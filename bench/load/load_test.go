package load_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/backend"
	"github.com/dstack-gw/dstack-gw/bench/cpu"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const name = "app-443s.bench.test"

func startBackend(t *testing.T) (*backend.Server, backend.Addrs) {
	t.Helper()
	any := netip.MustParseAddrPort("127.0.0.1:0")
	s, err := backend.Start(backend.Addrs{RequestPassthrough: any, BulkPassthrough: any, RequestPlain: any, BulkPlain: any})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, s.Addrs()
}

// relay forwards connections to a backend. With cfg it terminates TLS; damage may change what flows to the client.
func relay(t *testing.T, to netip.AddrPort, cfg *tls.Config, damage func(b []byte) []byte) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if damage == nil {
		damage = func(b []byte) []byte { return b }
	}
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	closed := false
	track := func(c net.Conn) {
		mu.Lock()
		defer mu.Unlock()
		open[c] = true
		if closed {
			c.Close()
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			track(c)
			wg.Go(func() {
				defer c.Close()
				app, err := net.Dial("tcp4", to.String())
				if err != nil {
					return
				}
				track(app)
				defer app.Close()
				client := c
				if cfg != nil {
					client = tls.Server(c, cfg)
				}
				wg.Go(func() {
					io.Copy(app, client)
					app.(*net.TCPConn).CloseWrite()
				})
				buf := make([]byte, 32<<10)
				for {
					n, err := app.Read(buf)
					if n > 0 {
						if _, err := client.Write(damage(buf[:n])); err != nil {
							return
						}
					}
					if err != nil {
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		closed = true
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func spec(kind load.Kind, to netip.AddrPort, conns int) load.Spec {
	return load.Spec{
		Kind: kind, Addr: to, Name: name, Conns: conns, Warmup: 10 * time.Millisecond, Duration: 60 * time.Millisecond,
		Groups: cpu.Groups{Bench: os.Getpid(), Client: os.Getpid()},
	}
}

func TestPassthrough(t *testing.T) {
	s, at := startBackend(t)
	for _, pq := range []bool{false, true} {
		for _, c := range []load.Spec{
			spec(load.Requests, at.RequestPassthrough, 1),
			spec(load.Requests, at.RequestPassthrough, 20),
			spec(load.Setup, at.RequestPassthrough, 1),
			spec(load.Setup, at.RequestPassthrough, 20),
		} {
			c.PostQuantum = pq
			res, err := load.Run(context.Background(), c, nil)
			if err != nil {
				t.Fatalf("%+v: %v", c, err)
			}
			w := res.Windows[0]
			if w.Count == 0 || w.P50 <= 0 || w.P99 < w.P50 || w.Max < w.P99 || w.Usage.Wall < 0.06 {
				t.Errorf("%s with %d connections: implausible %+v", c.Kind, c.Conns, w)
			}
		}
	}
	if err := s.Errors(); err != nil {
		t.Error(err)
	}
}

func TestWindows(t *testing.T) {
	_, at := startBackend(t)
	c := spec(load.Requests, at.RequestPassthrough, 2)
	c.Windows = []string{"a", "b"}
	var called []string
	res, err := load.Run(context.Background(), c, func(w string) error { called = append(called, w); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Windows) != 2 || res.Windows[0].Name != "a" || res.Windows[1].Name != "b" || strings.Join(called, "") != "b" {
		t.Errorf("windows %+v, announced %q", res.Windows, called)
	}
	boom := errors.New("boom")
	if _, err := load.Run(context.Background(), c, func(string) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("error of the announcement: %v", err)
	}
}

func TestBulk(t *testing.T) {
	s, at := startBackend(t)
	for _, dir := range []wire.Direction{wire.Down, wire.Up, wire.Duplex} {
		c := spec(load.Bulk, at.BulkPassthrough, 3)
		c.Direction = dir
		res, err := load.Run(context.Background(), c, nil)
		if err != nil {
			t.Fatalf("direction %d: %v", dir, err)
		}
		if w := res.Windows[0]; w.Bytes < 3*wire.QuantumSize || w.Bytes%wire.QuantumSize != 0 || w.Count != 3 {
			t.Errorf("direction %d: %+v", dir, w)
		}
	}
	c := spec(load.Bulk, at.BulkPassthrough, 4)
	c.Direction, c.HalfClose = wire.Duplex, true
	if _, err := load.Run(context.Background(), c, nil); err != nil {
		t.Errorf("half-close: %v", err)
	}
	if err := s.Errors(); err != nil {
		t.Error(err)
	}
}

func TestIdle(t *testing.T) {
	s, at := startBackend(t)
	res, err := load.Run(context.Background(), spec(load.Idle, at.RequestPassthrough, 200), nil)
	if err != nil {
		t.Fatal(err)
	}
	if w := res.Windows[0]; w.Count != 200 || w.RSS != 0 {
		t.Errorf("got %+v", w)
	}
	if err := s.Errors(); err != nil {
		t.Error(err)
	}
}

// Every name is announced before its clock starts, and one that nobody serves is an error in time.
func TestReachable(t *testing.T) {
	_, at := startBackend(t)
	var mu sync.Mutex
	announced := map[string]time.Time{}
	c := spec(load.Reachable, at.RequestPassthrough, 1)
	c.Duration = 5 * time.Second
	c.Windows = []string{"one.test", "two.test", "three.test"}
	res, err := load.Run(context.Background(), c, func(w string) error {
		mu.Lock()
		defer mu.Unlock()
		announced[w] = time.Now()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if w := res.Windows[0]; w.Count != 3 || w.P50 <= 0 || w.Max > 1e6 || len(announced) != 3 {
		t.Errorf("got %+v after %d announcements", w, len(announced))
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.Addr = l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	c.Duration = 30 * time.Millisecond
	if _, err := load.Run(context.Background(), c, func(string) error { return nil }); err == nil {
		t.Error("a name nobody serves was reached")
	}
}

func TestTerminated(t *testing.T) {
	s, at := startBackend(t)
	cert, err := arm.NewCertificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert.Chain, cert.Key)
	if err != nil {
		t.Fatal(err)
	}
	server := &tls.Config{Certificates: []tls.Certificate{pair}}
	requests, bulk := relay(t, at.RequestPlain, server, nil), relay(t, at.BulkPlain, server, nil)
	for _, group := range []string{"X25519", "X25519MLKEM768"} {
		client := load.TLS{Group: group, Cert: cert.DER}
		resume := client
		resume.Resume = true
		for _, c := range []struct {
			spec load.Spec
			tls  load.TLS
		}{
			{spec(load.Requests, requests, 3), client},
			{spec(load.Setup, requests, 3), client},
			{spec(load.Setup, requests, 2), resume},
			{spec(load.Bulk, bulk, 2), client},
		} {
			c.spec.TLS = &c.tls
			c.spec.Duration = 100 * time.Millisecond
			res, err := load.Run(context.Background(), c.spec, nil)
			if err != nil {
				t.Fatalf("%s, %+v: %v", c.spec.Kind, c.tls.Group, err)
			}
			if res.Windows[0].Count == 0 || res.Facts["group"] != group || res.Facts["version"] != "TLS 1.3" {
				t.Errorf("%s: %+v, %v", c.spec.Kind, res.Windows[0], res.Facts)
			}
		}
	}
	if err := s.Errors(); err != nil {
		t.Error(err)
	}

	// A gateway that does not resume, or presents another certificate, must not pass.
	noTickets := server.Clone()
	noTickets.SessionTicketsDisabled = true
	other, err := arm.NewCertificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		to  netip.AddrPort
		tls load.TLS
	}{
		"no resumption":       {relay(t, at.RequestPlain, noTickets, nil), load.TLS{Group: "X25519", Cert: cert.DER, Resume: true}},
		"another certificate": {requests, load.TLS{Group: "X25519", Cert: other.DER}},
	} {
		sp := spec(load.Setup, c.to, 1)
		sp.TLS = &c.tls
		if _, err := load.Run(context.Background(), sp, nil); !errors.Is(err, load.ErrHandshake) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A gateway that damages, loses or repeats bytes must fail the case, not win it.
func TestDamage(t *testing.T) {
	_, at := startBackend(t)
	flip := func() func([]byte) []byte {
		n := 0
		return func(b []byte) []byte {
			if n += len(b); n > 300 {
				b[len(b)-1] ^= 1
			}
			return b
		}
	}
	lose := func() func([]byte) []byte {
		n := 0
		return func(b []byte) []byte {
			if n += len(b); n > 300 {
				return b[:len(b)/2]
			}
			return b
		}
	}
	repeat := func(b []byte) []byte { return append(b[:len(b):len(b)], b...) }
	for what, c := range map[string]struct {
		kind   load.Kind
		to     netip.AddrPort
		damage func([]byte) []byte
	}{
		"request flipped":  {load.Requests, at.RequestPassthrough, flip()},
		"request repeated": {load.Requests, at.RequestPassthrough, repeat},
		"bulk flipped":     {load.Bulk, at.BulkPassthrough, flip()},
		"bulk lost":        {load.Bulk, at.BulkPassthrough, lose()},
		"bulk repeated":    {load.Bulk, at.BulkPassthrough, repeat},
	} {
		sp := spec(c.kind, relay(t, c.to, nil, c.damage), 1)
		if _, err := load.Run(context.Background(), sp, nil); !errors.Is(err, wire.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A gateway that ends both directions when one has ended must fail the half-close case.
func TestNoHalfClose(t *testing.T) {
	_, at := startBackend(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		app, err := net.Dial("tcp4", at.BulkPassthrough.String())
		if err != nil {
			return
		}
		wg.Go(func() {
			io.Copy(app, c)
			app.Close()
		})
		io.Copy(c, app)
	})
	defer wg.Wait()
	defer l.Close()
	c := spec(load.Bulk, l.Addr().(*net.TCPAddr).AddrPort(), 1)
	c.Direction, c.HalfClose = wire.Duplex, true
	if _, err := load.Run(context.Background(), c, nil); err == nil {
		t.Error("no error")
	}
}

// A gateway that closes connections early must fail too.
func TestClosedEarly(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 4096))
			c.Close()
		}
	})
	defer wg.Wait()
	defer l.Close()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	for _, kind := range []load.Kind{load.Requests, load.Setup, load.Bulk, load.Idle} {
		if _, err := load.Run(context.Background(), spec(kind, to, 2), nil); err == nil {
			t.Errorf("%s: no error", kind)
		}
	}
}

func TestInterrupted(t *testing.T) {
	_, at := startBackend(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	stop := errors.New("user pressed Ctrl-C")
	time.AfterFunc(50*time.Millisecond, func() { cancel(stop) })
	c := spec(load.Requests, at.RequestPassthrough, 2)
	c.Duration = time.Minute
	if _, err := load.Run(ctx, c, nil); !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
}

func TestBadSpec(t *testing.T) {
	for _, c := range []load.Spec{
		{Kind: load.Requests, Duration: time.Second},
		{Kind: load.Requests, Conns: 1},
		{Kind: "nonsense", Conns: 1, Duration: time.Second},
	} {
		if _, err := load.Run(context.Background(), c, nil); err == nil {
			t.Errorf("%+v accepted", c)
		}
	}
}
