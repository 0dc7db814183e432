package controlplane

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"
)

const (
	// smallBody is what everybody may send at any time. A registration has some hundred bytes; only a policy with
	// thousands of ports has more.
	smallBody = 64 << 10
	// largeBodies is how many larger ones are read at the same time. They are kept in memory up to their limit (10 MiB).
	largeBodies = 8
	largeWait   = 5 * time.Second
	// refusedBody is how much of a refused body is read and dropped, so that a sender that writes before it reads sees
	// the answer instead of a reset.
	refusedBody = 1 << 20
)

var (
	errBodyTooLarge = errors.New("payload too large")
	errBodiesBusy   = errors.New("too many large requests at the same time, try again later")
)

// bodyGuard bounds the memory that callers of the main server can take with bodies. Without it every connection may
// have 10 MiB lying there for two minutes, and connections cost a stranger nothing. Strangers, who have no verified
// certificate, can send small bodies only: nothing they may call needs more.
type bodyGuard struct {
	next http.Handler
	// slots are taken by bodies that are not small.
	slots chan struct{}
	wait  time.Duration
}

func guardBodies(next http.Handler) *bodyGuard {
	return &bodyGuard{next: next, slots: make(chan struct{}, largeBodies), wait: largeWait}
}

func (g *bodyGuard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Body == nil || r.Body == http.NoBody {
		g.next.ServeHTTP(w, r)
		return
	}
	b := &guardedBody{ReadCloser: r.Body, ctx: r.Context(), guard: g, known: r.TLS != nil && len(r.TLS.VerifiedChains) > 0}
	defer b.release()
	guarded := *r
	guarded.Body = b
	g.next.ServeHTTP(w, &guarded)
}

// guardedBody is the body of one request. Like every body it has one reader at a time.
type guardedBody struct {
	io.ReadCloser
	ctx     context.Context
	guard   *bodyGuard
	known   bool // the caller has a verified certificate
	read    int
	slot    bool
	refused error
}

func (b *guardedBody) Read(p []byte) (int, error) {
	if b.refused != nil {
		return 0, b.refused
	}
	if !b.slot {
		if b.read == smallBody {
			// The end may come just here.
			var one [1]byte
			n, err := io.ReadFull(b.ReadCloser, one[:])
			if n == 0 {
				return 0, err
			}
			if b.refused = b.takeSlot(); b.refused != nil {
				_, _ = io.CopyN(io.Discard, b.ReadCloser, refusedBody) // an error is a sender who stopped
				return 0, b.refused
			}
			b.read++
			return copy(p, one[:]), nil
		}
		p = p[:min(len(p), smallBody-b.read)]
	}
	n, err := b.ReadCloser.Read(p)
	b.read += n
	return n, err
}

func (b *guardedBody) takeSlot() error {
	if !b.known {
		return errBodyTooLarge
	}
	timeout := time.NewTimer(b.guard.wait)
	defer timeout.Stop()
	select {
	case b.guard.slots <- struct{}{}:
		b.slot = true
		return nil
	case <-timeout.C:
		return errBodiesBusy
	case <-b.ctx.Done():
		return b.ctx.Err()
	}
}

func (b *guardedBody) release() {
	if b.slot {
		<-b.guard.slots
	}
}
