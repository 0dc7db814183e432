package load

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/cpu"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// proving is how long the transfer runs whose SHA-256 both ends compare before the measured one.
const proving = 40 * time.Millisecond

// runBulk moves data in the given direction on all connections for Duration. The window lasts from the start of the
// first transfer to the receipt of the last, so every byte counted has arrived and been verified.
func runBulk(ctx context.Context, s Spec) (Result, error) {
	pattern := wire.NewPattern()
	conns := make([]*wire.Stream, s.Conns)
	facts := map[string]string{}
	var stop []func() bool
	defer func() {
		for _, f := range stop {
			f()
		}
	}()
	for i := range conns {
		c, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp4", s.Addr.String())
		if err != nil {
			return Result{}, err
		}
		defer c.Close()
		stop = append(stop, context.AfterFunc(ctx, func() { c.Close() }))
		rw := c
		if s.TLS != nil {
			t := tls.Client(c, s.TLS.config(s.Name, nil))
			if err := handshake(ctx, t); err != nil {
				return Result{}, err
			}
			facts = describe(t.ConnectionState())
			rw = t
		}
		conns[i] = wire.NewStream(rw, pattern, wire.QuantumSize)
		if s.TLS != nil {
			continue
		}
		hello, err := wire.Hello(s.Name, s.PostQuantum)
		if err != nil {
			return Result{}, err
		}
		if _, err := c.Write(hello); err != nil {
			return Result{}, fmt.Errorf("connection %d: sending the ClientHello: %w", i, err)
		}
		if err := conns[i].Expect(wire.Message{Kind: wire.HelloAck, A: wire.Checksum(hello), B: uint64(len(hello))}); err != nil {
			return Result{}, fmt.Errorf("connection %d: %w", i, err)
		}
	}
	if !s.HalfClose { // which leaves no connection for a second transfer
		if _, _, err := transferAll(s, conns, proving, true); err != nil {
			return Result{}, fmt.Errorf("transfer with SHA-256: %w", err)
		}
	}
	u, n, err := transferAll(s, conns, s.Duration, s.HalfClose)
	if err != nil {
		return Result{}, err
	}
	return Result{Windows: []Window{{Usage: u, Count: uint64(s.Conns), Bytes: n}}, Facts: facts}, nil
}

// transferAll runs one transfer on every connection and returns the CPU used meanwhile and the bytes verified.
func transferAll(s Spec, conns []*wire.Stream, d time.Duration, hashed bool) (cpu.Usage, uint64, error) {
	for i, c := range conns {
		open := wire.Message{Kind: wire.BulkOpen, Conn: uint64(i), A: uint64(d), B: uint64(s.Direction)}
		if hashed {
			open.B |= wire.HashFlag
		}
		if s.HalfClose {
			open.B |= wire.HalfCloseFlag
		}
		if err := c.Write(open); err != nil {
			return cpu.Usage{}, 0, fmt.Errorf("connection %d: preparing: %w", i, err)
		}
		if err := c.Expect(wire.Message{Kind: wire.BulkReady, Conn: uint64(i)}); err != nil {
			return cpu.Usage{}, 0, fmt.Errorf("connection %d: %w", i, err)
		}
	}
	before, err := cpu.Begin(s.Proc)
	if err != nil {
		return cpu.Usage{}, 0, err
	}
	counts := make([]uint64, len(conns))
	errs := make([]error, len(conns))
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() { counts[i], errs[i] = transfer(c, uint64(i), s.Direction, d, hashed, s.HalfClose) })
	}
	wg.Wait()
	after, err := cpu.End(s.Proc)
	if err := errors.Join(append(errs, err)...); err != nil {
		return cpu.Usage{}, 0, err
	}
	var total uint64
	for _, n := range counts {
		total += n
	}
	return cpu.Between(before, after, s.Groups), total, nil
}

// transfer runs one prepared transfer and returns the payload bytes that arrived, of both directions.
func transfer(c *wire.Stream, conn uint64, dir wire.Direction, d time.Duration, hashed, half bool) (uint64, error) {
	if err := c.Write(wire.Message{Kind: wire.BulkStart, Conn: conn}); err != nil {
		return 0, fmt.Errorf("connection %d: starting: %w", conn, err)
	}
	var sent, received uint64
	var sendErr, err error
	var wg sync.WaitGroup
	send := func() {
		sent, sendErr = c.Send(conn, hashed, d)
		if sendErr == nil && half {
			sendErr = c.CloseWrite()
		}
	}
	switch dir {
	case wire.Up:
		send()
	case wire.Duplex:
		wg.Go(send)
	}
	if dir != wire.Up {
		received, err = c.Receive(conn, hashed)
	}
	if err == nil && half {
		err = c.ExpectEnd()
	}
	wg.Wait()
	if err := errors.Join(sendErr, err); err != nil {
		return 0, fmt.Errorf("connection %d: %w", conn, err)
	}
	if half {
		return sent + received, nil
	}
	if dir != wire.Up {
		if err := c.Write(wire.Message{Kind: wire.BulkDone, Conn: conn, A: received}); err != nil {
			return 0, fmt.Errorf("connection %d: confirming: %w", conn, err)
		}
	}
	if dir != wire.Down {
		if err := c.Expect(wire.Message{Kind: wire.BulkDone, Conn: conn, A: sent}); err != nil {
			return 0, fmt.Errorf("connection %d: receipt for %d bytes: %w", conn, sent, err)
		}
	}
	return sent + received, nil
}
