package relay

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
	"github.com/dstack-gw/dstack-gw/dataplane/loop/looptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is one relayed connection: the smallest owner of a Pair there can be.
type node struct {
	l        *loop.Loop
	w        *Worker
	pair     Pair
	cli, app loop.Sock
	queued   bool
	over     bool
	ended    chan error // nil after a clean end
}

type side struct {
	n *node
	s *loop.Sock
}

func (h side) Ready(ev loop.Event) {
	h.s.Note(ev)
	h.n.step()
}

func (n *node) Ready(loop.Event) {
	n.queued = false
	n.step()
}

func (n *node) step() {
	if n.over {
		return
	}
	r, err := n.pair.Step(n.w, n.l.Now(), &n.cli, &n.app)
	switch {
	case err != nil || r.Done:
		n.over = true
		if err != nil {
			n.cli.Reset(n.l)
			n.app.Reset(n.l)
		} else {
			n.cli.Close(n.l)
			n.app.Close(n.l)
		}
		n.pair.Release(n.w)
		n.ended <- err
	case r.Again && !n.queued:
		n.queued = true
		n.l.Requeue(n)
	}
}

func (n *node) start() error {
	if err := n.cli.Watch(n.l, side{n, &n.cli}); err != nil {
		return err
	}
	return n.app.Watch(n.l, side{n, &n.app})
}

type rig struct {
	looptest.Loop
	t testing.TB
	w *Worker
}

func newRig(t testing.TB, buffer int, g Gate) *rig {
	t.Helper()
	r := &rig{Loop: looptest.Start(t), t: t, w: NewWorker(buffer, g)}
	t.Cleanup(func() { r.Do(r.w.Close) })
	return r
}

// pair returns a relayed connection that is not started yet.
func (r *rig) pair(small bool) (client, app *net.TCPConn, n *node) {
	n = &node{l: r.Loop.Loop, w: r.w, ended: make(chan error, 1)}
	client, n.cli = looptest.TCP(r.t, small)
	app, n.app = looptest.TCP(r.t, small)
	return client, app, n
}

func (r *rig) run(n *node) {
	r.t.Helper()
	var err error
	r.Do(func() { err = n.start() })
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) wait(n *node) error {
	r.t.Helper()
	select {
	case err := <-n.ended:
		return err
	case <-time.After(10 * time.Second):
		r.t.Fatal("the connection did not end")
		return nil
	}
}

// speak writes size random bytes in random pieces with random pauses, then ends its
// direction.
func speak(c *net.TCPConn, size int, rng *rand.Rand, sum hash.Hash) error {
	buf := make([]byte, 70000)
	for i := range buf {
		buf[i] = byte(rng.Uint32())
	}
	for size > 0 {
		n := 1
		switch rng.IntN(3) {
		case 0:
			n = 1 + rng.IntN(100)
		case 1:
			n = 1 + rng.IntN(len(buf))
		}
		n = min(n, size)
		at := rng.IntN(len(buf) - n + 1)
		if _, err := c.Write(buf[at : at+n]); err != nil {
			return err
		}
		sum.Write(buf[at : at+n])
		size -= n
		switch rng.IntN(60) {
		case 0:
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		case 1:
			runtime.Gosched()
		}
	}
	return c.CloseWrite()
}

func listen(c *net.TCPConn, slow bool, rng *rand.Rand, sum hash.Hash) error {
	buf := make([]byte, 32<<10)
	for {
		b := buf
		if slow {
			b = buf[:1+rng.IntN(2000)]
			if rng.IntN(40) == 0 {
				time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
			}
		}
		n, err := c.Read(b)
		sum.Write(b[:n])
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

var gates = map[string]Gate{
	"off": {Off: true}, "auto": {Auto: true}, "at once": {}, "after bytes": {AfterBytes: 100_000}, "after time": {AfterDuration: int64(5 * time.Millisecond)},
}

// Random traffic both ways at once, with half-closes in either order, through tiny
// and through usual socket buffers: every byte arrives, once and in order.
func TestRandomTraffic(t *testing.T) {
	for name, g := range gates {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, 16<<10, g)
			var wg sync.WaitGroup
			for i := range 24 {
				client, app, n := r.pair(i%3 == 0)
				held := []byte(fmt.Sprintf("hello of connection %d", i))
				r.Do(func() { n.pair.Hold(r.w, held) })
				r.run(n)
				limit := 600_000
				if i%3 == 0 {
					limit = 60_000
				}
				var sent, got [2]hash.Hash
				for d := range 2 {
					sent[d], got[d] = sha256.New(), sha256.New()
				}
				sent[ToApp].Write(held)
				seed := uint64(i)
				wg.Go(func() {
					var ends sync.WaitGroup
					for d, from := range []*net.TCPConn{ToApp: client, ToClient: app} {
						to := app
						if d == ToClient {
							to = client
						}
						ends.Go(func() {
							rng := rand.New(rand.NewPCG(seed, uint64(d)))
							if err := speak(from, rng.IntN(limit), rng, sent[d]); err != nil {
								t.Errorf("connection %d, direction %d, write: %v", i, d, err)
							}
						})
						ends.Go(func() {
							rng := rand.New(rand.NewPCG(seed, uint64(d)+2))
							if err := listen(to, i%4 == 1, rng, got[d]); err != nil {
								t.Errorf("connection %d, direction %d, read: %v", i, d, err)
							}
						})
					}
					ends.Wait()
					for d := range 2 {
						if !bytes.Equal(sent[d].Sum(nil), got[d].Sum(nil)) {
							t.Errorf("connection %d, direction %d: content differs", i, d)
						}
					}
					if err := r.wait(n); err != nil {
						t.Errorf("connection %d: %v", i, err)
					}
					client.Close()
					app.Close()
				})
			}
			wg.Wait()
			r.Do(func() {
				if g.Off == (r.w.SpliceEngaged.Load() > 0) {
					t.Errorf("splice engaged %d times", r.w.SpliceEngaged.Load())
				}
			})
		})
	}
}

// An app that answers before it read everything and closes: its kernel follows the
// answer with a reset. The client gets the answer, and then no clean end.
func TestAnswerBeforeReset(t *testing.T) {
	for _, g := range []Gate{{Off: true}, {}} {
		t.Run(fmt.Sprintf("%+v", g), func(t *testing.T) {
			r := newRig(t, 16<<10, g)
			client, app, n := r.pair(false)
			if _, err := client.Write([]byte("request")); err != nil {
				t.Fatal(err)
			}
			answer := bytes.Repeat([]byte("413 "), 5000)
			if _, err := app.Write(answer); err != nil {
				t.Fatal(err)
			}
			_ = app.SetLinger(0)
			app.Close()
			time.Sleep(20 * time.Millisecond) // all of it is at the gateway before the first step
			r.run(n)
			got, err := io.ReadAll(client)
			if !bytes.Equal(got, answer) {
				t.Errorf("client got %d of %d bytes", len(got), len(answer))
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("client's stream ended with %v, want a reset", err)
			}
			var se *SideError
			if err := r.wait(n); !errors.As(err, &se) || se.Side != "app" {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

// A reset of either side must not look like an end of the stream to the other.
func TestResetIsPassedOn(t *testing.T) {
	for _, g := range []Gate{{Off: true}, {}} {
		for _, who := range []string{"client", "app"} {
			t.Run(fmt.Sprintf("%+v/%s", g, who), func(t *testing.T) {
				r := newRig(t, 16<<10, g)
				client, app, n := r.pair(false)
				r.run(n)
				from, to := client, app
				if who == "app" {
					from, to = app, client
				}
				data := bytes.Repeat([]byte("0123456789"), 10_000)
				if _, err := from.Write(data); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(data))
				if _, err := io.ReadFull(to, got); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("content: %v", err)
				}
				_ = from.SetLinger(0)
				from.Close()
				if n, err := to.Read(got); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("read %d bytes, %v, want a reset", n, err)
				}
				var se *SideError
				if err := r.wait(n); !errors.As(err, &se) || se.Side != who {
					t.Errorf("ended with %v", err)
				}
			})
		}
	}
}

// What a flow holds for a reader that does not read is one buffer or one pipe.
func TestHoldsOneBuffer(t *testing.T) {
	for _, g := range []Gate{{Off: true}, {}, {Auto: true}} {
		t.Run(fmt.Sprintf("%+v", g), func(t *testing.T) {
			r := newRig(t, 64<<10, g)
			client, _, n := r.pair(false)
			r.run(n)
			_ = client.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			written, err := client.Write(make([]byte, 64<<20))
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("wrote %d bytes, %v: nothing stopped the client", written, err)
			}
			r.Do(func() {
				f := &n.pair.Up
				if len(f.held) > len(r.w.Scratch) || f.pipe != nil && f.inPipe > f.pipe.size || len(f.held)+f.inPipe == 0 {
					t.Errorf("holds %d bytes and %d in a pipe", len(f.held), f.inPipe)
				}
				if f.pipe != nil && f.held != nil {
					t.Error("holds a buffer and a pipe")
				}
			})
			client.Close()
		})
	}
}

// A pipe with bytes of one connection must never serve another, and an empty one is
// given back as soon as the connection pauses.
func TestPipes(t *testing.T) {
	r := newRig(t, 16<<10, Gate{})
	client, app, n := r.pair(false)
	r.run(n)
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(app, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	r.Do(func() {
		if n.pair.Up.pipe != nil || len(r.w.pipes) == 0 {
			t.Error("an idle connection keeps its pipe")
		}
	})
	_ = client.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	_, _ = client.Write(make([]byte, 64<<20)) // until the pipe is stuck
	r.Do(func() {
		if n.pair.Up.inPipe == 0 {
			t.Fatal("the pipe is empty")
		}
		pooled := len(r.w.pipes)
		n.over = true
		n.cli.Reset(r.Loop.Loop)
		n.app.Reset(r.Loop.Loop)
		n.pair.Release(r.w)
		n.pair.Release(r.w) // twice is harmless
		if len(r.w.pipes) != pooled {
			t.Errorf("%d pipes in the pool, %d before: a full one came back", len(r.w.pipes), pooled)
		}
		for _, p := range r.w.pipes {
			if _, err := unix.Read(p.r, make([]byte, 1)); err != unix.EAGAIN {
				t.Errorf("a pooled pipe is not empty: %v", err)
			}
		}
	})
}

// Whatever a connection did, its descriptors are back after Release and Close.
func TestDescriptorsComeBack(t *testing.T) {
	before := looptest.Descriptors(t)
	t.Run("connections", func(t *testing.T) {
		r := newRig(t, 16<<10, Gate{})
		for i := range 50 {
			client, app, n := r.pair(false)
			r.run(n)
			_ = client.SetWriteDeadline(time.Now().Add(2 * time.Millisecond))
			_, _ = client.Write(make([]byte, 4<<20))
			if i%2 == 0 {
				_ = app.SetLinger(0)
			}
			app.Close()
			client.Close()
			_ = r.wait(n)
		}
	})
	if after := looptest.Descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// One connection that always has more to move leaves turns to the others, and does
// not ask for more than one at a time.
func TestTurns(t *testing.T) {
	r := newRig(t, 64<<10, Gate{Off: true})
	client, app, n := r.pair(false)
	_ = n.app
	go func() { _, _ = io.Copy(io.Discard, app) }()
	go func() {
		b := make([]byte, 1<<20)
		for {
			if _, err := client.Write(b); err != nil {
				return
			}
		}
	}()
	time.Sleep(50 * time.Millisecond)
	var moved int
	r.Do(func() {
		n.cli.Note(loop.In)
		res, err := n.pair.Step(r.w, r.Now(), &n.cli, &n.app)
		if err != nil {
			t.Error(err)
		}
		moved = res.Moved
	})
	if limit := 2 * (turnBudget + len(r.w.Scratch)); moved == 0 || moved > limit { // each byte comes and leaves
		t.Errorf("one turn moved %d bytes, limit %d", moved, limit)
	}
	r.Do(func() {
		n.cli.Reset(r.Loop.Loop)
		n.app.Reset(r.Loop.Loop)
		n.pair.Release(r.w)
	})
}
