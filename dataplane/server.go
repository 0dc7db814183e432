package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
	"github.com/dstack-gw/dstack-gw/dataplane/terminate"
)

// Server is the data plane. Create it with New, start it with Start.
type Server struct {
	opt     Options
	log     *slog.Logger
	snap    atomic.Pointer[routing.Snapshot]
	workers []*worker
	epoch   time.Time // of the monotonic clock in routing.State.FailedAt
	half    *halfOpen
	ids     atomic.Uint64
	held    atomic.Int64 // connections that wait for a port policy
	bg      sync.WaitGroup
	ctx     context.Context // of lookups; ends with Close
	cancel  context.CancelFunc
	closing sync.Once

	mu      sync.Mutex // guards what follows
	started bool
	closed  bool
	lent    map[net.Conn]struct{} // to a ServeBuiltin that has not returned
}

type worker struct {
	s       *Server
	l       *loop.Loop
	relay   *relay.Worker
	tls     *terminate.Worker
	accept  []*loop.Acceptor
	conns   *conn // list of all
	held    map[*conn]struct{}
	leaving map[*leaving]struct{}
	name    [256]byte // scratch for the name of one hello
	// shedLogged is when a shortage was last logged: it comes with many connections.
	shedLogged int64
	stats      workerStats
}

// forever stands for "no limit" where a deadline is computed. Loop clocks and
// deadlines add up to it without overflow.
const forever = time.Duration(1 << 61)

// New builds a server that does not listen yet. It needs a Close even if it never starts.
func New(o Options) (*Server, error) {
	if o.Workers < 1 {
		o.Workers = 1
	}
	if o.BufferSize <= 0 {
		o.BufferSize = 64 << 10
	}
	if o.Backlog <= 0 {
		o.Backlog = 4096
	}
	if o.Hooks == nil || o.Logger == nil {
		return nil, errors.New("dataplane: Hooks and Logger are required")
	}
	for _, d := range []*time.Duration{&o.PPHeader, &o.Handshake, &o.Resolve, &o.Connect} {
		if *d <= 0 {
			*d = forever
		}
	}
	perSource := int64(o.MaxHalfOpenPeer)
	if o.InboundPROXY {
		perSource = 0 // the peer is the load balancer
	}
	s := &Server{opt: o, log: o.Logger, epoch: time.Now(), half: newHalfOpen(o.MaxHalfOpen, perSource), lent: map[net.Conn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.snap.Store(routing.Empty())
	for range o.Workers {
		l, err := loop.New(o.Logger)
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("start data plane worker: %w", err)
		}
		r := relay.NewWorker(o.BufferSize, o.Splice)
		r.MaxPipes = maxPipes(o.Workers)
		s.workers = append(s.workers, &worker{s: s, l: l, relay: r, tls: terminate.NewWorker(r),
			held: map[*conn]struct{}{}, leaving: map[*leaving]struct{}{}})
	}
	return s, nil
}

// maxPipes is how many pipes a worker may have open. A pipe takes two descriptors for
// each direction in bulk; an eighth of all of them must be enough, or connections
// that only want to be accepted would pay. Without a pipe a direction is copied.
func maxPipes(workers int) int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 64
	}
	return max(8, int(min(l.Cur, 1<<24))/8/2/workers)
}

// Start binds every listener on every worker and begins to serve. No listener is
// left behind when it fails.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.started {
		return errors.New("proxy: the server was started or closed before")
	}
	// A bind without SO_REUSEPORT finds a port that another process holds; with it
	// two gateways would silently share the traffic.
	for _, at := range s.opt.Listen {
		if at.Port() == 0 {
			return fmt.Errorf("listen on %s: port 0 is not a proxy port", at)
		}
		fd, err := loop.Listen(at, loop.ListenOptions{Backlog: 1})
		if err != nil {
			return fmt.Errorf("proxy: %w (is another process serving this port?)", err)
		}
		unix.Close(fd)
	}
	for _, w := range s.workers {
		for _, at := range s.opt.Listen {
			fd, err := loop.Listen(at, loop.ListenOptions{Backlog: s.opt.Backlog, ReusePort: true, DeferAccept: s.opt.DeferAccept, KeepAlive: 60 * time.Second})
			if err != nil {
				s.closeListeners()
				return fmt.Errorf("proxy: %w", err)
			}
			a := &loop.Acceptor{Accepted: w.accepted, Shed: w.shed}
			if err := a.Serve(w.l, fd); err != nil {
				a.Close()
				s.closeListeners()
				return fmt.Errorf("proxy: watch listener %s: %w", at, err)
			}
			w.accept = append(w.accept, a)
		}
	}
	for _, w := range s.workers {
		s.bg.Go(w.l.Run)
	}
	s.started = true
	return nil
}

func (s *Server) closeListeners() {
	for _, w := range s.workers {
		for _, a := range w.accept {
			a.Close()
		}
		w.accept = nil
	}
}

// StopAccepting closes the listeners; connections go on. It must not be called from Hooks.
func (s *Server) StopAccepting() {
	s.mu.Lock()
	started := s.started
	s.mu.Unlock()
	if !started {
		return
	}
	for _, w := range s.workers {
		done := make(chan struct{})
		if w.l.Post(func() {
			for _, a := range w.accept {
				a.Close()
			}
			w.accept = nil
			close(done)
		}) == nil {
			<-done
		}
	}
}

// Close ends every connection, also those of a ServeBuiltin that has not returned,
// stops the loops and waits for the calls of Hooks that are under way. It must not be
// called from Hooks.
func (s *Server) Close() { s.closing.Do(s.close) }

func (s *Server) close() {
	s.cancel()
	s.mu.Lock()
	s.closed = true
	started := s.started
	for c := range s.lent {
		c.Close()
	}
	s.mu.Unlock()
	if !started {
		s.closeListeners()
		for _, w := range s.workers {
			w.l.Close()
		}
		return
	}
	s.StopAccepting()
	for _, w := range s.workers {
		_ = w.l.Post(func() {
			for w.conns != nil {
				c := w.conns
				c.shutdown()
				w.unlink(c) // also if that panicked
			}
			for l := range w.leaving {
				l.end()
			}
			w.relay.Close()
			w.tls.Close()
		})
		w.l.Stop()
	}
	s.bg.Wait()
}

// lend notes a connection that leaves the loops for ServeBuiltin; it reports false,
// and closes c, when the server is closing.
func (s *Server) lend(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Close()
		return false
	}
	s.lent[c] = struct{}{}
	return true
}

func (s *Server) returned(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.lent, c)
}

// Snapshot returns what connections route by now.
func (s *Server) Snapshot() *routing.Snapshot { return s.snap.Load() }

// SetSnapshot makes n what new connections route by, and gives connections that wait
// for a port policy another look.
func (s *Server) SetSnapshot(n *routing.Snapshot) {
	s.snap.Store(n)
	if s.held.Load() == 0 {
		return
	}
	for _, w := range s.workers {
		_ = w.l.Post(func() {
			for c := range w.held {
				c.recheck()
			}
		})
	}
}

// Mono is the clock of routing.State.FailedAt, in ns.
func (s *Server) Mono() int64 { return int64(time.Since(s.epoch)) }

// Connections is the number of open client connections, routed or not.
func (s *Server) Connections() int64 {
	var n int64
	for _, w := range s.workers {
		n += w.stats.live.Load()
	}
	return n
}

// Panics counts contained panics; each closed one connection.
func (s *Server) Panics() uint64 {
	var n uint64
	for _, w := range s.workers {
		n += w.l.Panics()
	}
	return n
}

// SpliceEngaged counts connections that moved to splice(2).
func (s *Server) SpliceEngaged() uint64 {
	var n uint64
	for _, w := range s.workers {
		n += w.relay.SpliceEngaged.Load()
	}
	return n
}

func (w *worker) link(c *conn) {
	if c.after = w.conns; c.after != nil {
		c.after.before = c
	}
	w.conns = c
}

// unlink may be called again.
func (w *worker) unlink(c *conn) {
	switch {
	case c.before != nil:
		c.before.after = c.after
	case w.conns == c:
		w.conns = c.after
	default:
		return
	}
	if c.after != nil {
		c.after.before = c.before
	}
	c.before, c.after = nil, nil
}

func (w *worker) shed(err error) {
	w.stats.shed.Add(1)
	now := w.l.Now()
	if w.shedLogged != 0 && now-w.shedLogged < int64(time.Second) {
		return
	}
	w.shedLogged = now
	w.s.log.Warn("connection refused: out of descriptors or memory; raise RLIMIT_NOFILE or lower the load", "error", err)
}

// accepted runs on the loop that owns the listener.
func (w *worker) accepted(fd int, peer netip.AddrPort) {
	w.stats.accepted.Add(1)
	to := w
	if w.s.opt.Rebalance && len(w.s.workers) > 1 {
		mine := w.stats.live.Load()
		least := mine
		for _, o := range w.s.workers {
			if n := o.stats.live.Load(); n < least {
				least, to = n, o
			}
		}
		if mine < least+1+least/4 {
			to = w
		}
	}
	to.stats.live.Add(1)
	if to != w {
		if to.l.Post(func() { to.begin(fd, peer) }) == nil {
			return
		}
		to.stats.live.Add(-1)
		w.stats.live.Add(1)
	}
	w.begin(fd, peer)
}
