package relay

import (
	"fmt"
	"io"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
)

// Result of a turn.
type Result struct {
	// Moved is the idle clock's progress in this turn: bytes that came from or left
	// towards a peer.
	Moved int
	// Again asks for another turn without waiting for an edge.
	Again bool
	// Done is set when both directions are closed.
	Done bool
}

// Flow is one direction of a connection.
type Flow struct {
	// Total counts the bytes that left through the destination.
	Total uint64

	held   []byte // copy mode: read but not yet written; chunk is its backing buffer
	chunk  []byte
	pipe   *pipe
	inPipe int
	full   uint8 // full reads in a row
	eof    bool  // source said FIN
	shut   bool  // FIN passed on
	cut    bool  // source is known to have failed: its end is not a clean one
}

// Pair relays between a client and an app socket.
type Pair struct {
	// Up is client to app, Down is app to client.
	Up, Down Flow
	// Started is the loop time at which the relay began.
	Started int64
	// Spliced says that the connection used splice(2) at least once.
	Spliced bool
}

// SideError names the socket on which an operation failed.
type SideError struct {
	Side string // "client" or "app"
	Err  error
}

// sides names the source of each direction.
var sides = [2]string{ToApp: "client", ToClient: "app"}

func (e *SideError) Error() string { return fmt.Sprintf("%s: %v", e.Side, e.Err) }
func (e *SideError) Unwrap() error { return e.Err }

// Hold queues bytes that were read before the relay began (ClientHello, PROXY header)
// for the app. It must be called before the first Step; p is copied.
func (p *Pair) Hold(w *Worker, b []byte) {
	if len(b) == 0 {
		return
	}
	p.Up.chunk = w.Chunk(b)
	p.Up.held = p.Up.chunk
}

// Step moves what can be moved now. now is the loop time in ns.
func (p *Pair) Step(w *Worker, now int64, client, app *loop.Sock) (Result, error) {
	var r Result
	if err := p.flow(w, now, &p.Up, &p.Down, client, app, &r, ToApp); err != nil {
		if err.Side == sides[ToClient] {
			// An app that refuses a request before it read all of it answers and closes; its
			// kernel then resets. The answer is here and worth delivering, as far as it goes.
			p.Down.cut = true
			app.Readable = true // its own event may come later in this turn
			_ = p.flow(w, now, &p.Down, &p.Up, app, client, &r, ToClient)
		}
		return r, err
	}
	if err := p.flow(w, now, &p.Down, &p.Up, app, client, &r, ToClient); err != nil {
		return r, err
	}
	r.Done = p.Up.shut && p.Down.shut
	return r, nil
}

func (p *Pair) mayRelease(w *Worker, f *Flow) {
	if f.pipe != nil && f.inPipe == 0 {
		w.putPipe(f.pipe)
		f.pipe = nil
	}
}

// wantSplice reports whether f should move its next bytes by splice.
func (p *Pair) wantSplice(w *Worker, now int64, f *Flow) bool {
	g := &w.Gate
	switch {
	case g.Off:
		return false
	case g.Auto:
		return f.full >= 2
	case g.AfterBytes == 0 && g.AfterDuration == 0:
		return true
	}
	return g.AfterBytes != 0 && p.Up.Total+p.Down.Total >= g.AfterBytes ||
		g.AfterDuration != 0 && now-p.Started >= g.AfterDuration
}

func (p *Pair) flow(w *Worker, now int64, f, other *Flow, src, dst *loop.Sock, r *Result, dir int) *SideError {
	budget := turnBudget
	for {
		// What is held goes first.
		if f.inPipe > 0 {
			n, err := dst.SpliceFrom(f.pipe.r, f.inPipe)
			if err != nil {
				return &SideError{sides[1-dir], err}
			}
			if n == 0 {
				return nil
			}
			f.inPipe -= n
			f.sent(n, r)
			w.Spliced[dir].Add(uint64(n))
			budget -= n
			continue
		}
		if len(f.held) > 0 {
			n, err := dst.Send(f.held)
			if err != nil {
				return &SideError{sides[1-dir], err}
			}
			f.sent(n, r)
			w.Copied[dir].Add(uint64(n))
			f.held = f.held[n:]
			if len(f.held) > 0 {
				return nil
			}
			w.PutChunk(f.chunk)
			f.held, f.chunk = nil, nil
		}
		if f.eof {
			if !f.shut && !f.cut {
				p.mayRelease(w, f)
				if !other.shut {
					dst.CloseWrite() // else the owner closes both now, which says the same
				}
				f.shut = true
			}
			return nil
		}
		if !src.Readable {
			p.mayRelease(w, f)
			return nil
		}
		if budget <= 0 {
			r.Again = true
			return nil
		}

		if p.wantSplice(w, now, f) {
			if f.pipe == nil {
				f.pipe = w.pipe()
			}
			if f.pipe != nil {
				if !p.Spliced {
					p.Spliced = true
					w.SpliceEngaged.Add(1)
				}
				// The pipe is empty here, so EAGAIN can only mean that the source is drained.
				n, err := src.SpliceTo(f.pipe.w, f.pipe.size)
				if err == nil {
					f.inPipe = n
					r.Moved += n
					if n < len(w.Scratch)/4 {
						f.full = 0 // no longer bulk: small messages are cheaper to copy
					}
					continue
				}
				if err = f.readEnd(err); err != nil {
					return &SideError{sides[dir], err}
				}
				continue
			}
		}

		n, err := src.Recv(w.Scratch)
		if err != nil {
			if err = f.readEnd(err); err != nil {
				return &SideError{sides[dir], err}
			}
			continue
		}
		switch {
		case n == len(w.Scratch):
			f.full = min(f.full+1, 2)
		case n < len(w.Scratch)/4:
			f.full = 0
		}
		r.Moved += n
		m, err := dst.Send(w.Scratch[:n])
		if err != nil {
			return &SideError{sides[1-dir], err}
		}
		f.sent(m, r)
		w.Copied[dir].Add(uint64(m))
		budget -= m
		if m < n {
			f.chunk = w.Chunk(w.Scratch[m:n])
			f.held = f.chunk
		}
	}
}

// readEnd sorts out why a read gave nothing; only real errors come back.
func (f *Flow) readEnd(err error) error {
	switch err {
	case io.EOF:
		f.eof = true
		return nil
	case loop.ErrWouldBlock:
		return nil // Readable is false now; the caller's next look ends the turn
	}
	return err
}

func (f *Flow) sent(n int, r *Result) {
	f.Total += uint64(n)
	r.Moved += n
}

// Ended reports whether a direction (ToApp, ToClient) is over: its source said so
// and everything before that was passed on.
func (p *Pair) Ended(dir int) bool {
	if dir == ToApp {
		return p.Up.shut
	}
	return p.Down.shut
}

// Release returns buffers and pipes; the sockets are the caller's.
func (p *Pair) Release(w *Worker) {
	for _, f := range []*Flow{&p.Up, &p.Down} {
		if f.pipe != nil {
			if f.inPipe > 0 {
				w.closePipe(f.pipe) // bytes of this connection must never reach another one
			} else {
				w.putPipe(f.pipe)
			}
			f.pipe, f.inPipe = nil, 0
		}
		if f.chunk != nil {
			w.PutChunk(f.chunk)
			f.held, f.chunk = nil, nil
		}
	}
}
