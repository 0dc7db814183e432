package load

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/cpu"
	"github.com/dstack-gw/dstack-gw/bench/stats"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// Kind of a case.
type Kind string

// Kinds.
const (
	Requests  Kind = "requests"  // 64 B request/response on lasting connections
	Setup     Kind = "setup"     // connect, hello or TLS handshake, one request, close; again and again
	Bulk      Kind = "bulk"      // as many bytes as go through
	Idle      Kind = "idle"      // connections that were used once and are kept open
	Reachable Kind = "reachable" // how long until a name that became known answers
)

// Spec describes one case against one arm. Durations are in nanoseconds in JSON.
type Spec struct {
	Kind  Kind           `json:"kind"`
	Addr  netip.AddrPort `json:"addr"` // where to connect: the gateway, or the backend itself
	Name  string         `json:"name"` // SNI
	Conns int            `json:"conns"`

	// TLS makes the client speak TLS 1.3; otherwise it sends a ClientHello and then plain messages (passthrough).
	TLS *TLS `json:"tls,omitempty"`
	// PostQuantum makes the passthrough ClientHello carry an X25519MLKEM768 key share (about 1.5 KiB).
	PostQuantum bool           `json:"post_quantum,omitempty"`
	Direction   wire.Direction `json:"direction,omitempty"` // Bulk only
	// HalfClose makes both ends of a Bulk transfer close their sending sides at different moments.
	HalfClose bool `json:"half_close,omitempty"`

	Warmup   time.Duration `json:"warmup"`
	Duration time.Duration `json:"duration"`
	// Windows names the windows to measure, each Duration long (Requests and Setup; one unnamed if empty), or the
	// names to reach, each within Duration (Reachable).
	Windows []string   `json:"windows,omitempty"`
	Groups  cpu.Groups `json:"groups"`
	Proc    string     `json:"proc"` // where the proc file system is mounted
}

// TLS describes the client of the terminating cases.
type TLS struct {
	Group  string `json:"group"`  // X25519 or X25519MLKEM768, the only key exchange offered
	Resume bool   `json:"resume"` // every connection after the first resumes a session
	Cert   []byte `json:"cert"`   // DER of the only leaf certificate accepted
}

// Window is what was measured in one window.
type Window struct {
	Name  string    `json:"name,omitempty"`
	Usage cpu.Usage `json:"usage"`
	Count uint64    `json:"count"`           // requests, or connections of Setup and Idle
	Bytes uint64    `json:"bytes,omitempty"` // Bulk: payload received and verified

	// Latencies in microseconds of requests (Requests), or from connect to reply (Setup), begun in the window.
	P50 float64 `json:"p50_us,omitempty"`
	P99 float64 `json:"p99_us,omitempty"`
	Max float64 `json:"max_us,omitempty"`

	// Idle: KiB a connection. Memory is the whole machine's growth without processes
	// outside the bench, Slab and RSS (gateway processes) are parts of it.
	Memory float64 `json:"memory_kib,omitempty"`
	Slab   float64 `json:"slab_kib,omitempty"`
	RSS    float64 `json:"rss_kib,omitempty"`
	// Foreign is how much processes outside the bench grew or shrank meanwhile, in KiB a connection. If it is not
	// small, Memory is not to be trusted: their page tables, buffers and births cannot be taken off.
	Foreign float64 `json:"foreign_kib,omitempty"`
}

// Result of a run.
type Result struct {
	Windows []Window `json:"windows"`
	// Facts are what the client saw of the gateway: key exchange, cipher suite.
	Facts map[string]string `json:"facts,omitempty"`
}

// ErrHandshake says that the gateway did not complete the TLS handshake the case asks for.
var ErrHandshake = errors.New("TLS handshake failed")

// Run drives the case. between is called before each window but the first (churn starts there), of Reachable before
// each; it may be nil where there is but one window.
func Run(ctx context.Context, s Spec, between func(window string) error) (Result, error) {
	if s.Conns < 1 || s.Duration <= 0 {
		return Result{}, fmt.Errorf("case with %d connections for %v: both must be positive", s.Conns, s.Duration)
	}
	if s.Proc == "" {
		s.Proc = "/proc"
	}
	if len(s.Windows) == 0 {
		s.Windows = []string{""}
	}
	switch {
	case s.Kind == Bulk:
		return runBulk(ctx, s)
	case s.Kind == Idle:
		return runIdle(ctx, s)
	case s.Kind == Reachable:
		return runReachable(ctx, s, between)
	case s.Kind == Requests && s.TLS != nil:
		return runLoop(ctx, s, between, &tlsRequests{spec: s})
	case s.Kind == Setup && s.TLS != nil:
		return runLoop(ctx, s, between, &tlsSetup{spec: s})
	case s.Kind == Requests || s.Kind == Setup:
		return runLoop(ctx, s, between, &plain{spec: s})
	}
	return Result{}, fmt.Errorf("unknown kind of case %q", s.Kind)
}

// record is one completed request or connection; times are nanoseconds since the epoch of the run.
type record struct{ end, took int64 }

// driver produces load until stopped.
type driver interface {
	// run produces load until ctx ends, calls ready once when all connections are up, and returns the records.
	run(ctx context.Context, clock clock, ready func()) ([]record, error)
	// facts are asked for after run.
	facts() map[string]string
}

// clock counts nanoseconds since its start, monotonically.
type clock struct{ start time.Time }

func (c clock) now() int64 { return int64(time.Since(c.start)) }

// errStopped is the cause of the end of a measurement that went well.
var errStopped = errors.New("measurement over")

// connectTimeout bounds how long all connections may take to come up.
const connectTimeout = 20 * time.Second

// runLoop runs a driver and cuts windows out of it.
func runLoop(ctx context.Context, s Spec, between func(string) error, d driver) (Result, error) {
	clk := clock{start: time.Now()}
	inner, stop := context.WithCancelCause(ctx)
	defer stop(errStopped)

	ready := make(chan struct{})
	var once sync.Once
	type outcome struct {
		records []record
		err     error
	}
	done := make(chan outcome, 1)
	go func() {
		r, err := d.run(inner, clk, func() { once.Do(func() { close(ready) }) })
		done <- outcome{r, err}
	}()

	type span struct{ a, b int64 }
	var windows []Window
	var spans []span
	measure := func() error {
		select {
		case <-ready:
		case <-time.After(connectTimeout):
			return fmt.Errorf("%d connections to %s did not come up within %v", s.Conns, s.Addr, connectTimeout)
		}
		sleep(inner, s.Warmup)
		for i, name := range s.Windows {
			if i > 0 {
				if err := between(name); err != nil {
					return err
				}
			}
			before, err := cpu.Begin(s.Proc)
			if err != nil {
				return err
			}
			a := clk.now()
			sleep(inner, s.Duration)
			b := clk.now()
			after, err := cpu.End(s.Proc)
			if err != nil {
				return err
			}
			spans = append(spans, span{a, b})
			windows = append(windows, Window{Name: name, Usage: cpu.Between(before, after, s.Groups)})
		}
		return nil
	}
	measured := make(chan error, 1)
	go func() { measured <- measure() }()

	var out outcome
	var err error
	select {
	case err = <-measured:
		stop(errStopped)
		out = <-done
	case out = <-done: // the driver gave up
		if out.err == nil {
			out.err = errors.New("load ended before the measurement")
		}
		stop(out.err)
		once.Do(func() { close(ready) })
		<-measured
	}
	if err := errors.Join(err, out.err); err != nil {
		return Result{}, err
	}
	for i := range windows {
		fill(&windows[i], out.records, spans[i].a, spans[i].b)
		if windows[i].Count == 0 {
			return Result{}, fmt.Errorf("nothing completed within %v", s.Duration)
		}
	}
	return Result{Windows: windows, Facts: d.facts()}, nil
}

// fill counts the records that ended between a and b and computes the percentiles of those that began there too.
func fill(w *Window, records []record, a, b int64) {
	var took []int64
	for _, r := range records {
		if r.end < a || r.end >= b {
			continue
		}
		w.Count++
		if r.end-r.took >= a {
			took = append(took, r.took)
		}
	}
	if len(took) == 0 {
		return
	}
	slices.Sort(took)
	us := func(p float64) float64 { return stats.Percentile(took, p) / 1e3 }
	w.P50, w.P99, w.Max = us(0.5), us(0.99), us(1)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
