package soak

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/backend"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// limit bounds the life of any connection at the app: whoever is silent longer was forgotten by the gateway.
const limit = 10 * time.Minute

// app is the backend: it plays its part of each connection's plan and keeps book.
type app struct {
	book      *book
	release   chan struct{} // closed: nobody is slow or stalled any more
	tiny      int           // receive buffer of slow readers in bytes; the kernel doubles it
	listeners []*net.TCPListener
	wg        sync.WaitGroup
}

// startApp listens where the rig's names lead to; plain serves terminated connections.
func startApp(ip netip.Addr) (*app, error) {
	a := &app{book: newBook("app"), tiny: tiny, release: make(chan struct{})}
	for _, port := range []uint16{backend.RequestPassthrough, backend.RequestPlain} {
		l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, port)))
		if err != nil {
			a.close()
			return nil, fmt.Errorf("starting the app: %w", err)
		}
		a.listeners = append(a.listeners, l)
		a.wg.Go(func() { a.accept(l, port == backend.RequestPassthrough) })
	}
	return a, nil
}

// close stops accepting; connections go on.
func (a *app) close() {
	for _, l := range a.listeners {
		l.Close()
	}
	a.wg.Wait()
}

func (a *app) accept(l *net.TCPListener, passthrough bool) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			a.book.fail("accepting", err)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		a.book.opened(1)
		go func() {
			defer a.book.opened(-1)
			defer c.Close()
			a.serve(c, passthrough)
		}()
	}
}

func (a *app) serve(c *net.TCPConn, passthrough bool) {
	c.SetDeadline(time.Now().Add(limit))
	slow := &throttle{r: c, stop: a.release}
	in := buffered(slow)
	var hello uint32
	if passthrough {
		start, err := in.Peek(5)
		var n int
		if err == nil {
			n, err = wire.HelloLen(start)
		}
		if errors.Is(err, wire.ErrNotHello) {
			a.book.fail("first bytes", fmt.Errorf("%w: %w", err, ErrCorrupt))
			return
		}
		var b []byte
		if err == nil {
			b, err = in.Peek(n)
		}
		if err != nil {
			a.book.nameless()
			return
		}
		hello = uint32(wire.Checksum(b))
		in.Discard(n)
	}
	r := newReceiver(in, 0, toApp)
	h, err := r.next()
	switch {
	case errors.Is(err, ErrCorrupt):
		a.book.fail("opening frame", err)
		return
	case err != nil:
		a.book.nameless()
		return
	case h.typ != frameOpen || h.kind >= kindCount:
		a.book.fail("opening frame", fmt.Errorf("frame of type %d, %v: %w", h.typ, h.kind, ErrCorrupt))
		return
	}
	p := newPlan(h.kind, h.a, h.b)
	a.book.begin(p.kind)
	if uint32(h.c) != hello {
		a.book.fail("ClientHello", fmt.Errorf("checksum %#x, the client sent %#x: %w", hello, h.c, ErrCorrupt))
		return
	}
	r.start = place(p.id, toApp)
	e := &end{conn: c, tcp: c, stop: a.release, r: r, s: newSender(c, p.id, toClient)}
	switch p.kind {
	case Requests, Quiet, Hasty:
		err = e.answer()
	case SlowApp:
		c.SetReadBuffer(a.tiny)
		slow.slowly(p.slow)
		err = e.exchange(p.app, false)
	case Stalled:
		c.SetReadBuffer(a.tiny)
		slow.free, slow.hold = p.free, a.release
		err = e.exchange(p.app, false)
	case ClientResets, AppResets:
		if p.kind == AppResets {
			defer time.AfterFunc(p.reset, e.reset).Stop()
		}
		err = e.exchange(p.app, true)
	default:
		err = e.exchange(p.app, false)
	}
	a.book.end(&p, e.s.sent, e.r.received, err)
}
