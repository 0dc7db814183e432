package load

import (
	"context"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/cpu"
)

// settle is how long memory is left alone before it is measured: sockets' timers and deferred frees must have run.
const settle = time.Second

// primed is how many connections are opened before the first measurement, so that pools and code are in place.
const primed = 64

// runIdle opens the connections, uses each once, and measures what they cost while nothing happens on them.
func runIdle(ctx context.Context, s Spec) (Result, error) {
	clk := clock{start: time.Now()}
	open := func(n int) (*plain, error) {
		part := s
		part.Conns = n
		p := &plain{spec: part}
		if err := p.open(); err != nil {
			p.close()
			return nil, err
		}
		if err := p.connectAll(ctx, clk, true); err != nil {
			p.close()
			return nil, err
		}
		p.records = nil
		return p, nil
	}
	first, err := open(primed)
	if err != nil {
		return Result{}, err
	}
	defer first.close()
	sleep(ctx, settle)
	before, err := cpu.ReadMemory(s.Proc, s.Groups)
	if err != nil {
		return Result{}, err
	}
	rest, err := open(s.Conns)
	if err != nil {
		return Result{}, err
	}
	defer rest.close()
	sleep(ctx, settle)
	after, err := cpu.ReadMemory(s.Proc, s.Groups)
	if err != nil {
		return Result{}, err
	}
	a, err := cpu.Begin(s.Proc)
	if err != nil {
		return Result{}, err
	}
	sleep(ctx, s.Duration)
	b, err := cpu.End(s.Proc)
	if err != nil {
		return Result{}, err
	}
	// The connections must have survived doing nothing.
	for i := range rest.conns {
		c := &rest.conns[i]
		c.seq = 1
		if err := rest.request(i, c, clk); err != nil {
			return Result{}, err
		}
		for c.at == requesting {
			if err := rest.turn(ctx, clk); err != nil {
				return Result{}, err
			}
			if ctx.Err() != nil {
				return Result{}, context.Cause(ctx)
			}
		}
	}
	each := func(a, b uint64) float64 { return (float64(b) - float64(a)) / float64(s.Conns) }
	own := func(m cpu.Memory) uint64 { return m.Used - min(m.Used, m.Foreign) }
	return Result{Windows: []Window{{
		Usage:  cpu.Between(a, b, s.Groups),
		Count:  uint64(s.Conns),
		Memory: each(own(before), own(after)),
		Slab:   each(before.Slab, after.Slab),
		RSS:    each(before.RSS, after.RSS),

		Foreign: each(before.Foreign, after.Foreign),
	}}}, nil
}
