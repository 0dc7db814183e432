package customdomain

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// flight is a lookup in progress, shared by all who want its record.
type flight struct {
	done  chan struct{} // closed when entry is set
	entry *entry
}

// wait is what there is to wait for after start: an entry, an error, or a flight
// and perhaps an expired entry to fall back on.
type wait struct {
	entry  *entry
	err    error
	flight *flight
	stale  *entry
}

// start makes sure that the record is known or being looked up.
func (r *Resolver) start(k key) wait {
	now := r.opt.Clock()
	e := r.cache.get(k)
	if e.fresh(now) {
		e.touch(now)
		return wait{entry: e}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return wait{err: ErrClosed}
	}
	if f := r.flights[k]; f != nil {
		r.metrics.coalesced.Inc()
		return wait{flight: f, stale: e}
	}
	// One may have landed since the first look.
	if e = r.cache.get(k); e.fresh(now) {
		return wait{entry: e}
	}
	if len(r.flights) >= r.opt.MaxOutstanding {
		r.metrics.refused.Inc()
		err := fmt.Errorf("%w: %d, the limit", ErrOverload, len(r.flights))
		if again := e.repeat(now, err); again != nil {
			return wait{entry: again}
		}
		return wait{err: err}
	}
	f := &flight{done: make(chan struct{})}
	r.flights[k] = f
	r.wg.Go(func() { r.fly(k, f, e) })
	return wait{flight: f, stale: e}
}

// fly looks the record up, whoever may still be waiting for it. old is what was
// known before.
func (r *Resolver) fly(k key, f *flight, old *entry) {
	ctx, cancel := context.WithTimeout(r.ctx, r.opt.Timeout)
	defer cancel()
	begin := r.opt.Clock()
	e := r.lookup(ctx, k)
	now := r.opt.Clock()
	r.metrics.observe(e.state, now.Sub(begin))
	if e.state == unknown {
		if again := old.repeat(now, e.err); again != nil {
			e = again
		}
	}
	e.touch(now)
	f.entry = e
	r.land(k, e, now)
	close(f.done)
}

// land publishes what a flight brought and takes it off the table, in one step
// for extend.
func (r *Resolver) land(k key, e *entry, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.flights, k)
	if !r.closed {
		r.cache.put(k, e, now)
	}
}

// wait returns the entry that w stands for.
func (r *Resolver) wait(ctx context.Context, k key, w wait) (*entry, error) {
	if w.flight == nil {
		return w.entry, w.err
	}
	var late <-chan time.Time
	if w.stale.repeat(r.opt.Clock(), nil) != nil {
		t := time.NewTimer(staleWait)
		defer t.Stop()
		late = t.C
	}
	var cause error
	select {
	case <-w.flight.done:
		if errors.Is(w.flight.entry.err, ErrClosed) {
			return nil, w.flight.entry.err
		}
		return w.flight.entry, nil
	case <-late:
		cause = fmt.Errorf("%w: no answer for TXT record %s within %v", ErrResolver, r.recordName(k), staleWait)
	case <-ctx.Done():
		if cause = ctx.Err(); errors.Is(cause, context.DeadlineExceeded) {
			cause = fmt.Errorf("%w: no answer for TXT record %s in time: %w", ErrResolver, r.recordName(k), cause)
		} else {
			return nil, fmt.Errorf("wait for TXT record %s: %w", r.recordName(k), cause)
		}
	}
	now := r.opt.Clock()
	again := w.stale.repeat(now, cause)
	if again == nil {
		return nil, cause
	}
	r.extend(k, w.flight, again, now)
	return again, nil
}

// extend publishes the stale entry e for those who come while the flight is still
// in the air. What the flight brings replaces it.
func (r *Resolver) extend(k key, f *flight, e *entry, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.flights[k] == f && !r.cache.get(k).fresh(now) {
		r.cache.put(k, e, now)
	}
}
