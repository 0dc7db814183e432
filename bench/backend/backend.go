package backend

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/poll"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// Ports of the backend in the rig.
const (
	RequestPassthrough = 443
	BulkPassthrough    = 444
	RequestPlain       = 8080
	BulkPlain          = 8081
)

// Addrs says where each service listens; port 0 chooses a free one.
type Addrs struct {
	RequestPassthrough, BulkPassthrough, RequestPlain, BulkPlain netip.AddrPort
}

// On returns the rig's ports on one address.
func On(ip netip.Addr) Addrs {
	return Addrs{
		RequestPassthrough: netip.AddrPortFrom(ip, RequestPassthrough),
		BulkPassthrough:    netip.AddrPortFrom(ip, BulkPassthrough),
		RequestPlain:       netip.AddrPortFrom(ip, RequestPlain),
		BulkPlain:          netip.AddrPortFrom(ip, BulkPlain),
	}
}

// maxErrors bounds the reasons kept: after a few the rest say the same.
const maxErrors = 5

// Server is a running backend.
type Server struct {
	addrs   Addrs
	pattern *wire.Pattern
	bulk    []net.Listener
	stop    atomic.Bool
	wg      sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool // bulk connections, to close them at the end
	errs   []error
	failed int
}

// Start listens and serves until Close.
func Start(a Addrs) (*Server, error) {
	s := &Server{addrs: a, pattern: wire.NewPattern(), conns: map[net.Conn]bool{}}
	loop := &requests{server: s}
	var err error
	if loop.poller, err = poll.New(); err != nil {
		return nil, err
	}
	fail := func(err error) (*Server, error) {
		loop.close()
		for _, l := range s.bulk {
			l.Close()
		}
		return nil, fmt.Errorf("starting the backend: %w", err)
	}
	for i, at := range []*netip.AddrPort{&s.addrs.RequestPassthrough, &s.addrs.RequestPlain} {
		if err := loop.listen(at, i == 0); err != nil {
			return fail(err)
		}
	}
	for i, at := range []*netip.AddrPort{&s.addrs.BulkPassthrough, &s.addrs.BulkPlain} {
		l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(*at))
		if err != nil {
			return fail(err)
		}
		*at = l.Addr().(*net.TCPAddr).AddrPort()
		s.bulk = append(s.bulk, l)
		s.wg.Go(func() { s.acceptBulk(l, i == 0) })
	}
	s.wg.Go(loop.run)
	return s, nil
}

// Addrs returns where the backend listens.
func (s *Server) Addrs() Addrs { return s.addrs }

// Close stops serving and waits for all connections' goroutines.
func (s *Server) Close() {
	s.stop.Store(true)
	for _, l := range s.bulk {
		l.Close()
	}
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Errors returns why connections failed, the first few of them, and nil if none did.
func (s *Server) Errors() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == 0 {
		return nil
	}
	return fmt.Errorf("backend: %d connections failed: %w", s.failed, errors.Join(s.errs...))
}

func (s *Server) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed++
	if len(s.errs) < maxErrors {
		s.errs = append(s.errs, err)
	}
}

func (s *Server) acceptBulk(l net.Listener, passthrough bool) {
	for {
		c, err := l.Accept()
		if err != nil {
			if !s.stop.Load() {
				s.fail(fmt.Errorf("accepting bulk connections: %w", err))
			}
			return
		}
		s.mu.Lock()
		if s.stop.Load() {
			s.mu.Unlock()
			c.Close()
			return
		}
		s.conns[c] = true
		s.mu.Unlock()
		s.wg.Go(func() {
			if err := s.serveBulk(c, passthrough); err != nil && !s.stop.Load() {
				s.fail(err)
			}
			c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		})
	}
}

// serveBulk runs transfers until the client closes.
func (s *Server) serveBulk(c net.Conn, passthrough bool) error {
	st := wire.NewStream(c, s.pattern, wire.QuantumSize)
	if passthrough {
		hello, err := st.Hello()
		if err == io.EOF {
			return nil // a gateway may open connections it does not use
		}
		if err != nil {
			return fmt.Errorf("reading the ClientHello: %w", err)
		}
		if err := st.Write(wire.Message{Kind: wire.HelloAck, A: wire.Checksum(hello), B: uint64(len(hello))}); err != nil {
			return fmt.Errorf("acknowledging the ClientHello: %w", err)
		}
	}
	for {
		m, err := st.Read()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("waiting for a transfer: %w", err)
		}
		if m.Kind != wire.BulkOpen {
			return fmt.Errorf("waiting for a transfer, got %+v: %w", m, wire.ErrCorrupt)
		}
		if err := s.transfer(st, m); err != nil {
			return err
		}
	}
}

func (s *Server) transfer(st *wire.Stream, open wire.Message) error {
	hashed, half := open.B&wire.HashFlag != 0, open.B&wire.HalfCloseFlag != 0
	d, dir := time.Duration(open.A), wire.Direction(open.B&^(wire.HashFlag|wire.HalfCloseFlag))
	if half {
		// Now this end is done first, now the other.
		if d *= 2; open.Conn%2 == 1 {
			d /= 4
		}
	}
	if err := st.Write(wire.Message{Kind: wire.BulkReady, Conn: open.Conn}); err != nil {
		return fmt.Errorf("preparing a transfer: %w", err)
	}
	if err := st.Expect(wire.Message{Kind: wire.BulkStart, Conn: open.Conn}); err != nil {
		return fmt.Errorf("starting a transfer: %w", err)
	}
	var sent uint64
	var sendErr error
	sending := make(chan struct{})
	send := func() {
		defer close(sending)
		sent, sendErr = st.Send(open.Conn, hashed, d)
		if sendErr == nil && half {
			sendErr = st.CloseWrite()
		}
	}
	switch dir {
	case wire.Down:
		send()
	case wire.Duplex:
		go send()
	case wire.Up:
		close(sending)
	}
	var received uint64
	var err error
	if dir != wire.Down {
		received, err = st.Receive(open.Conn, hashed)
	}
	if err == nil && half {
		err = st.ExpectEnd()
	}
	<-sending
	if err := errors.Join(err, sendErr); err != nil {
		return fmt.Errorf("connection %d: %w", open.Conn, err)
	}
	if half {
		return nil
	}
	if dir != wire.Down {
		if err := st.Write(wire.Message{Kind: wire.BulkDone, Conn: open.Conn, A: received}); err != nil {
			return fmt.Errorf("confirming a transfer: %w", err)
		}
	}
	if dir != wire.Up {
		if err := st.Expect(wire.Message{Kind: wire.BulkDone, Conn: open.Conn, A: sent}); err != nil {
			return fmt.Errorf("confirmation of a transfer: %w", err)
		}
	}
	return nil
}
