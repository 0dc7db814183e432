package dataplane

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/loop/looptest"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

// ways are the modes a connection can be moved in.
var ways = []struct {
	name string
	gate relay.Gate
	tls  bool
}{{"copy", relay.Gate{Off: true}, false}, {"splice", relay.Gate{}, false}, {"terminate", relay.Gate{}, true}}

// connect opens a connection to testApp the given way and waits for the app's end of
// it, from which the hello has been read.
func (r *rig) connect(port uint16, apps <-chan *net.TCPConn, terminated bool) (client duplex, app *net.TCPConn) {
	r.t.Helper()
	var hello []byte
	if terminated {
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { c.Close() })
		client = c
	} else {
		client, hello = r.passthrough(port)
	}
	select {
	case app = <-apps:
	case <-time.After(10 * time.Second):
		r.t.Fatal("the app was not reached")
	}
	if got := make([]byte, len(hello)); len(hello) > 0 {
		if _, err := io.ReadFull(app, got); err != nil || string(got) != string(hello) {
			r.t.Fatalf("the app did not get the hello: %v", err)
		}
	}
	return client, app
}

// ethernet makes loopback send segments of a usual size. With its own of 64 KiB a
// slow reader's window opens in leaps.
func ethernet(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, 1400) })
}

// handover is a backend whose connections the test drives itself.
func handover(t testing.TB, addr string) (uint16, <-chan *net.TCPConn) {
	t.Helper()
	lc := net.ListenConfig{Control: ethernet}
	l, err := lc.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	apps := make(chan *net.TCPConn, 64)
	var all []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all = append(all, c)
			apps <- c.(*net.TCPConn)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for _, c := range all {
			c.Close()
		}
	})
	return uint16(l.Addr().(*net.TCPAddr).Port), apps
}

const testIdle = time.Second

// The watchdog kills whoever makes no progress, in whatever state the connection is,
// after one to one and a quarter times the limit (gateway spec 5.5).
func TestIdle(t *testing.T) {
	t.Parallel()
	for _, w := range ways {
		for _, tc := range []struct {
			name string
			act  func(client duplex, app *net.TCPConn)
		}{
			{"silence", func(duplex, *net.TCPConn) {}},
			{"silence after an exchange", func(c duplex, app *net.TCPConn) {
				_, _ = c.Write([]byte("x"))
				_, _ = io.ReadFull(app, make([]byte, 1))
			}},
			{"client half-closed", func(c duplex, _ *net.TCPConn) { _ = c.CloseWrite() }},
			{"app half-closed", func(_ duplex, app *net.TCPConn) { _ = app.CloseWrite() }},
			{"app does not read", func(c duplex, _ *net.TCPConn) { fill(c) }},
			{"client does not read", func(_ duplex, app *net.TCPConn) { fill(app) }},
		} {
			t.Run(w.name+"/"+tc.name, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, func(o *Options) { o.Splice, o.Idle = w.gate, testIdle })
				port, apps := handover(t, "127.0.0.1:0")
				r.instance("i1", testApp, "127.0.0.1", open)
				c, app := r.connect(port, apps, w.tls)
				tc.act(c, app)
				last := time.Now()
				rec := r.waitEnd()
				if d := time.Since(last); rec.Reason != ReasonIdle || d > 4*testIdle || rec.Duration < testIdle {
					t.Errorf("ended after %s with %s, %v", d, rec.Reason, rec.Detail)
				}
				r.quiet()
			})
		}
	}
}

// fill writes until the other side's buffers are full.
func fill(c net.Conn) {
	_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	b := make([]byte, 256<<10)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// A slow peer that moves is never killed, although the kernel tells nothing of it for
// a long while: a full socket counts as writable only after a third of it has left.
func TestSlowIsNotIdle(t *testing.T) {
	t.Parallel()
	// A window that opens by less than a segment is told to the sender by its probes only,
	// which the kernel spaces up to seconds apart.
	const limit = 3 * testIdle
	for _, w := range ways {
		for _, reader := range []string{"client", "app"} {
			t.Run(w.name+"/"+reader, func(t *testing.T) {
				t.Parallel()
				r := newRig(t, func(o *Options) { o.Splice, o.Idle = w.gate, limit })
				port, apps := handover(t, "127.0.0.1:0")
				r.instance("i1", testApp, "127.0.0.1", open)
				c, app := r.connect(port, apps, w.tls)
				from, to := net.Conn(app), net.Conn(c)
				if reader == "app" {
					from, to = c, app
				}
				raw, ok := to.(*net.TCPConn)
				if !ok {
					raw = to.(*tls.Conn).NetConn().(*net.TCPConn)
				}
				_ = raw.SetReadBuffer(16 << 10) // what a peer's kernel has taken is beyond our sight
				var wrote sync.WaitGroup
				defer wrote.Wait()
				defer to.Close()
				defer from.Close()
				wrote.Go(func() {
					b := make([]byte, 64<<10)
					for {
						if _, err := from.Write(b); err != nil {
							return
						}
					}
				})
				for end := time.Now().Add(3 * limit); time.Now().Before(end); time.Sleep(testIdle / 20) {
					if _, err := io.ReadFull(to, make([]byte, 4<<10)); err != nil {
						t.Errorf("a slow reader was cut off: %v", err)
						break
					}
				}
				select { // the kernel goes on delivering what it has
				case rec := <-r.hooks.ended:
					t.Fatalf("a slow reader was cut off: %s after %s", rec.Reason, rec.Duration)
				default:
				}
			})
		}
	}
}

// A slow writer is not idle either, not even inside one TLS record.
func TestSlowWriterIsNotIdle(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Idle = testIdle })
	port, apps := handover(t, "127.0.0.1:0")
	r.instance("i1", testApp, "127.0.0.1", open)
	raw, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	drip := &dripConn{Conn: raw}
	c := tls.Client(drip, &tls.Config{ServerName: fmt.Sprintf("%s-%d.%s", testApp, port, testBase), RootCAs: r.pool})
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	app := <-apps
	drip.pause = testIdle / 10
	if _, err := c.Write([]byte("a record of some bytes")); err != nil { // 44 writes
		t.Fatal(err)
	}
	b := make([]byte, 22)
	if _, err := io.ReadFull(app, b); err != nil || string(b) != "a record of some bytes" {
		t.Errorf("got %q, %v", b, err)
	}
}

// dripConn writes byte by byte, with a pause for each once pause is set.
type dripConn struct {
	net.Conn
	pause time.Duration
}

func (c *dripConn) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
		time.Sleep(c.pause)
	}
	return len(p), nil
}

// Without data timeouts only the total limit is left.
func TestTotal(t *testing.T) {
	t.Parallel()
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(o *Options) { o.Splice, o.Idle, o.Total = w.gate, 0, 2*time.Second })
			port, apps := handover(t, "127.0.0.1:0")
			r.instance("i1", testApp, "127.0.0.1", open)
			c, app := r.connect(port, apps, w.tls)
			var stop atomic.Bool
			defer stop.Store(true)
			go func() { // activity does not help
				for !stop.Load() {
					if _, err := c.Write([]byte("x")); err != nil {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
			}()
			go func() { _, _ = io.Copy(io.Discard, app) }()
			rec := r.waitEnd()
			if rec.Reason != ReasonTotal || rec.Duration < 2*time.Second || rec.Duration > 3*time.Second {
				t.Errorf("ended after %s with %s", rec.Duration, rec.Reason)
			}
		})
	}
}

// A client that pushes at an app that reads nothing, and the other way round, is
// stopped by TCP; the gateway holds little memory of its own and loses nothing.
func TestBackPressure(t *testing.T) {
	for _, w := range ways {
		for _, writer := range []string{"client", "app"} {
			t.Run(w.name+"/"+writer, func(t *testing.T) {
				r := newRig(t, func(o *Options) { o.Splice = w.gate })
				port, apps := handover(t, "127.0.0.1:0")
				r.instance("i1", testApp, "127.0.0.1", open)
				c, app := r.connect(port, apps, w.tls)
				from, to := duplex(c), duplex(app)
				if writer == "app" {
					from, to = app, c
				}
				const push = 64 << 20
				s := script{id: 5, size: [2]int{-1, -1}, resetter: -1}
				src, block := s.content(0), make([]byte, 64<<10)
				heap := func() uint64 {
					var m runtime.MemStats
					runtime.GC()
					runtime.ReadMemStats(&m)
					return m.HeapInuse
				}
				before := heap()
				var written atomic.Int64
				var enough atomic.Bool
				wrote := make(chan error, 1)
				go func() {
					for written.Load() < push && !enough.Load() {
						_, _ = src.Read(block)
						n, err := from.Write(block)
						written.Add(int64(n))
						if err != nil {
							wrote <- err
							return
						}
					}
					wrote <- from.CloseWrite()
				}()
				stuck := int64(-1)
				for now := written.Load(); now != stuck; now = written.Load() {
					stuck = now
					time.Sleep(150 * time.Millisecond)
				}
				enough.Store(true)
				if limit := kernelBuffers(t) + 1<<20; stuck > min(limit, push-1) {
					t.Errorf("%d bytes were taken while nobody read, limit %d", stuck, limit)
				}
				if after := heap(); after > before+4<<20 {
					t.Errorf("the heap grew by %d KiB", (after-before)>>10)
				}
				got, err := s.listen(to, 0)
				if err != nil {
					t.Error(err)
				}
				if err := <-wrote; err != nil || int64(got) != written.Load() {
					t.Errorf("%d of %d bytes arrived, %v", got, written.Load(), err)
				}
				c.Close()
				app.Close()
				r.quiet()
			})
		}
	}
}

// kernelBuffers is what the sockets between a writer and a reader may hold: two for
// each direction of travel, each with a buffer as large as the kernel lets it grow.
func kernelBuffers(t *testing.T) (sum int64) {
	t.Helper()
	for _, f := range []string{"tcp_rmem", "tcp_wmem"} {
		b, err := os.ReadFile("/proc/sys/net/ipv4/" + f)
		if err != nil {
			t.Fatal(err)
		}
		var least, usual, most int64
		if _, err := fmt.Sscan(string(b), &least, &usual, &most); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		sum += 2 * most
	}
	return sum
}

// How connections end, seen from both sides (gateway spec 5.4).
func TestEndings(t *testing.T) {
	for _, w := range ways {
		run := func(name string, f func(t *testing.T, r *rig, c duplex, app *net.TCPConn)) {
			t.Run(w.name+"/"+name, func(t *testing.T) {
				r := newRig(t, func(o *Options) { o.Splice = w.gate })
				port, apps := handover(t, "127.0.0.1:0")
				r.instance("i1", testApp, "127.0.0.1", open)
				c, app := r.connect(port, apps, w.tls)
				f(t, r, c, app)
				r.quiet()
			})
		}
		want := func(t *testing.T, from io.Reader, text string) {
			t.Helper()
			b := make([]byte, len(text))
			if _, err := io.ReadFull(from, b); err != nil || string(b) != text {
				t.Fatalf("got %q, %v, want %q", b, err, text)
			}
		}
		ended := func(t *testing.T, r *rig, why Reason) {
			t.Helper()
			if rec := r.waitEnd(); rec.Reason != why {
				t.Errorf("recorded as %s (%v), want %s", rec.Reason, rec.Detail, why)
			}
		}
		send := func(t *testing.T, to io.Writer, text string) {
			t.Helper()
			if _, err := io.WriteString(to, text); err != nil {
				t.Fatal(err)
			}
		}
		run("client first", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			send(t, c, "question")
			_ = c.CloseWrite()
			if b, err := io.ReadAll(app); string(b) != "question" || err != nil {
				t.Errorf("app got %q, %v", b, err)
			}
			send(t, app, "answer")
			app.Close()
			if b, err := io.ReadAll(c); string(b) != "answer" || err != nil {
				t.Errorf("client got %q, %v", b, err)
			}
			ended(t, r, ReasonNormal)
		})
		run("app first", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			send(t, app, "greeting")
			_ = app.CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "greeting" || err != nil {
				t.Errorf("client got %q, %v", b, err)
			}
			send(t, c, "much later")
			_ = c.CloseWrite()
			if b, err := io.ReadAll(app); string(b) != "much later" || err != nil {
				t.Errorf("app got %q, %v", b, err)
			}
			ended(t, r, ReasonNormal)
		})
		run("app resets", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			send(t, app, "half an ans")
			want(t, c, "half an ans")
			reset(app)
			if n, err := c.Read(make([]byte, 10)); n != 0 || !isReset(err) {
				t.Errorf("client got %d bytes, %v", n, err)
			}
			ended(t, r, ReasonAppGone)
		})
		run("app resets behind a long answer", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			raw, ok := c.(*net.TCPConn)
			if !ok {
				raw = c.(*tls.Conn).NetConn().(*net.TCPConn)
			}
			_ = raw.SetReadBuffer(16 << 10)
			answer := strings.Repeat("answer ", 14_000)
			send(t, app, answer)
			looptest.Wait(t, "the gateway has it all", func() bool {
				var n uint64
				for _, w := range r.workers {
					n += w.relay.Copied[relay.ToClient].Load() + w.relay.Spliced[relay.ToClient].Load() + w.tls.Encrypted.Load()
				}
				return n == uint64(len(answer))
			})
			reset(app)
			ended(t, r, ReasonAppGone)
			want(t, c, answer)
			if n, err := c.Read(make([]byte, 10)); n != 0 || !isReset(err) {
				t.Errorf("client got %d bytes, %v", n, err)
			}
		})
		run("client resets", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			send(t, c, "half a quest")
			want(t, app, "half a quest")
			reset(c)
			if n, err := app.Read(make([]byte, 10)); n != 0 || !isReset(err) {
				t.Errorf("app got %d bytes, %v", n, err)
			}
			ended(t, r, ReasonClientGone)
		})
		run("client resets after its end", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			send(t, c, "x")
			_ = c.CloseWrite()
			if _, err := io.ReadAll(app); err != nil {
				t.Error(err)
			}
			reset(c) // nothing is read from it any more, and the app has nothing to say for now
			ended(t, r, ReasonClientGone)
			if n, err := app.Read(make([]byte, 10)); n != 0 {
				t.Errorf("app got %d bytes, %v", n, err)
			}
			// The end of the stream was read; that the client is gone shows in writing.
			_, err := app.Write([]byte("x"))
			for end := time.Now().Add(5 * time.Second); err == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
				_, err = app.Write([]byte("x"))
			}
			if err == nil || os.IsTimeout(err) {
				t.Errorf("the app may go on writing to nobody: %v", err)
			}
		})
		run("app resets after its end", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			_ = app.CloseWrite()
			if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
				t.Errorf("client got %q, %v", b, err)
			}
			reset(app) // the client says nothing that could be refused
			ended(t, r, ReasonNormal)
		})
		run("app closes, client goes on", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			send(t, app, "enough")
			app.Close()
			if b, err := io.ReadAll(c); string(b) != "enough" || err != nil {
				t.Errorf("client got %q, %v", b, err)
			}
			_, err := c.Write([]byte("x"))
			for end := time.Now().Add(5 * time.Second); err == nil && time.Now().Before(end); time.Sleep(time.Millisecond) {
				_, err = c.Write([]byte("x"))
			}
			if err == nil {
				t.Error("the client may go on writing to nobody")
			}
			ended(t, r, ReasonNormal)
		})
		run("answer and reset while the request comes", func(t *testing.T, r *rig, c duplex, app *net.TCPConn) {
			// The app has not read the request, so its close is a reset behind the answer.
			send(t, c, strings.Repeat("request ", 1000))
			time.Sleep(50 * time.Millisecond)
			send(t, app, "413")
			app.Close()
			_, wrote := c.Write([]byte("more"))
			want(t, c, "413")
			n, err := c.Read(make([]byte, 10))
			if n != 0 || err == nil || err == io.EOF && wrote == nil { // the kernel reports a reset once
				t.Errorf("client got %d bytes, %v after %v", n, err, wrote)
			}
			ended(t, r, ReasonAppGone)
		})
	}
}
