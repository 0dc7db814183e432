package terminate

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
	"github.com/dstack-gw/dstack-gw/dataplane/loop/looptest"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is one terminated connection: the smallest owner of a Session there can be.
type node struct {
	r         *rig
	s         *Session
	cli, app  loop.Sock
	handshake bool // under way
	queued    bool
	over      bool
	state     tls.ConnectionState // after the handshake
	ended     chan error          // nil after a clean end
}

type side struct {
	n *node
	s *loop.Sock
}

func (h side) Ready(ev loop.Event) {
	h.s.Note(ev)
	h.n.step()
}

func (h side) Abort(err error) { h.n.end(err) }

func (n *node) Ready(loop.Event) {
	n.queued = false
	n.step()
}

func (n *node) Abort(err error) { n.end(err) }

func (n *node) step() {
	if n.over {
		return
	}
	l := n.r.Loop.Loop
	if n.handshake {
		done, err := n.s.Handshake(n.r.w)
		if !done {
			return
		}
		if err != nil {
			n.end(err)
			return
		}
		n.handshake = false
		n.state = n.s.State()
		if err := n.app.Watch(l, side{n, &n.app}); err != nil {
			n.end(err)
			return
		}
	}
	res, err := n.s.Step(n.r.w, &n.cli, &n.app)
	switch {
	case err != nil || res.Done:
		n.end(err)
	case res.Again && !n.queued:
		n.queued = true
		l.Requeue(n)
	}
}

func (n *node) end(err error) {
	if n.over {
		return
	}
	n.over = true
	n.s.Release(n.r.w)
	l := n.r.Loop.Loop
	if err != nil {
		n.cli.Reset(l)
		n.app.Reset(l)
	} else {
		n.cli.Close(l)
		n.app.Close(l)
	}
	n.ended <- err
}

type rig struct {
	looptest.Loop
	t         testing.TB
	w         *Worker
	plain, h2 *tls.Config
	client    *tls.Config
}

func newRig(t testing.TB) *rig {
	t.Helper()
	cert, pool := testCert(t)
	rw := relay.NewWorker(64<<10, relay.Gate{})
	r := &rig{Loop: looptest.Start(t), t: t, w: NewWorker(rw), client: &tls.Config{ServerName: "app.test", RootCAs: pool}}
	r.plain, r.h2 = Configs(cert, tls.VersionTLS12, tls.VersionTLS13, [][32]byte{{1}})
	t.Cleanup(func() { r.Do(func() { r.w.Close(); rw.Close() }) })
	return r
}

func testCert(t testing.TB) (*tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"app.test"}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// serve begins a session with cfg and returns the client's and the app's end.
func (r *rig) serve(cfg *tls.Config) (client, app *net.TCPConn, n *node) {
	r.t.Helper()
	return r.connect(cfg, false)
}

// connect is serve with the choice of small socket buffers on the client's connection.
// They must be small from the start: a window that shrinks later stalls TCP itself.
func (r *rig) connect(cfg *tls.Config, small bool) (client, app *net.TCPConn, n *node) {
	r.t.Helper()
	n = &node{r: r, handshake: true, ended: make(chan error, 1)}
	client, n.cli = looptest.TCP(r.t, small)
	app, n.app = looptest.TCP(r.t, false)
	r.Do(func() {
		n.s = Start(r.w, cfg, &n.cli, client.LocalAddr(), client.RemoteAddr(), nil)
		if err := n.cli.Watch(r.Loop.Loop, side{n, &n.cli}); err != nil {
			r.t.Error(err)
		}
	})
	return client, app, n
}

func (r *rig) wait(n *node) error {
	r.t.Helper()
	select {
	case err := <-n.ended:
		return err
	case <-time.After(10 * time.Second):
		r.t.Fatal("the session did not end")
		return nil
	}
}

func expect(t *testing.T, from io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if n, err := io.ReadFull(from, b); err != nil || string(b) != want {
		t.Fatalf("got %q, %v, want %q", b[:n], err, want)
	}
}

// KeyUpdate from the client, with and without a request for ours, between records of
// data in both directions.
func TestKeyUpdate(t *testing.T) {
	r := newRig(t)
	client, app, n := r.serve(r.plain)
	f := forge(t, client, r.client, tls.VersionTLS13)
	for i := range 20 {
		word := fmt.Sprintf("word %d", i)
		f.send(f.seal(typeApplication, []byte(word)))
		expect(t, app, word)
		f.send(f.seal(typeHandshake, keyUpdate(i%2 == 0)))
		f.update()
		if _, err := app.Write([]byte(word)); err != nil {
			t.Fatal(err)
		}
		expect(t, f, word)
	}
	client.Close()
	app.Close()
	if err := r.wait(n); err != nil {
		t.Error(err)
	}
}

// A client that asks for answers and never reads them ends, and holds little memory.
// It keeps within the limits of crypto/tls by sending a byte of data now and then.
func TestUnreadAnswersAreBounded(t *testing.T) {
	r := newRig(t)
	client, app, n := r.connect(r.plain, true)
	go func() { _, _ = io.Copy(io.Discard, app) }()
	f := forge(t, client, r.client, tls.VersionTLS13)
	most := 0
	for range 3000 {
		var batch [][]byte
		for range 10 {
			batch = append(batch, f.seal(typeHandshake, keyUpdate(true)))
			f.update()
		}
		batch = append(batch, f.seal(typeApplication, []byte{1}))
		if _, err := client.Write(bytes.Join(batch, nil)); err != nil {
			break
		}
		r.Do(func() { most = max(most, len(n.s.wire.out)) })
	}
	if most > cap(r.w.cork)+maxAnswers {
		t.Errorf("%d bytes of answers were queued", most)
	}
	if err := r.wait(n); !errors.Is(err, errAnswers) {
		t.Errorf("ended with %v", err)
	}
}

// Records of one byte, and records that crypto/tls handles without returning, must
// not hold the loop longer than large ones.
func TestTurnIsBoundedByCiphertext(t *testing.T) {
	r := newRig(t)
	client, app, n := r.serve(r.plain)
	f := forge(t, client, r.client, tls.VersionTLS13)
	f.send(f.seal(typeApplication, []byte("x")))
	expect(t, app, "x")
	var flood [][]byte
	size, words := 0, 0
	for i := 0; size < 600<<10; i++ {
		var rec []byte
		if i%3 > 0 {
			rec = f.seal(typeHandshake, keyUpdate(false))
			f.update()
		} else {
			rec = f.seal(typeApplication, []byte{'x'})
			words++
		}
		flood = append(flood, rec)
		size += len(rec)
	}
	all := bytes.Join(flood, nil)
	go func() { _, _ = client.Write(all) }()
	full, limit := 0, upBudget+len(r.w.ahead)
	r.Do(func() {
		_ = unix.SetsockoptInt(n.cli.FD, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20) // as much as the system allows
		waiting := func() int {
			q, _ := unix.IoctlGetInt(n.cli.FD, unix.SIOCINQ)
			return q
		}
		for q := -1; full == 0 || q != full; time.Sleep(50 * time.Millisecond) {
			q, full = full, waiting()
		}
		n.cli.Note(loop.In)
		n.step()
		if took := full - waiting(); took == 0 || took > limit {
			t.Errorf("one turn took %d of %d bytes, limit %d", took, full, limit)
		}
	})
	if full <= limit {
		t.Skipf("the kernel queues %d bytes for a socket (net.core.rmem_max); more than %d are needed to see a turn end", full, limit)
	}
	if _, err := io.CopyN(io.Discard, app, int64(words)); err != nil {
		t.Fatal(err)
	}
	client.Close()
	app.Close()
	_ = r.wait(n) // unread answers may make it a reset
}

// Data that arrived before the record that fails still reaches the app.
func TestDataBeforeGarbageIsDelivered(t *testing.T) {
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, tc := range []struct{ name, tail string }{
			{"garbage", string([]byte{typeApplication, 3, 3, 0, 40}) + string(make([]byte, 40))},
			{"oversized", string([]byte{typeApplication, 3, 3, 0x48, 1})},
			{"wrong version", string([]byte{typeApplication, 9, 9, 0, 1, 0})},
		} {
			t.Run(tls.VersionName(v)+"/"+tc.name, func(t *testing.T) {
				r := newRig(t)
				client, app, n := r.serve(r.plain)
				f := forge(t, client, r.client, v)
				f.send(f.seal(typeApplication, []byte("one ")), f.seal(typeApplication, []byte("two")), []byte(tc.tail))
				got, err := io.ReadAll(app)
				if string(got) != "one two" {
					t.Errorf("app got %q", got)
				}
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("app's stream ended with %v, want a reset", err)
				}
				var alert *net.OpError
				if _, err := f.Read(make([]byte, 1)); !errors.As(err, &alert) || alert.Op != "remote error" {
					t.Errorf("client got %v, want an alert", err)
				}
				if err := r.wait(n); err == nil {
					t.Error("a clean end")
				}
			})
		}
	}
}

// A client may not renegotiate (RFC 5246 7.2.2; the gateway spec has no use for it).
func TestRenegotiationIsRefused(t *testing.T) {
	r := newRig(t)
	client, app, n := r.serve(r.plain)
	f := forge(t, client, r.client, tls.VersionTLS12)
	f.send(f.seal(typeApplication, []byte("hi")))
	expect(t, app, "hi")
	hello := append([]byte{1, 0, 0, 41, 3, 3}, make([]byte, 32)...)
	hello = append(hello, 0, 0, 2, 0xc0, 0x2b, 1, 0)
	f.send(f.seal(typeHandshake, hello))
	if err := r.wait(n); err == nil {
		t.Error("renegotiation did not end the session")
	}
	if _, err := f.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("client got %v, want an alert", err)
	}
}

// close_notify comes before FIN when the app closes; the client may go on sending.
func TestAppClosesFirst(t *testing.T) {
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(v), func(t *testing.T) {
			r := newRig(t)
			client, app, n := r.serve(r.plain)
			rec := &tap{Conn: client}
			cfg := r.client.Clone()
			cfg.MaxVersion = v
			c := tls.Client(rec, cfg)
			if err := c.Handshake(); err != nil {
				t.Fatal(err)
			}
			if _, err := app.Write([]byte("bye")); err != nil {
				t.Fatal(err)
			}
			_ = app.CloseWrite()
			// crypto/tls says EOF for close_notify, and for a bare FIN between records too.
			if b, err := io.ReadAll(c); string(b) != "bye" || err != nil {
				t.Fatalf("got %q, %v", b, err)
			}
			if n, err := client.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after close_notify: %d bytes, %v, want FIN", n, err)
			}
			var last []byte
			for b := rec.got.Bytes(); len(b) > 0; {
				size := 5 + int(b[3])<<8 + int(b[4])
				last, b = b[:size], b[size:]
			}
			switch want := byte(typeAlert); {
			case v == tls.VersionTLS12 && last[0] != want:
				t.Errorf("the last record is of type %d, want an alert", last[0])
			case v == tls.VersionTLS13 && len(last) != 5+2+1+16:
				t.Errorf("the last record has %d bytes, an alert has 24", len(last))
			}
			if _, err := c.Write([]byte("more")); err != nil {
				t.Fatal(err)
			}
			expect(t, app, "more")
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(app); len(b) != 0 || err != nil {
				t.Errorf("app got %q, %v", b, err)
			}
			if err := r.wait(n); err != nil {
				t.Error(err)
			}
		})
	}
}

// A client's end of stream, with or without close_notify, is passed to the app, whose
// answer still arrives. A record that was cut counts as the end as well.
func TestClientClosesFirst(t *testing.T) {
	for _, how := range []string{"close_notify", "FIN", "cut record"} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t)
			client, app, n := r.serve(r.plain)
			f := forge(t, client, r.client, tls.VersionTLS13)
			f.send(f.seal(typeApplication, []byte("question")))
			switch how {
			case "close_notify":
				f.send(f.seal(typeAlert, []byte{1, 0}))
			case "cut record":
				f.send(f.seal(typeApplication, []byte("never"))[:9])
				fallthrough
			case "FIN":
				_ = client.CloseWrite()
			}
			if b, err := io.ReadAll(app); string(b) != "question" || err != nil {
				t.Fatalf("app got %q, %v", b, err)
			}
			if _, err := app.Write([]byte("answer")); err != nil {
				t.Fatal(err)
			}
			app.Close()
			if b, err := io.ReadAll(f); string(b) != "answer" || err != nil {
				t.Errorf("client got %q, %v", b, err)
			}
			if err := r.wait(n); err != nil {
				t.Error(err)
			}
		})
	}
}

// After a reset of the app the client must not see anything that looks like an end.
func TestAppReset(t *testing.T) {
	for _, before := range []string{"", "half an answer"} {
		r := newRig(t)
		client, app, n := r.serve(r.plain)
		c := tls.Client(client, r.client)
		if _, err := c.Write([]byte("hi")); err != nil {
			t.Fatal(err)
		}
		expect(t, app, "hi")
		if _, err := app.Write([]byte(before)); err != nil {
			t.Fatal(err)
		}
		expect(t, c, before)
		_ = app.SetLinger(0)
		app.Close()
		if k, err := c.Read(make([]byte, 1)); k != 0 || err == nil || err == io.EOF {
			t.Errorf("client got %d bytes, %v", k, err)
		}
		var se *relay.SideError
		if err := r.wait(n); !errors.As(err, &se) || se.Side != "app" {
			t.Errorf("ended with %v", err)
		}
	}
}

// The answer of an app that stops reading and resets is delivered, without close_notify.
func TestAnswerBeforeReset(t *testing.T) {
	r := newRig(t)
	client, app, n := r.serve(r.plain)
	c := tls.Client(client, r.client)
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	expect(t, app, "x")
	stop, stopped := make(chan struct{}), make(chan struct{})
	look := func() { // the loop looks away, and then sees all at once
		close(stopped)
		<-stop
		n.app.Note(loop.In | loop.Hup)
	}
	if err := r.Post(look); err != nil {
		t.Fatal(err)
	}
	<-stopped
	if _, err := c.Write([]byte("more of the request")); err != nil {
		t.Fatal(err)
	}
	if _, err := app.Write([]byte("413")); err != nil {
		t.Fatal(err)
	}
	_ = app.SetLinger(0)
	app.Close()
	time.Sleep(20 * time.Millisecond)
	close(stop)
	expect(t, c, "413")
	if k, err := c.Read(make([]byte, 1)); k != 0 || err == nil || err == io.EOF {
		t.Errorf("after the answer the client got %d bytes, %v", k, err)
	}
	if err := r.wait(n); err == nil {
		t.Error("a clean end")
	}
}

// Sessions resume on either acceptor, in both versions, also on another gateway with
// the same ticket keys.
func TestResumption(t *testing.T) {
	r := newRig(t)
	cert := r.plain.Certificates[0]
	plain2, h22 := Configs(&cert, tls.VersionTLS12, tls.VersionTLS13, [][32]byte{{2}, {1}})
	otherPlain, _ := Configs(&cert, tls.VersionTLS12, tls.VersionTLS13, [][32]byte{{3}})
	acceptors := map[string]*tls.Config{"plain": r.plain, "h2": r.h2, "plain of another node": plain2, "h2 of another node": h22, "unrelated": otherPlain}
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, first := range []string{"plain", "h2"} {
			for second, cfg := range acceptors {
				t.Run(fmt.Sprintf("%s/%s then %s", tls.VersionName(v), first, second), func(t *testing.T) {
					c := r.client.Clone()
					c.MaxVersion = v
					c.ClientSessionCache = tls.NewLRUClientSessionCache(4)
					c.NextProtos = []string{"h2"}
					dial := func(srv *tls.Config) (resumed bool) {
						client, app, n := r.serve(srv)
						k := tls.Client(client, c)
						if _, err := k.Write([]byte("hi")); err != nil {
							t.Fatal(err)
						}
						expect(t, app, "hi")
						if _, err := app.Write([]byte("ho")); err != nil {
							t.Fatal(err)
						}
						expect(t, k, "ho") // the ticket has come before it
						k.Close()
						app.Close()
						if err := r.wait(n); err != nil {
							t.Error(err)
						}
						if n.state.DidResume != k.ConnectionState().DidResume {
							t.Error("server and client disagree")
						}
						return n.state.DidResume
					}
					if dial(acceptors[first]) {
						t.Error("the first handshake resumed")
					}
					if got, want := dial(cfg), second != "unrelated"; got != want {
						t.Errorf("resumed: %v, want %v", got, want)
					}
				})
			}
		}
	}
	if r.w.Full.Load() != 2*2*5+2*2 || r.w.Resumed.Load() != 2*2*4 || r.w.Failed.Load() != 0 {
		t.Errorf("%d full, %d resumed, %d failed", r.w.Full.Load(), r.w.Resumed.Load(), r.w.Failed.Load())
	}
}

// A hello that comes byte by byte, with a pause of the coroutine for each.
func TestHandshakeByteByByte(t *testing.T) {
	r := newRig(t)
	client, app, n := r.serve(r.plain)
	c := tls.Client(dripper{client}, r.client)
	if _, err := c.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	expect(t, app, "hi")
	if _, err := app.Write([]byte("ho")); err != nil {
		t.Fatal(err)
	}
	expect(t, c, "ho") // and the session tickets, which would make the close a reset
	c.Close()
	app.Close()
	if err := r.wait(n); err != nil {
		t.Error(err)
	}
}

type dripper struct{ net.Conn }

func (c dripper) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// Handshakes that are given up in every way leave neither coroutine nor goroutine.
func TestAbortedHandshakes(t *testing.T) {
	r := newRig(t)
	hello := recordedHello(t, r.client)
	before := runtime.NumGoroutine()
	var open []*node
	for i := range 400 {
		client, app, n := r.serve(r.plain)
		app.Close()
		switch i % 4 {
		case 0: // reset after half of the hello
			_, _ = client.Write(hello[:len(hello)/2])
			_ = client.SetLinger(0)
			client.Close()
		case 1: // FIN before Finished
			_, _ = client.Write(hello)
			client.Close()
		case 2:
			_, _ = client.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		case 3: // silent; given up by the owner below
			_, _ = client.Write(hello[:1+i%len(hello)])
			open = append(open, n)
			continue
		}
		if err := r.wait(n); err == nil {
			t.Errorf("way %d: a clean end", i%4)
		}
		client.Close()
	}
	r.Do(func() {
		for _, n := range open {
			n.end(errors.New("timeout"))
		}
		if len(r.w.coros) > keepCoros {
			t.Errorf("%d coroutines are kept", len(r.w.coros))
		}
	})
	if got := r.w.Failed.Load(); got != 400 {
		t.Errorf("%d handshakes failed, want 400", got)
	}
	r.Do(r.w.Close)
	looptest.Wait(t, "goroutines end", func() bool { return runtime.NumGoroutine() <= before })
}

// recordedHello returns the first flight of a client.
func recordedHello(t testing.TB, cfg *tls.Config) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	go func() { _ = tls.Client(b, cfg).Handshake(); b.Close() }()
	buf := make([]byte, 16<<10)
	n, err := a.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// A callback of the configuration that panics costs its connection and nothing else.
func TestPanicInHandshake(t *testing.T) {
	r := newRig(t)
	bad := r.plain.Clone()
	bad.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { panic("boom") }
	for range 3 {
		client, _, n := r.serve(bad)
		if err := tls.Client(client, r.client).Handshake(); err == nil {
			t.Error("the handshake succeeded")
		}
		if err := r.wait(n); err == nil {
			t.Error("a clean end")
		}
		client, app, n := r.serve(r.plain)
		c := tls.Client(client, r.client)
		if _, err := c.Write([]byte("hi")); err != nil {
			t.Fatal(err)
		}
		expect(t, app, "hi")
		c.Close()
		app.Close()
		if err := r.wait(n); err != nil {
			t.Error(err)
		}
	}
	if n := r.Panics(); n != 3 {
		t.Errorf("%d panics", n)
	}
}

// Sessions share a read-ahead buffer: what one has not used when its app blocks must
// survive what the others read.
func TestReadAheadIsKept(t *testing.T) {
	r := newRig(t)
	stuck, stuckApp, n1 := r.serve(r.plain)
	busy, busyApp, n2 := r.serve(r.plain)
	a, b := tls.Client(stuck, r.client), tls.Client(busy, r.client)
	sent := make(chan [32]byte, 1)
	go func() {
		sum := sha256.New()
		block := make([]byte, 10_007)
		for i := range 2000 { // more than the buffers on the way take
			for k := range block {
				block[k] = byte(i * k)
			}
			if _, err := a.Write(block); err != nil {
				t.Error(err)
				break
			}
			sum.Write(block)
		}
		sent <- [32]byte(sum.Sum(nil))
		_ = a.CloseWrite()
	}()
	looptest.Wait(t, "the app blocks", func() (held bool) {
		r.Do(func() { held = len(n1.s.held) > 0 })
		return held
	})
	got := sha256.New()
	piece := make([]byte, 100_000)
	for range 100 { // by turns, so that the stuck session moves and blocks again
		if _, err := b.Write(piece); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(busyApp, piece); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(got, stuckApp, 90_000); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.Copy(got, stuckApp); err != nil {
		t.Fatal(err)
	}
	if want := <-sent; [32]byte(got.Sum(nil)) != want {
		t.Error("content differs")
	}
	for _, c := range []io.Closer{stuckApp, busyApp, a, b} {
		c.Close()
	}
	for _, n := range []*node{n1, n2} {
		if err := r.wait(n); err != nil {
			t.Error(err)
		}
	}
}

// What a panic left in the shared send buffer must not reach another client.
func TestCorkStartsEmpty(t *testing.T) {
	r := newRig(t)
	client, app, n := r.serve(r.plain)
	c := tls.Client(client, r.client)
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	r.Do(func() { r.w.cork = append(r.w.cork[:0], "ciphertext of another connection"...) })
	if _, err := app.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	expect(t, c, "hi")
	c.Close()
	app.Close()
	if err := r.wait(n); err != nil {
		t.Error(err)
	}
}
