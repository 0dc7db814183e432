package load

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/stats"
)

// runReachable connects to one name after the other until it answers, and reports how long that took. The windows
// are the names; between makes a name known and returns, which starts its clock. Refused and closed connections are
// expected meanwhile.
func runReachable(ctx context.Context, s Spec, between func(string) error) (Result, error) {
	var took []int64
	for _, name := range s.Windows {
		if err := between(name); err != nil {
			return Result{}, err
		}
		clk := clock{start: time.Now()}
		one := s
		one.Name, one.Conns = name, 1
		if err := reach(ctx, one, clk); err != nil {
			return Result{}, err
		}
		took = append(took, clk.now())
	}
	slices.Sort(took)
	us := func(p float64) float64 { return stats.Percentile(took, p) / 1e3 }
	return Result{Windows: []Window{{Count: uint64(len(took)), P50: us(0.5), P99: us(0.99), Max: us(1)}}}, nil
}

func reach(ctx context.Context, s Spec, clk clock) error {
	ctx, cancel := context.WithTimeout(ctx, s.Duration)
	defer cancel()
	for {
		p := &plain{spec: s}
		err := p.open()
		if err == nil {
			err = p.connectAll(ctx, clk, true)
		}
		p.close()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s at %s did not answer within %v: %w", s.Name, s.Addr, s.Duration, err)
		}
		sleep(ctx, time.Millisecond)
	}
}
