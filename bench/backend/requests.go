package backend

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/bench/poll"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// requests is the one-thread loop that serves the two request listeners. IDs of sockets are their descriptors.
type requests struct {
	server    *Server
	poller    *poll.Poller
	listeners map[int]bool // passthrough by descriptor
	conns     []*conn      // by descriptor
	scratch   [64 << 10]byte
}

type conn struct {
	hello   bool   // the ClientHello is still to come
	partial []byte // bytes of an incomplete hello or message
}

func (l *requests) listen(at *netip.AddrPort, passthrough bool) error {
	fd, got, err := poll.Listen(*at)
	if err != nil {
		return err
	}
	if l.listeners == nil {
		l.listeners = map[int]bool{}
	}
	l.listeners[fd] = passthrough
	*at = got
	return l.poller.Add(fd, fd, poll.Readable, false)
}

func (l *requests) close() {
	for fd := range l.listeners {
		poll.Close(fd)
	}
	for fd, c := range l.conns {
		if c != nil {
			poll.Close(fd)
		}
	}
	l.poller.Close()
}

func (l *requests) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer l.close()
	for !l.server.stop.Load() {
		events, err := l.poller.Wait(50 * time.Millisecond)
		if err != nil {
			l.server.fail(err)
			return
		}
		for _, e := range events {
			if passthrough, ok := l.listeners[e.ID]; ok {
				if err := l.accept(e.ID, passthrough); err != nil {
					l.server.fail(err)
					return
				}
				continue
			}
			c := l.conns[e.ID]
			if c == nil {
				continue
			}
			open, err := l.serve(e.ID, c)
			if err != nil {
				l.server.fail(err)
			}
			if !open || err != nil {
				poll.Close(e.ID)
				l.conns[e.ID] = nil
			}
		}
	}
}

func (l *requests) accept(listener int, passthrough bool) error {
	for {
		fd, err := poll.Accept(listener)
		if err != nil || fd < 0 {
			return err
		}
		if err := l.poller.Add(fd, fd, poll.Readable, false); err != nil {
			poll.Close(fd)
			return err
		}
		for fd >= len(l.conns) {
			l.conns = append(l.conns, nil)
		}
		l.conns[fd] = &conn{hello: passthrough}
	}
}

// serve answers what has arrived. It returns false when the client is done.
func (l *requests) serve(fd int, c *conn) (bool, error) {
	have := copy(l.scratch[:], c.partial)
	n, eof, err := poll.Read(fd, l.scratch[have:])
	switch {
	case errors.Is(err, unix.ECONNRESET):
		return false, nil // the set-up case's client may have closed already
	case err != nil:
		return false, fmt.Errorf("reading a request: %w", err)
	case eof && have > 0:
		return false, fmt.Errorf("connection ended within a message, after %d bytes: %w", have, wire.ErrCorrupt)
	case eof:
		return false, nil
	}
	in := l.scratch[:have+n]
	// The answers overwrite the requests they answer: both have wire.Size bytes.
	var out []byte
	if c.hello {
		size, err := wire.HelloLen(in)
		if err != nil {
			return false, err
		}
		if size == 0 || size > len(in) {
			c.partial = append(c.partial[:0], in...)
			return true, nil
		}
		sum := wire.Checksum(in[:size])
		in = in[size:]
		c.hello = false
		var ack [wire.Size]byte
		wire.Message{Kind: wire.HelloAck, A: sum, B: uint64(size)}.Put(ack[:])
		out = append(out, ack[:]...)
	}
	c.partial = nil
	for len(in) >= wire.Size {
		m, err := wire.Parse(in)
		if err != nil {
			return false, err
		}
		if m.Kind != wire.Request {
			return false, fmt.Errorf("got %+v instead of a request: %w", m, wire.ErrCorrupt)
		}
		m.Kind = wire.Reply
		m.Put(in)
		if out == nil {
			out = in[:0]
		}
		out = append(out, in[:wire.Size]...)
		in = in[wire.Size:]
	}
	if len(in) > 0 {
		c.partial = append([]byte(nil), in...)
	}
	if len(out) == 0 {
		return true, nil
	}
	if err := poll.WriteAll(fd, out); err != nil {
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			return false, nil
		}
		return false, fmt.Errorf("answering: %w", err)
	}
	return true, nil
}
