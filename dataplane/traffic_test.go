package dataplane

import (
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// duplex is a *net.TCPConn or a *tls.Conn.
type duplex interface {
	net.Conn
	CloseWrite() error
}

func reset(c duplex) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		t = c.(*tls.Conn).NetConn().(*net.TCPConn)
	}
	_ = t.SetLinger(0)
	t.Close()
}

// recordHello returns the first flight of a client that asks for name, to be sent
// ahead of bytes that are not TLS: passthrough does not look at them.
func recordHello(t testing.TB, name string, edit func(*tls.Config)) []byte {
	t.Helper()
	cfg := &tls.Config{ServerName: name}
	if edit != nil {
		edit(cfg)
	}
	a, b := net.Pipe()
	defer a.Close()
	go func() { _ = tls.Client(b, cfg).Handshake(); b.Close() }()
	head := make([]byte, 5)
	if _, err := io.ReadFull(a, head); err != nil {
		t.Fatal(err)
	}
	hello := append(head, make([]byte, int(head[3])<<8|int(head[4]))...)
	if _, err := io.ReadFull(a, hello[5:]); err != nil {
		t.Fatal(err)
	}
	return hello
}

// passthrough connects and sends a hello for testApp's port; everything after it is
// the caller's.
func (r *rig) passthrough(port uint16) (*net.TCPConn, []byte) {
	r.t.Helper()
	hello := recordHello(r.t, fmt.Sprintf("%s-%ds.%s", testApp, port, testBase), nil)
	d := net.Dialer{Control: ethernet}
	c, err := d.Dial("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	if _, err := c.Write(hello); err != nil {
		r.t.Fatal(err)
	}
	return c.(*net.TCPConn), hello
}

// script is what the two ends of one connection do.
type script struct {
	id       uint64
	size     [2]int  // bytes in each direction; -1: any number, for listen
	slow     [2]bool // the reader takes small pieces with pauses
	after    [2]bool // the direction begins when the other has ended
	drip     bool    // short writes, a byte at a time now and then
	small    bool    // smallest socket buffers at the client
	resetter int     // relay.ToApp: the client resets at half of its stream; relay.ToClient: the app; -1: nobody
}

func newScript(id uint64, limit int) script {
	rng := rand.New(rand.NewPCG(id, 9))
	s := script{id: id, resetter: -1, drip: rng.IntN(4) == 0, small: rng.IntN(4) == 0}
	for d := range 2 {
		s.size[d] = rng.IntN(limit)
		switch rng.IntN(6) {
		case 0:
			s.size[d] = rng.IntN(3)
		case 1:
			s.size[d] = limit
		}
		s.slow[d] = rng.IntN(5) == 0
		if s.slow[d] || s.small || s.drip {
			s.size[d] = min(s.size[d], limit/6)
		}
	}
	switch rng.IntN(8) {
	case 0:
		s.after[relay.ToApp] = true
	case 1, 2:
		s.after[relay.ToClient] = true
	case 3:
		s.resetter = rng.IntN(2)
		s.size[s.resetter] = max(s.size[s.resetter], 1000)
	}
	return s
}

// content is the endless stream of one direction.
func (s script) content(dir int) *rand.ChaCha8 {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], s.id)
	seed[8] = byte(dir)
	return rand.NewChaCha8(seed)
}

// speak sends direction dir. It reports nothing where a reset is part of the script.
func (s script) speak(c duplex, dir int) error {
	rng := rand.New(rand.NewPCG(s.id, uint64(dir)))
	src := s.content(dir)
	buf := make([]byte, 70000)
	end := s.size[dir]
	if s.resetter == dir {
		end /= 2
	}
	for sent := 0; sent < end; {
		n := 1 + rng.IntN(len(buf))
		if s.drip {
			n = 1 + rng.IntN(3000)
			if rng.IntN(2) == 0 {
				n = 1
			}
		}
		b := buf[:min(n, end-sent)]
		_, _ = src.Read(b)
		if _, err := c.Write(b); err != nil {
			return err
		}
		sent += len(b)
		if rng.IntN(50) == 0 {
			time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
		}
	}
	if s.resetter == dir {
		reset(c)
		return nil
	}
	return c.CloseWrite()
}

var (
	errContent = errors.New("content differs")
	errWhole   = errors.New("a clean end of a stream that was reset")
)

// listen receives direction dir and compares it with what the other end sends.
func (s script) listen(c duplex, dir int) (total int, err error) {
	rng := rand.New(rand.NewPCG(s.id, uint64(dir)+2))
	src := s.content(dir)
	got, want := sha256.New(), sha256.New()
	buf, check := make([]byte, 32<<10), make([]byte, 32<<10)
	for {
		b := buf
		if s.slow[dir] {
			b = buf[:1+rng.IntN(3000)]
			if rng.IntN(30) == 0 {
				time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond)
			}
		}
		n, err := c.Read(b)
		total += n
		_, _ = src.Read(check[:n])
		got.Write(b[:n])
		want.Write(check[:n])
		if err == nil {
			continue
		}
		switch {
		case [32]byte(got.Sum(nil)) != [32]byte(want.Sum(nil)):
			return total, fmt.Errorf("%w after %d bytes", errContent, total)
		case err == io.EOF && s.resetter == dir:
			return total, fmt.Errorf("%w after %d bytes", errWhole, total)
		case err == io.EOF && s.size[dir] >= 0 && total != s.size[dir]:
			return total, fmt.Errorf("%w: %d of %d bytes", errContent, total, s.size[dir])
		case err != io.EOF && s.resetter < 0:
			return total, err
		}
		return total, nil
	}
}

// play does the part of the end that sends direction own.
func (s script) play(c duplex, own int) error {
	defer c.Close()
	var spoke, heard error
	var wg sync.WaitGroup
	ended := make(chan struct{})
	wg.Go(func() {
		defer close(ended)
		_, heard = s.listen(c, 1-own)
	})
	wg.Go(func() {
		if s.after[own] {
			<-ended
		}
		spoke = s.speak(c, own)
	})
	wg.Wait()
	switch {
	case errors.Is(heard, errWhole) && errors.Is(spoke, syscall.ECONNRESET):
		// The kernel reports a reset once, and the writer was told.
	case errors.Is(heard, errWhole) || errors.Is(heard, errContent) || s.resetter < 0 && heard != nil:
		return fmt.Errorf("read: %w", heard)
	case s.resetter < 0 && spoke != nil:
		return fmt.Errorf("write: %w", spoke)
	}
	return nil
}

// Hundreds of connections at once in every mode, with every temper of peer: each byte
// arrives once and in order, and a stream that was cut never ends as if it were whole.
func TestTraffic(t *testing.T) {
	for _, tc := range []struct {
		name    string
		gate    relay.Gate
		version uint16 // 0: passthrough
		conns   int
	}{
		{"copy", relay.Gate{Off: true}, 0, 80},
		{"splice by traffic", relay.Gate{Auto: true}, 0, 80},
		{"splice at once", relay.Gate{}, 0, 60},
		{"splice after 100 kB", relay.Gate{AfterBytes: 100_000}, 0, 60},
		{"TLS 1.2", relay.Gate{}, tls.VersionTLS12, 60},
		{"TLS 1.3", relay.Gate{}, tls.VersionTLS13, 60},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(o *Options) { o.Splice, o.Handshake, o.Connect = tc.gate, 20*time.Second, 20*time.Second })
			scripts := sync.Map{}
			var hello []byte
			ready := make(chan struct{}) // hello is set
			port := backend(t, "127.0.0.1:0", func(c net.Conn) {
				<-ready
				head := make([]byte, len(hello)+8)
				_, err := io.ReadFull(c, head)
				if err == io.EOF && tc.version != 0 {
					return // the client was gone by the time the app accepted
				}
				if err != nil || string(head[:len(hello)]) != string(hello) {
					t.Errorf("the app got %d bytes of hello and id: %v", len(head), err)
					return
				}
				id := binary.BigEndian.Uint64(head[len(hello):])
				s, ok := scripts.Load(id)
				if !ok {
					t.Errorf("the app got the id %x", id)
					return
				}
				if err := s.(script).play(c.(*net.TCPConn), relay.ToClient); err != nil {
					t.Errorf("%+v, app: %v", s, err)
				}
			})
			r.instance("i1", testApp, "127.0.0.1", open)
			name := fmt.Sprintf("%s-%d.%s", testApp, port, testBase)
			if tc.version == 0 {
				name = fmt.Sprintf("%s-%ds.%s", testApp, port, testBase)
				hello = recordHello(t, name, nil)
			}
			close(ready)
			var wg sync.WaitGroup
			for i := range tc.conns {
				s := newScript(uint64(tc.version)<<32|uint64(i)+1, 300_000)
				scripts.Store(s.id, s)
				wg.Go(func() {
					raw, err := net.Dial("tcp", r.addr)
					if err != nil {
						t.Error(err)
						return
					}
					c := duplex(raw.(*net.TCPConn))
					if s.small {
						_ = raw.(*net.TCPConn).SetReadBuffer(4096)
						_ = raw.(*net.TCPConn).SetWriteBuffer(4096)
					}
					if tc.version == 0 {
						_, err = c.Write(hello)
					} else {
						c = tls.Client(raw, &tls.Config{ServerName: name, RootCAs: r.pool, MaxVersion: tc.version})
					}
					if err == nil {
						_, err = c.Write(binary.BigEndian.AppendUint64(nil, s.id))
					}
					if err != nil {
						t.Errorf("%+v, client: %v", s, err)
						return
					}
					if err := s.play(c, relay.ToApp); err != nil {
						t.Errorf("%+v, client: %v", s, err)
					}
				})
			}
			wg.Wait()
			r.quiet()
			r.sameBytes()
			if engaged := r.SpliceEngaged() > 0; tc.version == 0 && engaged == tc.gate.Off {
				t.Errorf("splice engaged: %v", engaged)
			}
		})
	}
}

// sameBytes checks that records and counters tell the same story.
func (r *rig) sameBytes() {
	r.t.Helper()
	var up, down, countedUp, countedDown, ended uint64
	r.hooks.mu.Lock()
	records := uint64(len(r.hooks.records))
	for _, rec := range r.hooks.records {
		up += rec.Up
		down += rec.Down
	}
	r.hooks.mu.Unlock()
	for _, w := range r.workers {
		countedUp += w.relay.Copied[relay.ToApp].Load() + w.relay.Spliced[relay.ToApp].Load() + w.tls.Decrypted.Load()
		countedDown += w.relay.Copied[relay.ToClient].Load() + w.relay.Spliced[relay.ToClient].Load() + w.tls.Encrypted.Load()
		for m := range w.stats.ended {
			for why := range w.stats.ended[m] {
				ended += w.stats.ended[m][why].Load()
			}
		}
	}
	if up != countedUp || down != countedDown || records != ended {
		r.t.Errorf("records tell %d up, %d down, %d connections; counters %d, %d, %d", up, down, records, countedUp, countedDown, ended)
	}
}

// quiet waits until no connection is left and checks that nothing is counted any more.
func (r *rig) quiet() {
	r.t.Helper()
	end := time.Now().Add(10 * time.Second)
	for r.Connections() > 0 && time.Now().Before(end) {
		time.Sleep(5 * time.Millisecond)
	}
	if n := r.Connections(); n != 0 {
		r.t.Errorf("%d connections are left", n)
	}
	if n := r.half.total.Load(); n != 0 {
		r.t.Errorf("%d connections count as half-open", n)
	}
	for i := range r.half.sources {
		if n := r.half.sources[i].Load(); n != 0 {
			r.t.Errorf("a source keeps %d half-open connections", n)
		}
	}
	if n := r.held.Load(); n != 0 {
		r.t.Errorf("%d connections count as held", n)
	}
	for _, w := range r.workers {
		for m := range w.stats.active {
			if n := w.stats.active[m].Load(); n != 0 {
				r.t.Errorf("%d connections count as %s", n, modeNames[m])
			}
		}
	}
	snap := r.Snapshot()
	snap.Instances(func(i *routing.Instance) bool {
		if n := i.State.Active.Load(); n != 0 {
			r.t.Errorf("instance %s keeps %d connections", i.ID, n)
		}
		return true
	})
	snap.Apps(func(a *routing.App) bool {
		if n := a.State.Active.Load(); n != 0 {
			r.t.Errorf("app %s keeps %d connections", a.ID, n)
		}
		return true
	})
	if n := r.Panics(); n != 0 {
		r.t.Errorf("%d panics", n)
	}
}
