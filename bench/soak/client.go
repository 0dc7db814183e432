package soak

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// Spec tells the client what to do.
type Spec struct {
	// What is "mix", "idle" or "pressure".
	What string         `json:"what"`
	Addr netip.AddrPort `json:"addr"`
	// Pass and Term are the names whose connections are forwarded and terminated.
	Pass string `json:"pass"`
	Term string `json:"term"`
	Cert []byte `json:"cert"` // DER, the only one trusted
	Seed uint64 `json:"seed"`

	Conns int `json:"conns"` // all of them
	TLS   int `json:"tls"`   // of which terminated
	// Ramp is how many connections are opened a second at the beginning.
	Ramp int `json:"ramp"`
	// Duration of the mix from when all are open.
	Duration time.Duration `json:"duration"`
	// Extra are the small connections that must work while Conns are stalled (pressure).
	Extra int `json:"extra"`
}

// Outcome is what the client reports.
type Outcome struct {
	Side
	// OpenMin and OpenMean are over looks ten times a second from when all were open until the end of Duration.
	OpenMin  int64   `json:"open_min"`
	OpenMean float64 `json:"open_mean"`
	// Served and Refused count Extra.
	Served  int `json:"served"`
	Refused int `json:"refused"`
	// SmallError is why the first of Extra was refused.
	SmallError string `json:"small_error,omitempty"`
	// ConnectMean and ConnectMost are how long connect(2) took in milliseconds, with the harness's own delays.
	ConnectMean float64 `json:"connect_mean_ms"`
	ConnectMost float64 `json:"connect_most_ms"`
	// Handshakes by whether they resumed a session.
	Full    uint64 `json:"full"`
	Resumed uint64 `json:"resumed"`
}

const (
	connectTimeout = 20 * time.Second
	// patience is how long connections may take to come to their end when told to.
	patience = 60 * time.Second
)

// client opens connections and plays its part of their plans.
type client struct {
	spec   Spec
	book   *book
	hellos [2][]byte // of one key share, and of a post-quantum one
	tls    [2]*tls.Config
	stop   chan struct{}
	until  time.Time // when the last byte must have come
	tiny   int       // as in app

	mu            sync.Mutex
	full, resumed uint64
	connects      int
	took, most    time.Duration // of connects
}

func newClient(s Spec) (*client, error) {
	c := &client{spec: s, tiny: tiny, book: newBook("client"), stop: make(chan struct{})}
	for i := range c.hellos {
		var err error
		if c.hellos[i], err = wire.Hello(s.Pass, i == 1); err != nil {
			return nil, err
		}
	}
	if len(s.Cert) == 0 {
		return c, nil
	}
	leaf, err := x509.ParseCertificate(s.Cert)
	if err != nil {
		return nil, fmt.Errorf("certificate to trust: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	for i := range c.tls {
		c.tls[i] = &tls.Config{RootCAs: pool, ServerName: s.Term, CurvePreferences: []tls.CurveID{tls.X25519}}
	}
	c.tls[1].ClientSessionCache = tls.NewLRUClientSessionCache(8)
	return c, nil
}

// terminated says how the slot's connections are made.
func (c *client) terminated(slot int) bool { return slot < c.spec.TLS }

// connect opens a TCP connection, with a tiny receive buffer if asked for.
func (c *client) connect(small bool) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: connectTimeout, KeepAlive: -1}
	if small {
		d.Control = func(_, _ string, raw syscall.RawConn) error {
			var err error
			if cerr := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, c.tiny)
			}); cerr != nil {
				return cerr
			}
			return err
		}
	}
	begin := time.Now()
	conn, err := d.Dial("tcp4", c.spec.Addr.String())
	if err != nil {
		return nil, err
	}
	took := time.Since(begin)
	c.mu.Lock()
	c.connects++
	c.took, c.most = c.took+took, max(c.most, took)
	c.mu.Unlock()
	t := conn.(*net.TCPConn)
	t.SetDeadline(c.until)
	return t, nil
}

// begin sends what comes before the stream, and its opening frame.
func (c *client) begin(t *net.TCPConn, slot int, p *plan) (*end, *throttle, error) {
	e := &end{conn: t, tcp: t, stop: c.stop}
	var hello uint32
	if c.terminated(slot) {
		s := tls.Client(t, c.tls[slot%2])
		ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
		defer cancel()
		if err := s.HandshakeContext(ctx); err != nil {
			return nil, nil, fmt.Errorf("TLS handshake: %w", err)
		}
		t.SetDeadline(c.until)
		c.mu.Lock()
		if s.ConnectionState().DidResume {
			c.resumed++
		} else {
			c.full++
		}
		c.mu.Unlock()
		e.conn = s
	} else {
		h := c.hellos[p.id&1]
		hello = uint32(wire.Checksum(h))
		if _, err := t.Write(h); err != nil {
			return nil, nil, fmt.Errorf("sending the ClientHello: %w", err)
		}
	}
	slow := &throttle{r: e.conn, stop: c.stop}
	e.s, e.r = newSender(e.conn, p.id, toApp), newReceiver(buffered(slow), p.id, toClient)
	if err := e.s.open(p.kind, p.id, c.spec.Seed, hello); err != nil {
		return nil, nil, fmt.Errorf("sending the opening frame: %w", err)
	}
	return e, slow, nil
}

// live lives the life of one connection. ready is called when its opening is over.
func (c *client) live(slot int, seq uint32, k Kind, ready func()) {
	p := newPlan(k, uint64(slot)<<32|uint64(seq), c.spec.Seed)
	c.book.begin(k)
	var sent, received uint64
	err := func() error {
		t, err := c.connect(k == SlowClient || k == Stalled)
		if err != nil {
			return err
		}
		c.book.opened(1)
		defer c.book.opened(-1)
		defer t.Close()
		ready()
		if k == Hasty && p.haste < 2 {
			if p.haste == 1 {
				h := c.hellos[0]
				_, err = t.Write(h[:len(h)/2])
			}
			return err
		}
		e, slow, err := c.begin(t, slot, &p)
		if err != nil {
			return err
		}
		err = c.play(e, slow, &p)
		sent, received = e.s.sent, e.r.received
		return err
	}()
	c.book.end(&p, sent, received, err)
}

func (c *client) play(e *end, slow *throttle, p *plan) error {
	switch p.kind {
	case Requests, Quiet:
		for _, q := range p.requests {
			if err := e.ask(q); err != nil {
				return err
			}
			if closed(c.stop) {
				break
			}
			pause(q.pause, c.stop)
		}
		return c.leave(e)
	case Hasty:
		switch p.haste {
		case 2:
			e.conn.Close()
		case 3:
			e.reset()
		default:
			e.s.data(500, 500) // and not wait for the answer
			e.conn.Close()
		}
		return nil
	case ClientResets:
		done := make(chan struct{})
		defer close(done)
		go func() {
			t := time.NewTimer(p.reset)
			defer t.Stop()
			select {
			case <-t.C:
			case <-c.stop:
			case <-done:
			}
			e.reset()
		}()
		return e.exchange(p.client, true)
	case AppResets:
		return e.exchange(p.client, true)
	case SlowClient:
		slow.slowly(p.slow)
	case Stalled:
		slow.free, slow.hold = p.free, c.stop
	}
	return e.exchange(p.client, false)
}

// leave ends an asking connection in order.
func (c *client) leave(e *end) error {
	if err := e.finish(); err != nil {
		return err
	}
	return e.drain(func() {})
}

// mix keeps Conns connections open. up is called when all are, for the first time.
func (c *client) mix(up func() error) (Outcome, error) {
	s := c.spec
	ramp := time.Duration(s.Conns) * time.Second / time.Duration(s.Ramp)
	c.until = time.Now().Add(2*ramp + s.Duration + connectTimeout + patience)
	var wg, first sync.WaitGroup
	first.Add(s.Conns)
	begin := time.Now()
	for i := range s.Conns {
		if due := begin.Add(time.Duration(i) * time.Second / time.Duration(s.Ramp)); time.Until(due) > time.Millisecond {
			time.Sleep(time.Until(due))
		}
		wg.Go(func() {
			r := rand.New(rand.NewPCG(c.spec.Seed, uint64(i)))
			var once sync.Once
			ready := func() { once.Do(first.Done) }
			defer ready()
			for seq := uint32(0); !closed(c.stop); seq++ {
				c.live(i, seq, chooseKind(r), ready)
				if seq > 0 {
					ready() // it could not even connect: that is on the book, do not wait for it
				}
				pause(time.Duration(r.IntN(20))*time.Millisecond, c.stop)
			}
		})
	}
	first.Wait()
	err := up()
	var looks, sum int64
	low := c.book.open()
	for end := time.Now().Add(s.Duration); err == nil && time.Now().Before(end); looks++ {
		n := c.book.open()
		low, sum = min(low, n), sum+n
		time.Sleep(100 * time.Millisecond)
	}
	close(c.stop)
	wg.Wait()
	out := c.outcome()
	out.OpenMin, out.OpenMean = low, float64(sum)/float64(max(looks, 1))
	return out, err
}

func (c *client) outcome() Outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return Outcome{Side: c.book.side(), Full: c.full, Resumed: c.resumed,
		ConnectMean: ms(c.took) / float64(max(c.connects, 1)), ConnectMost: ms(c.most)}
}

// several calls f for from..to-1 with at most Ramp begun a second.
func (c *client) several(from, to int, f func(i int) error) error {
	const workers = 32
	errs := make(chan error, to-from+1)
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				if err := f(i); err != nil {
					errs <- err
				}
			}
		})
	}
	begin := time.Now()
	for i := from; i < to; i++ {
		time.Sleep(time.Until(begin.Add(time.Duration(i-from) * time.Second / time.Duration(c.spec.Ramp))))
		next <- i
	}
	close(next)
	wg.Wait()
	close(errs)
	return <-errs // nil if there is none
}

// idle opens Conns connections (all terminated if TLS is not 0), uses each once, and lets them be. step is called
// with "primed" when the first few are open, "open" when all are, and "closed" when none is any more.
func (c *client) idle(step func(string) error) (Outcome, error) {
	c.until = time.Now().Add(limit)
	n := primed + c.spec.Conns
	if c.spec.TLS > 0 {
		c.spec.TLS = n
	}
	ends, plans := make([]*end, n), make([]plan, n)
	defer func() {
		for _, e := range ends {
			if e != nil {
				e.tcp.Close()
			}
		}
	}()
	open := func(i int) error {
		plans[i] = newPlan(Quiet, uint64(i)<<32, c.spec.Seed)
		c.book.begin(Quiet)
		t, err := c.connect(false)
		if err == nil {
			c.book.opened(1)
			if ends[i], _, err = c.begin(t, i, &plans[i]); err != nil {
				t.Close()
			}
		}
		if err == nil {
			err = ends[i].ask(plans[i].requests[0])
		}
		if err != nil {
			return fmt.Errorf("idle connection %d: %w", i, err)
		}
		return nil
	}
	if err := c.several(0, primed, open); err != nil {
		return c.outcome(), err
	}
	if err := step("primed"); err != nil {
		return c.outcome(), err
	}
	if err := c.several(primed, n, open); err != nil {
		return c.outcome(), err
	}
	if err := step("open"); err != nil {
		return c.outcome(), err
	}
	// They must have survived doing nothing.
	_ = c.several(0, n, func(i int) error {
		e := ends[i]
		err := e.ask(plans[i].requests[1])
		if err == nil {
			err = c.leave(e)
		}
		e.tcp.Close()
		c.book.opened(-1)
		c.book.end(&plans[i], e.s.sent, e.r.received, err)
		return nil
	})
	return c.outcome(), step("closed")
}

// pressure lets Conns connections stall in both directions, then tries Extra small ones, then lets all go on.
func (c *client) pressure(step func(string) error) (Outcome, error) {
	c.until = time.Now().Add(limit)
	var wg sync.WaitGroup
	for i := range c.spec.Conns {
		wg.Go(func() { c.live(i, 0, Stalled, func() {}) })
		time.Sleep(time.Second / time.Duration(c.spec.Ramp))
	}
	if err := step("stalled"); err != nil {
		return c.outcome(), err
	}
	var ends []*end
	var served, refused int
	var why string
	refuse := func(err error) {
		if refused++; refused == 1 {
			why = err.Error()
		}
	}
	for i := range c.spec.Extra {
		e, err := c.small(i)
		if err != nil {
			refuse(err)
			continue
		}
		ends = append(ends, e)
	}
	err := step("tried")
	for _, e := range ends {
		e.tcp.SetDeadline(time.Now().Add(smallTimeout))
		if err := c.leave(e); err != nil {
			refuse(err)
		} else {
			served++
		}
		e.tcp.Close()
	}
	close(c.stop)
	wg.Wait()
	out := c.outcome()
	out.Served, out.Refused, out.SmallError = served, refused, why
	return out, err
}

// smallTimeout is how long a small connection may take under pressure.
const smallTimeout = 5 * time.Second

// small opens a connection and makes one request.
func (c *client) small(i int) (*end, error) {
	p := newPlan(Quiet, uint64(c.spec.Conns+i)<<32, c.spec.Seed)
	t, err := c.connect(false)
	if err != nil {
		return nil, err
	}
	t.SetDeadline(time.Now().Add(smallTimeout))
	e, _, err := c.begin(t, c.spec.Conns+i, &p)
	if err == nil {
		err = e.ask(p.requests[0])
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return e, nil
}
