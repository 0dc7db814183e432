package terminate

import (
	"crypto/tls"
	"errors"
	"io"
	"iter"
	"net"
	"sync/atomic"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

// Worker holds what the terminated connections of one loop share.
type Worker struct {
	R *relay.Worker
	// Full, Resumed and Failed count handshakes. Decrypted and Encrypted count plaintext bytes.
	Full, Resumed, Failed atomic.Uint64
	Decrypted, Encrypted  atomic.Uint64

	ahead []byte // ciphertext read ahead of crypto/tls, shared by all sessions of the loop
	cork  []byte // ciphertext of one step, sent with one system call
	coros []*coro
}

// NewWorker returns a worker that shares r's buffers.
func NewWorker(r *relay.Worker) *Worker {
	return &Worker{R: r, ahead: make([]byte, 64<<10), cork: make([]byte, 0, len(r.Scratch)+8<<10)}
}

const keepCoros = 256

// coro runs handshakes, one at a time, on a stack that stays warm.
type coro struct {
	next func() (bool, bool)
	stop func()
	s    *Session
}

func (w *Worker) coro() *coro {
	if n := len(w.coros); n > 0 {
		c := w.coros[n-1]
		w.coros = w.coros[:n-1]
		return c
	}
	c := &coro{}
	c.next, c.stop = iter.Pull(func(yield func(done bool) bool) {
		for {
			s := c.s
			s.pause = func() { yield(false) }
			s.err = s.tls.Handshake()
			if !yield(true) {
				return
			}
		}
	})
	return c
}

// Close ends the pooled coroutines.
func (w *Worker) Close() {
	for _, c := range w.coros {
		c.stop()
	}
	w.coros = nil
}

// Session is one terminated connection. All methods run on the loop.
type Session struct {
	tls  *tls.Conn
	wire wire
	err  error // result of the handshake
	co   *coro
	// pause suspends the handshake until the next edge; set by the coroutine.
	pause func()

	held, chunk []byte // plaintext for the app
	drained     bool   // the last Read found nothing complete
	upEOF       bool
	upShut      bool
	downEOF     bool
	downShut    bool
	notified    bool // close_notify was written
	downCut     bool // the app is known to have failed: its end is not a clean one

	// Up and Down count plaintext bytes that left towards app and client.
	Up, Down uint64
}

// Start begins a handshake on client; hello are bytes already read from it (copied).
func Start(w *Worker, cfg *tls.Config, client *loop.Sock, peer, local net.Addr, hello []byte) *Session {
	s := &Session{}
	s.wire = wire{s: s, w: w, sock: client, peer: peer, local: local}
	s.wire.own(hello)
	s.tls = tls.Server(&s.wire, cfg)
	s.co = w.coro()
	s.co.s = s
	return s
}

// Handshake goes on as far as it can. done is set when it ended; err then says how.
func (s *Session) Handshake(w *Worker) (done bool, err error) {
	if len(s.wire.out) > 0 {
		if err := s.wire.flush(); err != nil {
			s.wire.abort = err
		}
	}
	returned := false
	defer func() {
		if !returned {
			s.co = nil // the handshake panicked; its coroutine is gone
		}
	}()
	done, _ = s.co.next()
	returned = true
	if !done {
		return false, nil
	}
	s.co.s = nil
	if len(w.coros) < keepCoros {
		w.coros = append(w.coros, s.co)
	} else {
		s.co.stop()
	}
	s.co, s.pause = nil, nil
	s.wire.ready = true
	s.wire.keep()
	if s.err != nil {
		w.Failed.Add(1)
		return true, s.err
	}
	if s.tls.ConnectionState().DidResume {
		w.Resumed.Add(1)
	} else {
		w.Full.Add(1)
	}
	return true, nil
}

var errAborted = errors.New("handshake was given up")

// Release gives up a handshake under way and returns buffers.
func (s *Session) Release(w *Worker) {
	if s.co != nil {
		s.wire.abort = errAborted
		_, _ = s.Handshake(w)
	}
	s.wire.drop()
	if s.chunk != nil {
		w.R.PutChunk(s.chunk)
		s.held, s.chunk = nil, nil
	}
}

// State returns the negotiated parameters, for logs.
func (s *Session) State() tls.ConnectionState { return s.tls.ConnectionState() }

// Ended reports whether a direction (relay.ToApp, relay.ToClient) is over: its
// source said so and everything before that was passed on.
func (s *Session) Ended(dir int) bool {
	if dir == relay.ToApp {
		return s.upShut
	}
	return s.downShut
}

// Hold queues bytes (a PROXY header) for the app ahead of the client's.
func (s *Session) Hold(w *Worker, b []byte) {
	if len(b) > 0 {
		s.chunk = w.R.Chunk(b)
		s.held = s.chunk
	}
}

// What one connection may do before others get a turn. Towards the app the
// ciphertext counts: a record of one byte or none costs as much time as a large one.
const (
	downBudget = 512 << 10 // plaintext bytes
	upBudget   = 128 << 10 // ciphertext bytes
)

// Step moves what can be moved now.
func (s *Session) Step(w *Worker, client, app *loop.Sock) (relay.Result, error) {
	var r relay.Result
	s.wire.budget = upBudget
	err := s.up(w, client, app, &r)
	r.Moved += upBudget - s.wire.budget
	if err != nil {
		if err.Side == "app" {
			// What the app said before it stopped reading is worth delivering, see relay.Pair.
			s.downCut = true
			app.Readable = true // its own event may come later in this turn
			_ = s.down(w, client, app, &r)
		}
		_ = s.wire.flush() // crypto/tls may have left an alert that says why
		return r, err
	}
	if err := s.down(w, client, app, &r); err != nil {
		return r, err
	}
	s.wire.keep()
	r.Done = s.upShut && s.downShut
	return r, nil
}

func (s *Session) up(w *Worker, client, app *loop.Sock, r *relay.Result) *relay.SideError {
	if client.Readable {
		s.drained = false
	}
	for {
		if len(s.held) > 0 {
			n, err := app.Send(s.held)
			if err != nil {
				return &relay.SideError{Side: "app", Err: err}
			}
			s.countUp(w, n, r)
			s.held = s.held[n:]
			if len(s.held) > 0 {
				return nil
			}
			w.R.PutChunk(s.chunk)
			s.held, s.chunk = nil, nil
		}
		if s.upEOF {
			if !s.upShut {
				app.CloseWrite()
				s.upShut = true
			}
			return nil
		}
		if s.drained {
			return nil
		}
		// Several records are gathered before one send.
		buf, n := w.R.Scratch, 0
		var err error
		for len(buf)-n >= 16<<10 || n == 0 {
			var m int
			m, err = s.tls.Read(buf[n:])
			n += m
			if err != nil {
				break
			}
		}
		if n > 0 {
			m, err := app.Send(buf[:n])
			if err != nil {
				return &relay.SideError{Side: "app", Err: err}
			}
			s.countUp(w, m, r)
			if m < n {
				s.chunk = w.R.Chunk(buf[m:n])
				s.held = s.chunk
			}
		}
		switch err {
		case nil:
		case loop.ErrWouldBlock:
			if s.wire.budget <= 0 && client.Readable {
				r.Again = true
				return nil
			}
			s.drained = true
		case io.EOF, io.ErrUnexpectedEOF:
			s.upEOF = true
		default:
			if s.wire.abort != nil {
				err = s.wire.abort // crypto/tls failed over what this refused
			}
			return &relay.SideError{Side: "client", Err: err}
		}
	}
}

func (s *Session) countUp(w *Worker, n int, r *relay.Result) {
	s.Up += uint64(n)
	r.Moved += n
	w.Decrypted.Add(uint64(n))
}

func (s *Session) down(w *Worker, client, app *loop.Sock, r *relay.Result) *relay.SideError {
	for budget := downBudget; ; {
		if len(s.wire.out) > 0 {
			before := len(s.wire.out)
			if err := s.wire.flush(); err != nil {
				return &relay.SideError{Side: "client", Err: err}
			}
			r.Moved += before - len(s.wire.out)
			if len(s.wire.out) > 0 {
				return nil
			}
		}
		if s.downEOF && s.downCut {
			return nil
		}
		if s.downEOF {
			if !s.notified {
				s.notified = true
				if err := s.tls.CloseWrite(); err != nil {
					return &relay.SideError{Side: "client", Err: err}
				}
				continue // the alert may have been left in out
			}
			if !s.downShut {
				client.CloseWrite()
				s.downShut = true
			}
			return nil
		}
		if !app.Readable {
			return nil
		}
		if budget <= 0 {
			r.Again = true
			return nil
		}
		n, err := app.Recv(w.R.Scratch)
		switch err {
		case nil:
		case io.EOF:
			s.downEOF = true
			continue
		case loop.ErrWouldBlock:
			return nil
		default:
			return &relay.SideError{Side: "app", Err: err}
		}
		w.cork = w.cork[:0] // not empty after a panic below
		s.wire.corked = true
		_, err = s.tls.Write(w.R.Scratch[:n])
		s.wire.corked = false
		sent := len(w.cork)
		if err == nil {
			err = s.wire.uncork()
		}
		if err != nil {
			return &relay.SideError{Side: "client", Err: err}
		}
		s.Down += uint64(n)
		w.Encrypted.Add(uint64(n))
		r.Moved += sent - len(s.wire.out)
		budget -= n
	}
}

// wire is the net.Conn under crypto/tls.
type wire struct {
	s           *Session
	w           *Worker
	sock        *loop.Sock
	peer, local net.Addr

	in      []byte // ciphertext not yet given to crypto/tls
	inChunk []byte // its buffer, nil while it stands in the worker's read-ahead buffer
	out     []byte // ciphertext not yet taken by the kernel
	outBuf  []byte
	ready   bool // the handshake ended: Read must not wait any more
	budget  int  // bytes that Read may still take from the socket in this turn
	corked  bool
	abort   error
}

func (c *wire) own(b []byte) {
	if len(b) > 0 {
		c.inChunk = c.w.R.Chunk(b)
		c.in = c.inChunk
	}
}

// keep moves bytes out of the shared read-ahead buffer before another session uses it.
func (c *wire) keep() {
	if len(c.in) > 0 && c.inChunk == nil {
		c.own(c.in)
	}
}

func (c *wire) drop() {
	if c.inChunk != nil {
		c.w.R.PutChunk(c.inChunk)
	}
	if c.outBuf != nil {
		c.w.R.PutChunk(c.outBuf)
	}
	c.in, c.inChunk, c.out, c.outBuf = nil, nil, nil, nil
}

func (c *wire) Read(p []byte) (int, error) {
	for {
		if c.abort != nil {
			return 0, c.abort
		}
		if len(c.in) > 0 {
			n := copy(p, c.in)
			c.in = c.in[n:]
			if len(c.in) == 0 && c.inChunk != nil {
				c.w.R.PutChunk(c.inChunk)
				c.inChunk = nil
			}
			return n, nil
		}
		if c.ready && c.budget <= 0 {
			return 0, loop.ErrWouldBlock
		}
		n, err := c.sock.Recv(c.w.ahead)
		if err == nil {
			c.in = c.w.ahead[:n]
			c.budget -= n
			continue
		}
		if err != loop.ErrWouldBlock || c.ready {
			return 0, err
		}
		c.s.pause()
	}
}

func (c *wire) Write(p []byte) (int, error) {
	if c.corked {
		c.w.cork = append(c.w.cork, p...)
		return len(p), nil
	}
	n := 0
	if len(c.out) == 0 {
		var err error
		if n, err = c.sock.Send(p); err != nil {
			return 0, err
		}
	} else if len(c.out)+len(p) > cap(c.w.cork)+maxAnswers {
		// crypto/tls reports a failed answer with the next write; reading must end too.
		c.abort = errAnswers
		return 0, c.abort
	}
	if n < len(p) {
		c.queue(p[n:])
	}
	return len(p), nil
}

// maxAnswers bounds what crypto/tls may say on its own (handshake flights, alerts,
// answers to KeyUpdate) to a client that does not read, beside the data of one step.
const maxAnswers = 64 << 10

var errAnswers = errors.New("client asks for TLS answers and does not read them")

// queue appends what the kernel did not take.
func (c *wire) queue(p []byte) {
	if len(c.out) == 0 {
		c.outBuf = c.w.R.Chunk(p)
	} else {
		c.outBuf = c.w.R.Extend(c.outBuf[:copy(c.outBuf, c.out)], p)
	}
	c.out = c.outBuf
}

func (c *wire) uncork() error {
	p := c.w.cork
	c.w.cork = p[:0]
	n, err := c.sock.Send(p)
	if err != nil {
		return err
	}
	if n < len(p) {
		c.queue(p[n:])
	}
	return nil
}

func (c *wire) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	n, err := c.sock.Send(c.out)
	if err != nil {
		return err
	}
	c.out = c.out[n:]
	if len(c.out) == 0 {
		c.w.R.PutChunk(c.outBuf)
		c.out, c.outBuf = nil, nil
	}
	return nil
}

func (c *wire) Close() error                     { return nil }
func (c *wire) LocalAddr() net.Addr              { return c.local }
func (c *wire) RemoteAddr() net.Addr             { return c.peer }
func (c *wire) SetDeadline(time.Time) error      { return nil }
func (c *wire) SetReadDeadline(time.Time) error  { return nil }
func (c *wire) SetWriteDeadline(time.Time) error { return nil }
