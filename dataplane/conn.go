package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/clienthello"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/loop"
	"github.com/dstack-gw/dstack-gw/dataplane/proxyproto"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
	"github.com/dstack-gw/dstack-gw/dataplane/terminate"
)

type state uint8

const (
	stateHello     state = iota // reading PROXY header and ClientHello
	stateResolve                // a goroutine asks DNS
	statePolicy                 // waits for a port policy
	stateHandshake              // TLS
	stateDial
	stateRelay
	stateClosed
)

// conn is one client connection. Everything happens on its worker's loop.
type conn struct {
	w             *worker
	before, after *conn // of all connections of the worker
	id            uint64
	cli           loop.Sock
	peer          netip.AddrPort // of the socket
	st            state
	mode          hostname.Mode
	// statMode indexes the counters; modeUnknown until the name was read.
	statMode uint8
	waiting  bool // counted in the half-open limits
	counted  bool // counted in app.State.Active
	inPP     bool // pp came from the client's side
	opened   bool // what the app gets first (PROXY header, hello) is out
	queued   bool // waits for a turn that it asked for

	tm       loop.Timer
	start    int64
	dialFrom int64
	deadline int64 // of the current phase, loop clock
	lastMove int64 // when bytes last came or left
	unacked  int   // of both sockets, when last looked at

	buf   []byte // bytes read and not consumed (pooled)
	pp    proxyproto.Header
	name  string
	want  string // id that the name stands for
	port  uint16
	base  *routing.Base
	app   *routing.App
	cands routing.Candidates
	next  int // candidate to dial next
	first attempt
	more  []*attempt // attempts after the first
	won   *attempt

	pair relay.Pair
	sess *terminate.Session
	hs   int64 // when the handshake began
}

// attempt is one dial to one instance.
type attempt struct {
	c       *conn
	sock    loop.Sock
	inst    *routing.Instance
	began   int64
	pending bool
}

func (w *worker) begin(fd int, peer netip.AddrPort) {
	c := &conn{w: w, id: w.s.ids.Add(1), peer: peer, statMode: modeUnknown, start: w.l.Now()}
	defer w.l.Contain(c)
	c.cli = loop.Sock{FD: fd, Readable: true, Writable: true}
	c.tm.H = c
	w.link(c)
	w.stats.active[modeUnknown].Add(1)
	c.deadline = c.start + int64(w.s.opt.Handshake)
	if w.s.opt.InboundPROXY {
		c.deadline = c.start + int64(w.s.opt.PPHeader)
	}
	c.readHello()
}

// Ready implements loop.Handler for the client's socket.
func (c *conn) Ready(ev loop.Event) {
	if ev == 0 {
		c.queued = false
	}
	c.cli.Note(ev)
	switch c.st {
	case stateHello:
		c.readHello()
	case stateHandshake:
		c.handshake()
	case stateRelay:
		c.relay()
		c.failedAfterEnd(ev, &c.cli, relay.ToApp)
	case stateResolve, statePolicy, stateDial:
		// The client has nothing to say in between; only its disappearance matters.
		if ev&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			c.close(ReasonClientGone, c.cli.Err())
		}
	}
}

// Abort implements loop.Aborter.
func (c *conn) Abort(err error) { c.close(ReasonInternal, err) }

// ---- reading the hello ----

func (c *conn) readHello() {
	w := c.w
	for {
		scratch := w.relay.Scratch
		limit := min(len(scratch), clienthello.MaxSize+proxyproto.MaxSize)
		n, err := c.cli.Recv(scratch[:limit])
		if err == loop.ErrWouldBlock {
			c.awaitHello()
			return
		}
		if err == io.EOF {
			c.close(ReasonNoSNI, errors.New("client closed before a server name was read"))
			return
		}
		if err != nil {
			c.close(ReasonClientGone, err)
			return
		}
		in := scratch[:n]
		if c.buf != nil {
			c.buf = w.relay.Extend(c.buf, in)
			in = c.buf
		}
		if w.s.opt.InboundPROXY && !c.inPP {
			h, used, err := proxyproto.Parse(in)
			if err == proxyproto.ErrIncomplete {
				c.keep(in)
				continue
			}
			if err == nil && !c.trusted() {
				err = fmt.Errorf("PROXY header from %s, which is not in core.proxy.pp_trusted_sources", c.peer.Addr())
			}
			if err != nil {
				c.close(ReasonPPHeader, err)
				return
			}
			c.pp, c.inPP = h, true
			in = in[used:]
			if c.buf != nil {
				c.buf = c.buf[:copy(c.buf, in)]
				in = c.buf
			}
			c.deadline = w.l.Now() + int64(w.s.opt.Handshake)
			if c.tm.Armed() {
				c.armDeadline()
			}
			if len(in) == 0 {
				c.dropBuf()
				continue
			}
		}
		name, err := clienthello.SNI(in, w.name[:0])
		if err == clienthello.ErrIncomplete {
			c.keep(in)
			continue
		}
		if err != nil {
			c.close(ReasonNoSNI, err)
			return
		}
		c.name = string(name)
		c.unwait()
		c.route(in)
		return
	}
}

func (c *conn) trusted() bool {
	src := c.w.s.opt.TrustedSources
	if len(src) == 0 {
		return true
	}
	for _, p := range src {
		if p.Contains(c.peer.Addr()) {
			return true
		}
	}
	return false
}

// awaitHello counts the connection as half-open and waits for more bytes.
func (c *conn) awaitHello() {
	w := c.w
	if !c.waiting {
		if !w.s.half.enter(c.peer.Addr()) {
			c.close(ReasonOverload, errors.New("too many connections without a complete ClientHello"))
			return
		}
		c.waiting = true
	}
	if !c.watch() {
		return
	}
	if !c.tm.Armed() {
		c.armDeadline()
	}
}

func (c *conn) unwait() {
	if c.waiting {
		c.waiting = false
		c.w.s.half.leave(c.peer.Addr())
	}
}

func (c *conn) watch() bool {
	if c.cli.Watched() {
		return true
	}
	if err := c.cli.Watch(c.w.l, c); err != nil {
		c.close(ReasonInternal, err)
		return false
	}
	return true
}

func (c *conn) armDeadline() { c.w.l.Arm(&c.tm, time.Duration(c.deadline-c.w.l.Now())) }

func (c *conn) phase(d time.Duration) {
	c.deadline = c.w.l.Now() + int64(d)
	c.armDeadline()
}

// ---- routing ----

// source is the client's address for logs and limits: the PROXY header's if there is one.
func (c *conn) source() netip.AddrPort {
	if c.inPP && !c.pp.Local && c.pp.Src.IsValid() {
		return c.pp.Src
	}
	return c.peer
}

// route decides what the name means. hello may stand in the worker's scratch buffer.
func (c *conn) route(hello []byte) {
	label, baseName, ok := hostname.Split(c.name)
	if !ok {
		c.close(ReasonNoSNI, fmt.Errorf("invalid sni %q", c.name))
		return
	}
	snap := c.w.s.snap.Load()
	base := snap.Base(baseName)
	if base == nil {
		id, port, err, ok := c.w.s.opt.Hooks.CachedCustom(c.name)
		if !ok {
			c.keep(hello)
			c.resolve()
			return
		}
		c.custom(hello, id, port, err)
		return
	}
	t, err := hostname.ParseLabel(label)
	if err != nil {
		c.close(ReasonUnknownApp, err)
		return
	}
	c.base = base
	c.setMode(t.Mode)
	c.port, c.want = t.Port, t.ID
	switch svc := t.Service(); svc {
	case hostname.GatewayService, hostname.HealthService:
		if err := svc.CheckPort(t.Port); err != nil {
			c.close(ReasonPortPolicy, err)
			return
		}
		c.builtin(svc, hello)
		return
	case hostname.LocalhostService:
		if c.w.s.opt.LocalhostBackend {
			c.localhost(hello)
			return
		}
	}
	c.target(snap, hello)
}

func (c *conn) setMode(m hostname.Mode) {
	c.mode = m
	c.w.stats.active[c.statMode].Add(-1)
	c.statMode = modeTerminate
	if m == hostname.Passthrough {
		c.statMode = modePassthrough
	}
	c.w.stats.active[c.statMode].Add(1)
}

// keep moves hello into a buffer of the connection.
func (c *conn) keep(hello []byte) {
	if c.buf == nil {
		c.buf = c.w.relay.Chunk(hello)
	}
}

func (c *conn) resolve() {
	c.st = stateResolve
	if !c.watch() {
		return
	}
	o := &c.w.s.opt
	c.phase(o.Resolve + time.Second) // the context below is the limit; this one is its safety net
	name, w := c.name, c.w
	w.s.bg.Go(func() {
		ctx, cancel := context.WithTimeout(w.s.ctx, o.Resolve)
		defer cancel()
		id, port, err := o.Hooks.ResolveCustom(ctx, name)
		_ = w.l.Post(func() { c.resolved(id, port, err) })
	})
}

func (c *conn) resolved(id string, port uint16, err error) {
	defer c.w.l.Contain(c)
	if c.st == stateResolve {
		c.custom(c.buf, id, port, err)
	}
}

func (c *conn) custom(hello []byte, id string, port uint16, err error) {
	if err != nil {
		c.close(ReasonDNS, fmt.Errorf("app address of %q: %w", c.name, err))
		return
	}
	c.setMode(hostname.Passthrough)
	c.port, c.want = port, id
	if id == hostname.LocalhostID && c.w.s.opt.LocalhostBackend {
		c.localhost(hello)
		return
	}
	c.target(c.w.s.snap.Load(), hello)
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

func (c *conn) localhost(hello []byte) {
	c.cands.Add(&routing.Instance{ID: hostname.LocalhostID, Addr: loopback, Trusted: true, State: new(routing.State)})
	c.admit(hello)
}

// target finds the instances that may serve the id.
func (c *conn) target(snap *routing.Snapshot, hello []byte) {
	id := c.want
	inst := snap.Instance(id)
	if inst != nil {
		c.app = snap.App(inst.AppID)
		c.cands.Add(inst)
	} else if app := snap.App(id); app != nil {
		c.app = app
		app.Choose(&c.cands, c.w.s.opt.Selection, time.Now().Unix(), c.w.s.Mono())
		if c.cands.Len() == 0 {
			c.close(ReasonNoInstance, fmt.Errorf("app %s: none of its %d instance(s) has a recent WireGuard handshake", id, len(app.Instances)))
			return
		}
	} else {
		c.close(ReasonUnknownApp, fmt.Errorf("app %s not found", id))
		return
	}

	// Drop candidates whose port policy refuses the port.
	n := c.cands.Len()
	unknown := false
	c.cands.Filter(func(i *routing.Instance) bool {
		v, _ := i.Policy.Check(c.port)
		if v == routing.Unknown {
			unknown = true
			c.w.s.opt.Hooks.NeedPolicy(i.ID)
		}
		return v == routing.Allow
	})
	if c.cands.Len() == 0 && inst == nil && n < len(c.app.Instances) {
		// Instances that nobody may use have no connections, so they come first always.
		c.app.ChooseFor(&c.cands, c.w.s.opt.Selection, c.port, time.Now().Unix(), c.w.s.Mono())
	}
	switch hold := c.w.s.opt.PolicyHold; {
	case c.cands.Len() > 0:
		c.admit(hello)
	case unknown && c.st == statePolicy:
		// It goes on waiting.
	case unknown && hold > 0:
		c.hold(snap, hello, hold)
	default:
		c.close(ReasonPortPolicy, c.denied(n))
	}
}

// hold waits for a snapshot in which a policy allows the port.
func (c *conn) hold(snap *routing.Snapshot, hello []byte, limit time.Duration) {
	c.keep(hello)
	c.st = statePolicy
	if !c.watch() {
		return
	}
	c.w.held[c] = struct{}{}
	c.w.s.held.Add(1)
	c.phase(limit)
	if c.w.s.snap.Load() != snap {
		c.recheck() // SetSnapshot may have looked at the count before it was raised
	}
}

func (c *conn) denied(n int) error {
	id := ""
	if c.app != nil {
		id = c.app.ID
	}
	return fmt.Errorf("port %d denied by app port policy for %s (%d candidate(s))", c.port, id, n)
}

// recheck routes a held connection again.
func (c *conn) recheck() {
	defer c.w.l.Contain(c)
	if c.st != statePolicy {
		return
	}
	c.cands = routing.Candidates{}
	c.target(c.w.s.snap.Load(), c.buf)
}

func (c *conn) unhold() {
	if _, ok := c.w.held[c]; ok {
		delete(c.w.held, c)
		c.w.s.held.Add(-1)
	}
}

// full refuses the connection if its app has as many as it may.
func (c *conn) full() bool {
	limit := c.w.s.opt.MaxPerApp
	if c.app == nil || limit <= 0 || c.app.State.Active.Load() < limit {
		return false
	}
	c.close(ReasonAppLimit, fmt.Errorf("app %s has %d open connections, the limit of core.proxy.max_connections_per_app", c.app.ID, limit))
	return true
}

// admit starts TLS or the dial.
func (c *conn) admit(hello []byte) {
	c.unhold()
	if c.full() {
		return
	}
	if c.mode == hostname.Passthrough {
		c.dial(hello)
		return
	}
	cfg := c.base.TLS
	if c.mode == hostname.TerminateH2 {
		cfg = c.base.TLSH2
	}
	if cfg == nil {
		c.close(ReasonTLS, fmt.Errorf("no certificate for *.%s is loaded", c.base.Domain))
		return
	}
	c.st = stateHandshake
	c.hs = c.w.l.Now()
	c.sess = terminate.Start(c.w.tls, cfg, &c.cli, net.TCPAddrFromAddrPort(c.peer), nil, hello)
	c.dropBuf()
	c.deadline = c.hs + int64(c.w.s.opt.Handshake)
	if c.tm.Armed() {
		c.armDeadline()
	}
	c.handshake()
}

func (c *conn) handshake() {
	done, err := c.sess.Handshake(c.w.tls)
	if !done {
		if c.watch() && !c.tm.Armed() {
			c.armDeadline()
		}
		return
	}
	if err != nil {
		c.close(ReasonTLS, err)
		return
	}
	c.w.stats.handshake.Observe(time.Duration(c.w.l.Now() - c.hs))
	c.dial(nil)
}

// ---- dialling ----

// dial counts the connection and begins with the first candidate. A client in its TLS
// handshake is not counted: whoever drags it out must not lock others out of the app.
func (c *conn) dial(hello []byte) {
	for c.app != nil && !takeBelow(&c.app.State.Active, c.w.s.opt.MaxPerApp) {
		if c.full() {
			return
		}
	}
	c.counted = c.app != nil
	c.st = stateDial
	c.dialFrom = c.w.l.Now()
	c.deadline = c.dialFrom + int64(c.w.s.opt.Connect)
	c.dialNext(hello)
}

// opening appends what goes to inst before any byte of the client.
func (c *conn) opening(dst []byte, inst *routing.Instance) []byte {
	if inst.Trusted {
		return dst
	}
	if _, pp := inst.Policy.Check(c.port); !pp {
		return dst
	}
	h := c.pp
	if !c.inPP {
		local, err := c.cli.Local()
		if err != nil {
			local = netip.AddrPort{}
		}
		h = proxyproto.New(c.peer, local)
	}
	return h.Append(dst)
}

// dialNext starts the next candidate. hello is what passthrough sends first; it may
// stand in the scratch buffer, so it is stored as soon as the dial has to wait.
func (c *conn) dialNext(hello []byte) {
	w := c.w
	for c.next < c.cands.Len() {
		inst := c.cands.At(c.next)
		a := &c.first
		if c.next > 0 {
			a = &attempt{}
			c.more = append(c.more, a)
		}
		c.next++
		*a = attempt{c: c, inst: inst, began: w.l.Now(), pending: true}
		inst.State.Active.Add(1)
		var err error
		if a.sock, err = loop.Dial(netip.AddrPortFrom(inst.Addr, c.port)); err != nil {
			c.failed(a, err)
			continue
		}
		if c.mode == hostname.Passthrough && c.next == 1 && hello != nil {
			// On a fast path the handshake is over when connect returns; then the hello
			// can leave at once and the loop need not come back for it.
			first := hello
			if open := c.opening(nil, inst); len(open) > 0 {
				first = append(open, hello...)
			}
			n, started, err := a.sock.TrySend(first)
			if err != nil {
				c.failed(a, err)
				continue
			}
			if started {
				if err := a.sock.Watch(w.l, a); err != nil {
					c.close(ReasonInternal, err)
					return
				}
				c.pair.Up.Total = uint64(n)
				w.relay.Copied[relay.ToApp].Add(uint64(n))
				c.pair.Hold(w.relay, first[n:])
				c.dropBuf()
				c.opened = true
				c.win(a)
				return
			}
		}
		if hello != nil {
			c.keep(hello)
			hello = nil
		}
		if err := a.sock.Watch(w.l, a); err != nil {
			c.close(ReasonInternal, err)
			return
		}
		if !c.watch() {
			return
		}
		if w.s.opt.HeadStart > 0 {
			c.armDial()
			return
		}
	}
	if c.st != stateDial {
		return
	}
	for i := range c.more {
		if c.more[i].pending {
			c.armDial()
			return
		}
	}
	if c.first.pending {
		c.armDial()
		return
	}
	c.close(ReasonDial, fmt.Errorf("no instance of %d tried accepted a connection on port %d", c.next, c.port))
}

// armDial waits for the deadline, or for the head start of the next candidate.
func (c *conn) armDial() {
	now := c.w.l.Now()
	at := c.deadline
	if c.next < c.cands.Len() {
		at = min(at, now+int64(c.w.s.opt.HeadStart))
	}
	c.w.l.Arm(&c.tm, time.Duration(at-now))
}

// Ready implements loop.Handler for the app's socket.
func (a *attempt) Ready(ev loop.Event) {
	a.sock.Note(ev)
	c := a.c
	if c.won == a {
		if c.st == stateRelay {
			c.relay()
			c.failedAfterEnd(ev, &a.sock, relay.ToClient)
		}
		return
	}
	if !a.pending || c.st != stateDial {
		return
	}
	if ev&(loop.Out|loop.Hup) == 0 {
		return
	}
	if err := a.sock.Err(); err != nil {
		c.failed(a, err)
		c.dialNext(nil)
		return
	}
	if ev&loop.Out == 0 {
		return
	}
	c.win(a)
}

// Abort implements loop.Aborter.
func (a *attempt) Abort(err error) { a.c.close(ReasonInternal, err) }

func (c *conn) failed(a *attempt, err error) {
	a.pending = false
	a.sock.Close(c.w.l)
	a.inst.State.Active.Add(-1)
	cause := dialOther
	switch {
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM):
		cause = dialShortage
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		cause = dialRefused
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, os.ErrDeadlineExceeded):
		cause = dialTimeout
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		cause = dialUnreachable
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		cause = dialPorts
	}
	if cause != dialShortage && cause != dialPorts { // those are our own faults, not the instance's
		a.inst.State.FailedAt.Store(max(1, c.w.s.Mono()))
	}
	c.w.stats.dialFail[cause].Add(1)
}

// win ends the race: a carries the connection.
func (c *conn) win(a *attempt) {
	w := c.w
	a.pending = false
	c.won = a
	if c.next > 1 {
		c.dropAttempts(a)
	}
	if a.inst.State.FailedAt.Load() != 0 {
		a.inst.State.FailedAt.Store(0)
	}
	now := w.l.Now()
	w.stats.connect.Observe(time.Duration(now - c.dialFrom))
	c.st = stateRelay
	c.lastMove = now
	c.pair.Started = now
	if !c.opened {
		open := c.opening(nil, a.inst)
		if c.sess != nil {
			c.sess.Hold(w.tls, open)
		} else {
			c.pair.Hold(w.relay, append(open, c.buf...))
		}
		c.dropBuf()
	}
	if !c.watch() {
		return
	}
	c.armRelay()
	c.relay()
}

func (c *conn) dropAttempts(keep *attempt) {
	drop := func(a *attempt) {
		if a != keep && a.pending {
			a.pending = false
			a.sock.Close(c.w.l)
			a.inst.State.Active.Add(-1)
		}
	}
	drop(&c.first)
	for _, a := range c.more {
		drop(a)
	}
}

// ---- relaying ----

func (c *conn) relay() {
	var r relay.Result
	var err error
	w := c.w
	if c.sess != nil {
		before := c.sess.Down
		r, err = c.sess.Step(w.tls, &c.cli, &c.won.sock)
		if before == 0 && c.sess.Down > 0 {
			w.stats.firstByte.Observe(time.Duration(w.l.Now() - c.start))
		}
	} else {
		before := c.pair.Down.Total
		r, err = c.pair.Step(w.relay, w.l.Now(), &c.cli, &c.won.sock)
		if before == 0 && c.pair.Down.Total > 0 {
			w.stats.firstByte.Observe(time.Duration(w.l.Now() - c.start))
		}
	}
	if r.Moved > 0 {
		c.lastMove = w.l.Now()
	}
	switch {
	case err != nil:
		side := ""
		if se, ok := err.(*relay.SideError); ok {
			side = se.Side
		}
		switch {
		case side != "app":
			c.close(ReasonClientGone, err)
		case c.ended(relay.ToClient):
			// All that the app had to say was passed on; it closed, and does not want the rest.
			c.close(ReasonNormal, nil)
		default:
			c.close(ReasonAppGone, err)
		}
	case r.Done:
		c.close(ReasonNormal, nil)
	case r.Again && !c.queued:
		c.queued = true
		w.l.Requeue(c)
	}
}

func (c *conn) ended(dir int) bool {
	if c.sess != nil {
		return c.sess.Ended(dir)
	}
	return c.pair.Ended(dir)
}

// failedAfterEnd notices the reset of a peer that had ended its direction before: it is
// not read from any more, and nothing may ever be written to it.
func (c *conn) failedAfterEnd(ev loop.Event, s *loop.Sock, dir int) {
	if c.st != stateRelay || ev&unix.EPOLLERR == 0 || !c.ended(dir) {
		return
	}
	err := s.Err()
	switch {
	case err == nil:
	case dir == relay.ToApp:
		c.close(ReasonClientGone, &relay.SideError{Side: "client", Err: err})
	default:
		c.close(ReasonNormal, nil) // as in relay: the app closed
	}
}

// armRelay sets the timer to whatever comes first: a limit, or the next look at what
// the kernel holds.
func (c *conn) armRelay() {
	now := c.w.l.Now()
	o := &c.w.s.opt
	at := int64(forever)
	if o.Idle > 0 {
		at = min(c.lastMove+int64(o.Idle), now+int64(o.Idle/4))
	}
	if o.Total > 0 {
		at = min(at, c.start+int64(o.Total))
	}
	if at == int64(forever) {
		c.w.l.Disarm(&c.tm)
		return
	}
	c.w.l.Arm(&c.tm, time.Duration(at-now))
}

// kernelMoved notes progress that no call shows: a slow reader takes what the kernel
// holds for it, and the socket becomes writable only after a third of that has left.
func (c *conn) kernelMoved(now int64) {
	n := c.cli.Unacked() + c.won.sock.Unacked()
	if n < c.unacked {
		c.lastMove = now
	}
	c.unacked = n
}

// Expired implements loop.TimerHandler.
func (c *conn) Expired(*loop.Timer) {
	now := c.w.l.Now()
	o := &c.w.s.opt
	switch c.st {
	case stateHello:
		if o.InboundPROXY && !c.inPP {
			c.close(ReasonPPHeader, errors.New("timeout waiting for the PROXY header"))
			return
		}
		c.close(ReasonTimeout, errors.New("timeout waiting for the ClientHello"))
	case stateResolve:
		c.close(ReasonDNS, fmt.Errorf("app address of %q: timeout", c.name))
	case statePolicy:
		c.close(ReasonPortPolicy, fmt.Errorf("%w: its policy is not known yet, the instance's agent did not answer in time", c.denied(0)))
	case stateHandshake:
		c.close(ReasonTimeout, errors.New("timeout in the TLS handshake"))
	case stateDial:
		if now >= c.deadline {
			for _, a := range append([]*attempt{&c.first}, c.more...) {
				if a.pending {
					c.failed(a, syscall.ETIMEDOUT)
				}
			}
			c.close(ReasonDial, fmt.Errorf("no instance of %d tried accepted a connection on port %d within %s", c.next, c.port, o.Connect))
			return
		}
		// The head start is over: whoever is silent now is remembered as slow.
		for _, a := range append([]*attempt{&c.first}, c.more...) {
			if a.pending {
				a.inst.State.FailedAt.Store(max(1, c.w.s.Mono()))
			}
		}
		c.dialNext(nil)
	case stateRelay:
		if o.Total > 0 && now-c.start >= int64(o.Total) {
			c.close(ReasonTotal, errors.New("total timeout"))
			return
		}
		c.kernelMoved(now)
		if o.Idle > 0 && now-c.lastMove >= int64(o.Idle) {
			c.close(ReasonIdle, errors.New("idle timeout"))
			return
		}
		c.armRelay()
	}
}

func (c *conn) dropBuf() {
	if c.buf != nil {
		c.w.relay.PutChunk(c.buf)
		c.buf = nil
	}
}

// builtin hands the connection to the gateway's own services.
func (c *conn) builtin(svc hostname.Service, hello []byte) {
	w := c.w
	replay := append([]byte(nil), hello...)
	mode, base, peer := c.mode, c.base, c.peer
	fd := c.cli.Detach(w.l)
	c.close(ReasonNormal, nil)
	w.s.bg.Go(func() {
		nc, err := adopt(fd, replay, peer)
		if err != nil {
			w.s.log.Warn("cannot serve a built-in name", "error", err)
			return
		}
		if w.s.lend(nc) {
			defer w.s.returned(nc)
			w.s.opt.Hooks.ServeBuiltin(svc, mode, base, nc)
		}
	})
}

// shutdown ends the connection because the server closes.
func (c *conn) shutdown() {
	defer c.w.l.Contain(c)
	c.close(ReasonShutdown, nil)
}

// close ends the connection, whatever it is doing.
func (c *conn) close(why Reason, detail error) {
	if c.st == stateClosed {
		return
	}
	w := c.w
	defer w.stats.live.Add(-1) // last: whoever sees no connection may rely on the other counters
	relayed := c.st == stateRelay
	cut := why == ReasonClientGone || why == ReasonAppGone || why == ReasonInternal
	c.st = stateClosed
	w.l.Disarm(&c.tm)
	c.unwait()
	c.unhold()
	rec := Record{ID: c.id, Peer: c.source(), Name: c.name, Port: c.port, Mode: c.mode, Routed: c.statMode != modeUnknown, Reason: why, Detail: detail,
		Start: w.l.Time(c.start), Duration: time.Duration(w.l.Now() - c.start), Up: c.pair.Up.Total, Down: c.pair.Down.Total, Spliced: c.pair.Spliced}
	if c.app != nil {
		rec.App = c.app.ID
		if c.counted {
			c.app.State.Active.Add(-1)
		}
	}
	c.dropAttempts(nil)
	if c.sess != nil {
		rec.Up, rec.Down = c.sess.Up, c.sess.Down
		if relayed {
			cs := c.sess.State()
			rec.Resumed, rec.TLSVersion = cs.DidResume, cs.Version
		}
		c.sess.Release(w.tls)
	}
	if c.won != nil {
		rec.Instance = c.won.inst.ID
		c.won.inst.State.Active.Add(-1)
		// A peer whose counterpart was cut off must be able to tell that from a clean
		// end. Our own limits end a connection as released gateways do, with FIN.
		if cut {
			w.cutOff(&c.won.sock)
		} else {
			c.won.sock.Close(w.l)
		}
	}
	if relayed && cut {
		w.cutOff(&c.cli)
	} else {
		c.cli.Close(w.l)
	}
	c.pair.Release(w.relay)
	c.dropBuf()
	w.unlink(c)
	w.stats.active[c.statMode].Add(-1)
	w.stats.ended[c.statMode][why].Add(1)
	w.s.opt.Hooks.Closed(&rec)
}
