package soak

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"time"
)

// end is one end of a connection whose opening is over.
type end struct {
	conn net.Conn     // TLS or TCP
	tcp  *net.TCPConn // under conn
	s    *sender
	r    *receiver
	stop <-chan struct{} // closed: come to an end without pauses
}

// closeWrite ends the sending direction.
func (e *end) closeWrite() error {
	return e.conn.(interface{ CloseWrite() error }).CloseWrite()
}

// reset ends the connection with a reset.
func (e *end) reset() {
	e.tcp.SetLinger(0)
	e.tcp.Close()
}

// pause sleeps, but not longer than until stop.
func pause(d time.Duration, stop <-chan struct{}) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-stop:
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// finish ends the sending direction in order.
func (e *end) finish() error {
	if err := e.s.end(); err != nil {
		return fmt.Errorf("sending the end after %d bytes: %w", e.s.sent, err)
	}
	if err := e.closeWrite(); err != nil {
		return fmt.Errorf("closing the sending direction after %d bytes: %w", e.s.sent, err)
	}
	return nil
}

// drain receives to the end of the stream and of the connection's direction. onEnd is called at the first of them.
func (e *end) drain(onEnd func()) error {
	for {
		_, err := e.r.next()
		switch {
		case err == nil:
			if e.r.ended {
				onEnd()
			}
		case err == io.EOF && e.r.ended:
			return nil
		case err == io.EOF:
			return fmt.Errorf("after %d bytes: the stream ended without its end frame: %w", e.r.received, io.ErrUnexpectedEOF)
		default:
			return fmt.Errorf("after %d received bytes: %w", e.r.received, err)
		}
	}
}

// exchange plays script and receives at the same time, until both directions have ended. With endless the script is
// repeated until the connection fails.
func (e *end) exchange(script []step, endless bool) error {
	peerEnded, over := make(chan struct{}), make(chan struct{})
	sent := make(chan error, 1)
	go func() {
		err := e.play(script, endless, peerEnded, over)
		if err != nil {
			e.tcp.SetDeadline(time.Now()) // the receiver need not wait any more, but gets what is there
		}
		sent <- err
	}()
	ended := false
	err := e.drain(func() {
		ended = true
		close(peerEnded)
	})
	close(over)
	if err != nil {
		if !ended {
			close(peerEnded)
		}
		e.tcp.SetDeadline(time.Now())
	}
	serr := <-sent
	if err != nil && errors.Is(err, ErrCorrupt) {
		return err
	}
	// The sender's failure is the cause where the receiver was only told to give up.
	return errors.Join(serr, err)
}

func (e *end) play(script []step, endless bool, peerEnded, over <-chan struct{}) error {
	for {
		for _, s := range script {
			pause(s.pause, e.stop)
			if s.afterPeer {
				<-peerEnded
			}
			if endless && (closed(over) || closed(e.stop)) {
				<-over
				return nil
			}
			if err := e.s.data(s.bytes, 0); err != nil {
				return fmt.Errorf("sending after %d bytes: %w", e.s.sent, err)
			}
		}
		if !endless {
			return e.finish()
		}
	}
}

// ask makes one request and verifies that the answer has the length asked for.
func (e *end) ask(q request) error {
	if err := e.s.data(q.send, uint64(q.want)); err != nil {
		return fmt.Errorf("asking after %d bytes: %w", e.s.sent, err)
	}
	for from := e.r.received; e.r.received-from < uint64(q.want); {
		h, err := e.r.next()
		if err != nil {
			return fmt.Errorf("waiting for an answer after %d bytes: %w", e.r.received, truncated(err))
		}
		if h.typ != frameData {
			return fmt.Errorf("waiting for an answer after %d bytes, got a frame of type %d: %w", e.r.received, h.typ, ErrCorrupt)
		}
	}
	return nil
}

// answer serves an asking client to the end.
func (e *end) answer() error {
	for {
		h, err := e.r.next()
		if err != nil {
			return fmt.Errorf("waiting for a request after %d bytes: %w", e.r.received, truncated(err))
		}
		if e.r.ended {
			break
		}
		if h.b > 0 {
			if err := e.s.data(int(h.b), 0); err != nil {
				return fmt.Errorf("answering after %d bytes: %w", e.s.sent, err)
			}
		}
	}
	if err := e.finish(); err != nil {
		return err
	}
	return e.drain(func() {})
}

// tiny is the receive buffer of slow readers in the rig in bytes. On loopback, whose segments are larger than that,
// TCP would crawl from one window probe to the next.
const tiny = 4096

// throttle reads slowly while it is told to.
type throttle struct {
	r    io.Reader
	stop <-chan struct{}
	wake atomic.Int64 // slow until then, ns since 1970
	// hold, if not nil: after free bytes nothing is read until it is closed.
	hold <-chan struct{}
	free int
}

func (t *throttle) slowly(d time.Duration) { t.wake.Store(time.Now().Add(d).UnixNano()) }

func (t *throttle) Read(p []byte) (int, error) {
	if t.hold != nil {
		if t.free <= 0 {
			<-t.hold
			t.hold = nil
		} else {
			p = p[:min(len(p), t.free)]
		}
	}
	if time.Now().UnixNano() < t.wake.Load() && !closed(t.stop) {
		pause(time.Duration(100+rand.IntN(500))*time.Millisecond, t.stop)
		p = p[:min(len(p), 1+rand.IntN(1500))]
	}
	n, err := t.r.Read(p)
	t.free -= n
	return n, err
}

func buffered(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, 4096) }
