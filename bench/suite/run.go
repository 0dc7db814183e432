package suite

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/agent"
	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/cpu"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/report"
	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// Options of a run.
type Options struct {
	Arms     []arm.Arm
	Cases    []Case
	Rounds   int
	Warmup   time.Duration // of each cell
	Duration time.Duration // of each window
	// Noise is the share of the machine (0 to 1) that processes outside the bench may take in a window. A cell
	// above it is repeated up to Retries times; the least disturbed attempt counts. 0 turns this off.
	Noise   float64
	Retries int
	// Patience bounds the wait for a quiet machine before each cell.
	Patience time.Duration
	Churn    Churn
	Exe      string // this program, to start agents with
	Host     *rig.Host
	Log      *slog.Logger
}

// cellTimeout is what a cell may take besides its windows.
const cellTimeout = 60 * time.Second

// Run measures everything. It returns what it has when ctx ends, together with the error. It must be called from a
// goroutine locked to its thread (see rig.Start).
func Run(ctx context.Context, o Options) (*report.Report, error) {
	cert, err := arm.NewCertificate(time.Now())
	if err != nil {
		return nil, err
	}
	rep := &report.Report{Rounds: o.Rounds, NoiseLimit: o.Noise}
	if rep.Environment, err = environment(o); err != nil {
		return nil, err
	}
	for _, a := range o.Arms {
		if err := a.Check(); err != nil {
			return nil, err
		}
		v, err := a.Version(ctx)
		if err != nil {
			return nil, fmt.Errorf("arm %s: %w", a.Name(), err)
		}
		rep.Arms = append(rep.Arms, report.Arm{Name: a.Name(), Version: v, Config: a.Config()})
	}
	for _, c := range o.Cases {
		rep.Cases = append(rep.Cases, c.Describe())
	}
	rep.Bars = bars(o.Cases, o.Arms)
	for round := range o.Rounds {
		for _, c := range o.Cases {
			for i := range o.Arms {
				// Each round begins with another arm, so that none always follows the same one.
				a := o.Arms[(i+round)%len(o.Arms)]
				if ctx.Err() != nil {
					rep.Interrupted = true
					return rep, context.Cause(ctx)
				}
				cell := measure(ctx, o, cert, c, a)
				cell.Round = round
				if ctx.Err() != nil {
					continue // half a measurement
				}
				rep.Cells = append(rep.Cells, cell)
				progress(o.Log, c, cell)
			}
		}
	}
	return rep, nil
}

// progress says what came out of a cell.
func progress(log *slog.Logger, c Case, cell report.Cell) {
	args := []any{"round", cell.Round, "case", cell.Case, "arm", cell.Arm}
	switch {
	case cell.Error != "":
		log.Error("cell failed", append(args, "error", cell.Error)...)
		return
	case cell.Lacks != "":
		log.Debug("cell left out", append(args, "reason", cell.Lacks)...)
		return
	}
	for _, m := range c.metrics() {
		if v, ok := cell.Metrics[m.Key]; ok {
			args = append(args, m.Key, fmt.Sprintf("%.4g", v))
		}
	}
	if cell.Noisy {
		args = append(args, "disturbed", true)
	}
	log.Info("cell", args...)
}

// foreignMemory is how much others' memory may change during an idle case, in KiB a connection.
const foreignMemory = 0.5

// measure runs a cell, again if others disturbed it.
func measure(ctx context.Context, o Options, cert arm.Certificate, c Case, a arm.Arm) report.Cell {
	if why := a.Lacks(c.need()); why != "" {
		return report.Cell{Case: c.Name, Arm: a.Name(), Lacks: why}
	}
	var best report.Cell
	share := 2.0
	for try := 0; ; try++ {
		waitQuiet(ctx, o)
		cell := report.Cell{Case: c.Name, Arm: a.Name()}
		err := once(ctx, o, cert, c, a, &cell)
		if err != nil {
			cell.Error = err.Error()
			return cell
		}
		worst, moved := 0.0, 0.0
		for _, w := range cell.Windows {
			worst = max(worst, w.Usage.ForeignShare())
			moved = max(moved, math.Abs(w.Foreign))
		}
		cell.Noisy = o.Noise > 0 && (worst > o.Noise || moved > foreignMemory)
		if worst < share {
			best, share = cell, worst
		}
		if !cell.Noisy || try >= o.Retries || ctx.Err() != nil {
			return best
		}
		o.Log.Info("cell disturbed, repeating", "case", c.Name, "arm", a.Name(), "others", fmt.Sprintf("%.0f%%", 100*worst))
	}
}

// once runs a cell in a rig of its own.
func once(ctx context.Context, o Options, cert arm.Certificate, c Case, a arm.Arm, cell *report.Cell) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, cellTimeout+2*o.Duration+c.Spec.Duration, errors.New("cell took too long"))
	defer cancel()
	r, err := o.Host.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	back, err := agent.StartBackend(ctx, r, o.Exe)
	if err != nil {
		return err
	}
	run, err := a.Start(ctx, r, cert)
	if err != nil {
		return err
	}
	if run.Control != nil {
		defer run.Control.Close()
	}
	s := c.Spec
	s.Addr, s.Name = run.Entry(c.Mode, c.Service), arm.Host(c.Mode, c.Service)
	s.Warmup, s.Duration = o.Warmup, o.Duration
	s.Groups = cpu.Groups{Bench: os.Getpid(), Gateway: run.PID, Backend: back.PID()}
	if s.TLS != nil {
		withCert := *s.TLS
		withCert.Cert = cert.DER
		s.TLS = &withCert
	}
	var res load.Result
	if c.Churn {
		res, err = o.Churn.measure(ctx, r, o.Exe, s, run.Control, cell)
	} else {
		res, err = agent.Load(ctx, r, o.Exe, s, nil)
	}
	if err == nil && run.Process != nil {
		select {
		case <-run.Process.Done():
			err = run.Process.Failed("did not survive the load")
		default:
		}
	}
	if err == nil {
		var n int
		if n, err = r.Tracked(rig.Gateway); err == nil {
			cell.Set("tracked", float64(n))
		}
	}
	if err == nil && run.Facts != nil {
		cell.Facts, err = run.Facts(ctx)
	}
	if berr := back.Stop(ctx); berr != nil {
		err = errors.Join(err, berr)
	}
	if err != nil {
		if run.Process != nil {
			return fmt.Errorf("%w; %w", err, run.Process.Failed("state"))
		}
		return err
	}
	for k, v := range res.Facts {
		if cell.Facts == nil {
			cell.Facts = map[string]string{}
		}
		cell.Facts[k] = v
	}
	cell.Windows = res.Windows
	for k, v := range c.values(res.Windows) {
		cell.Set(k, v)
	}
	return nil
}

// waitQuiet waits until others use no more of the machine than the run allows.
func waitQuiet(ctx context.Context, o Options) {
	const look = 200 * time.Millisecond
	for end := time.Now().Add(o.Patience); o.Noise > 0 && time.Now().Before(end) && ctx.Err() == nil; {
		a, err := cpu.Begin("/proc")
		if err != nil {
			return
		}
		time.Sleep(look)
		b, err := cpu.End("/proc")
		if err != nil || cpu.Between(a, b, cpu.Groups{Bench: os.Getpid()}).ForeignShare() <= o.Noise {
			return
		}
	}
}
