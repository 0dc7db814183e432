package load

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/poll"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// plain drives the passthrough cases on one thread: lasting connections (Requests), connections made again and again
// (Setup), and, through hold, connections that stay idle.
type plain struct {
	spec  Spec
	hello []byte
	sum   uint64

	poller  *poll.Poller
	conns   []plainConn
	up      int // connections whose hello was acknowledged at least once
	pending int // connections with something in flight
	seq     uint64
	records []record
}

type step uint8

const (
	idle step = iota
	connecting
	greeting   // hello sent, acknowledgement awaited
	requesting // request sent, reply awaited
)

type plainConn struct {
	fd    int
	at    step
	have  int
	seq   uint64
	begun int64 // of the request, or of the connection in Setup
	buf   [wire.Size]byte
}

func (*plain) facts() map[string]string { return nil }

func (p *plain) open() error {
	var err error
	if p.hello, err = wire.Hello(p.spec.Name, p.spec.PostQuantum); err != nil {
		return err
	}
	p.sum = wire.Checksum(p.hello)
	if p.poller, err = poll.New(); err != nil {
		return err
	}
	p.conns = make([]plainConn, p.spec.Conns)
	for i := range p.conns {
		p.conns[i].fd = -1
	}
	return nil
}

func (p *plain) close() {
	for _, c := range p.conns {
		if c.fd >= 0 {
			poll.Close(c.fd)
		}
	}
	if p.poller != nil {
		p.poller.Close()
	}
}

// maxConnecting bounds the connections being set up at once, so that no accept queue overflows.
const maxConnecting = 64

func (p *plain) run(ctx context.Context, clk clock, ready func()) ([]record, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer p.close()
	if err := p.open(); err != nil {
		return nil, err
	}
	p.records = make([]record, 0, 1<<20)
	if err := p.connectAll(ctx, clk, p.spec.Kind == Requests); err != nil {
		return nil, err
	}
	ready()
	for ctx.Err() == nil {
		if err := p.turn(ctx, clk); err != nil {
			return nil, err
		}
	}
	if context.Cause(ctx) != errStopped {
		return nil, context.Cause(ctx)
	}
	return p.records, nil
}

// connectAll brings all connections up to their first reply; with resume false they then close and begin again
// (Setup) or stay as they are (Idle).
func (p *plain) connectAll(ctx context.Context, clk clock, wait bool) error {
	next := 0
	for p.up < len(p.conns) {
		for next < len(p.conns) && next-p.up < maxConnecting {
			if err := p.connect(next, clk); err != nil {
				return err
			}
			next++
		}
		if !wait && next == len(p.conns) {
			return nil
		}
		if err := p.turn(ctx, clk); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// turn waits for events and handles them.
func (p *plain) turn(ctx context.Context, clk clock) error {
	events, err := p.poller.Wait(50 * time.Millisecond)
	if err != nil {
		return err
	}
	for _, e := range events {
		if err := p.handle(e.ID, clk); err != nil {
			return fmt.Errorf("connection %d: %w", e.ID, err)
		}
	}
	return nil
}

func (p *plain) connect(i int, clk clock) error {
	c := &p.conns[i]
	c.begun = clk.now()
	fd, err := poll.Connect(p.spec.Addr)
	if err != nil {
		return err
	}
	*c = plainConn{fd: fd, at: connecting, begun: c.begun}
	return p.poller.Add(fd, i, poll.Readable|poll.Writable, true)
}

func (p *plain) handle(i int, clk clock) error {
	c := &p.conns[i]
	if c.at == connecting {
		if err := poll.Err(c.fd); err != nil {
			return fmt.Errorf("connecting to %s: %w", p.spec.Addr, err)
		}
		if err := poll.WriteAll(c.fd, p.hello); err != nil {
			return fmt.Errorf("sending the ClientHello: %w", err)
		}
		c.at = greeting
		return nil
	}
	// Edge-triggered: read until nothing is left. One message is in flight, so a full read is the end of it.
	for {
		n, eof, err := poll.Read(c.fd, c.buf[c.have:])
		if err != nil {
			return fmt.Errorf("reading: %w", err)
		}
		if eof {
			return fmt.Errorf("closed by the gateway after %d replies: %w", c.seq, wire.ErrCorrupt)
		}
		if n == 0 {
			return nil
		}
		if c.have += n; c.have < wire.Size {
			continue
		}
		c.have = 0
		again, err := p.message(i, c, clk)
		if err != nil || !again {
			return err
		}
	}
}

// message handles the complete message in c.buf. It returns false when the connection is to be left alone.
func (p *plain) message(i int, c *plainConn, clk clock) (bool, error) {
	switch c.at {
	case greeting:
		if err := wire.Expect(c.buf[:], wire.Message{Kind: wire.HelloAck, A: p.sum, B: uint64(len(p.hello))}); err != nil {
			return false, fmt.Errorf("acknowledgement of the ClientHello: %w", err)
		}
		return true, p.request(i, c, clk)
	case requesting:
		if err := wire.Expect(c.buf[:], wire.Message{Kind: wire.Reply, Conn: uint64(i), Seq: c.seq}); err != nil {
			return false, err
		}
		now := clk.now()
		p.records = append(p.records, record{end: now, took: now - c.begun})
		switch p.spec.Kind {
		case Requests:
			if c.seq++; c.seq == 1 {
				p.up++
			}
			return true, p.request(i, c, clk)
		case Setup:
			p.up++
			if err := poll.Close(c.fd); err != nil {
				return false, err
			}
			return false, p.connect(i, clk)
		}
		p.up++
		c.at = idle
		return true, nil
	}
	return false, fmt.Errorf("unexpected bytes: %w", wire.ErrCorrupt)
}

func (p *plain) request(i int, c *plainConn, clk clock) error {
	wire.Message{Kind: wire.Request, Conn: uint64(i), Seq: c.seq}.Put(c.buf[:])
	if p.spec.Kind == Requests {
		c.begun = clk.now()
	}
	c.at = requesting
	if err := poll.WriteAll(c.fd, c.buf[:]); err != nil {
		return fmt.Errorf("sending a request: %w", err)
	}
	return nil
}
