package suite

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/agent"
	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/report"
	"github.com/dstack-gw/dstack-gw/bench/rig"
	"github.com/dstack-gw/dstack-gw/bench/stats"
)

// Churn is the registration load of the churn cases.
type Churn struct {
	Instances int // registered before the measurement
	Rate      int // registrations a second meanwhile
	Probes    int // names whose visibility is measured
}

// registrars is how many registrations may be under way at once: guests do not wait for each other, and a gateway that
// writes them durably can only reach a high rate by writing several together.
const registrars = 32

// visibleWithin bounds the wait for one new name.
const visibleWithin = 5 * time.Second

// numbered returns the id of the n-th instance of the churn.
func numbered(n int64) string { return fmt.Sprintf("c4%038x", n) }

// registrar registers new instances.
type registrar struct {
	ctl  *arm.Control
	next atomic.Int64

	mu   sync.Mutex
	took []int64 // ns
	err  error
}

func (g *registrar) one(ctx context.Context) (string, error) {
	id := numbered(g.next.Add(1))
	begun := time.Now()
	_, err := g.ctl.Register(ctx, arm.App, id)
	if err != nil {
		return "", err
	}
	g.mu.Lock()
	g.took = append(g.took, int64(time.Since(begun)))
	g.mu.Unlock()
	return id, nil
}

// fill registers n instances as fast as possible.
func (g *registrar) fill(ctx context.Context, n int) error {
	var wg sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(n))
	for range registrars {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if _, err := g.one(ctx); err != nil {
					g.fail(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return g.failed()
}

func (g *registrar) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.err = errors.Join(g.err, err)
}

func (g *registrar) failed() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// steady registers at a rate until stopped: it returns a function that stops it and reports the rate reached and the
// 99th percentile of a registration in microseconds.
func (g *registrar) steady(ctx context.Context, rate int) (stop func() (float64, float64, error)) {
	ctx, cancel := context.WithCancel(ctx)
	g.mu.Lock()
	g.took = nil
	g.mu.Unlock()
	begun := time.Now()
	var issued atomic.Int64
	var wg sync.WaitGroup
	for range registrars {
		wg.Go(func() {
			for ctx.Err() == nil {
				// The n-th registration is due at n/rate; late ones are made up for, up to what the gateway can take.
				due := begun.Add(time.Duration(issued.Add(1)) * time.Second / time.Duration(rate))
				select {
				case <-time.After(time.Until(due)):
				case <-ctx.Done():
					return
				}
				if _, err := g.one(ctx); err != nil && ctx.Err() == nil {
					g.fail(err)
					return
				}
			}
		})
	}
	return func() (float64, float64, error) {
		cancel()
		wg.Wait()
		elapsed := time.Since(begun).Seconds()
		g.mu.Lock()
		took := slices.Clone(g.took)
		g.mu.Unlock()
		slices.Sort(took)
		return float64(len(took)) / elapsed, stats.Percentile(took, 0.99) / 1e3, g.failed()
	}
}

// measure runs a churn case: many instances are registered, then the load runs while more come.
func (c Churn) measure(ctx context.Context, r *rig.Rig, exe string, s load.Spec, ctl *arm.Control, cell *report.Cell) (load.Result, error) {
	g := &registrar{ctl: ctl}
	if err := g.fill(ctx, c.Instances); err != nil {
		return load.Result{}, fmt.Errorf("registering %d instances: %w", c.Instances, err)
	}
	var stop func() (float64, float64, error)
	probes := map[string]string{} // instance by name
	if s.Kind == load.Reachable {
		s.Duration = visibleWithin
		for i := range c.Probes {
			id := numbered(1<<40 + int64(i)) // apart from those of the churn
			name := arm.HostOf(id, arm.Passthrough, arm.Requests)
			probes[name] = id
			s.Windows = append(s.Windows, name)
		}
		stop = g.steady(ctx, c.Rate)
	}
	res, err := agent.Load(ctx, r, exe, s, func(window string) error {
		if window == churning {
			stop = g.steady(ctx, c.Rate)
			return nil
		}
		id := probes[window]
		if _, err := ctl.Register(ctx, arm.App, id); err != nil {
			return err
		}
		return ctl.Open(ctx, id)
	})
	if stop == nil {
		return res, err
	}
	rate, p99, serr := stop()
	cell.Set("registrations", rate)
	cell.Set("registration_p99", p99)
	return res, errors.Join(err, serr)
}
