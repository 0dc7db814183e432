package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/rig"
	"github.com/dstack-gw/dstack-gw/bench/soak"
)

// runSoak runs the soak and reports. Its error lists what the gateway did wrong.
func runSoak(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("bench soak", flag.ContinueOnError)
	fs.SetOutput(stderr)
	var o soak.Options
	fs.IntVar(&o.Conns, "conns", 8000, "connections of the mix (0: leave the mix out); a gateway needs two descriptors each, and pipes")
	fs.IntVar(&o.TLS, "tls", 1000, "of which the gateway terminates TLS")
	fs.DurationVar(&o.Duration, "duration", time.Minute, "length of the mix, from when all connections are open")
	fs.DurationVar(&o.Settle, "settle", 5*time.Second, "time after which nothing may be left of closed connections")
	fs.IntVar(&o.Idle, "idle", 8000, "forwarded connections of the memory measurement (0: leave it out)")
	fs.IntVar(&o.IdleTLS, "idle-tls", 4000, "terminated connections of the memory measurement (0: leave it out)")
	fs.IntVar(&o.Stalled, "stalled", 160, "connections that stall in both directions while the gateway has few descriptors (0: leave it out)")
	fs.Uint64Var(&o.Seed, "seed", uint64(time.Now().Unix()), "what the connections do follows from it")
	var (
		ours    = fs.String("ours-bin", "", "the gateway (default: built from ./cmd/dstack-gw)")
		jsonOut = fs.String("json", "", "file for all figures")
		mdOut   = fs.String("md", "", "file for the Markdown report (default: standard output)")
	)
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if o.Conns > 0 && o.TLS > o.Conns {
		return fmt.Errorf("--tls %d is more than --conns %d", o.TLS, o.Conns)
	}
	o.Log = slog.New(slog.NewTextHandler(stderr, nil))
	o.Host = &rig.Host{Log: o.Log}
	if err := o.Host.Sweep(); err != nil {
		return err
	}
	var err error
	if o.Exe, err = os.Executable(); err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	tmp, err := o.Host.TempDir("build")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	b := binaries{ours: *ours, dir: tmp, log: o.Log}
	if o.Gateway, err = b.build(ctx); err != nil {
		return err
	}
	rep, err := soak.Run(ctx, o)
	if rep == nil {
		return err
	}
	text, jerr := rep.JSON()
	if jerr == nil && *jsonOut != "" {
		jerr = os.WriteFile(*jsonOut, text, 0o644)
	}
	var merr error
	if *mdOut == "" {
		_, merr = io.WriteString(stdout, rep.Markdown())
	} else {
		merr = os.WriteFile(*mdOut, []byte(rep.Markdown()), 0o644)
	}
	if n := len(rep.Problems); n > 0 {
		err = errors.Join(err, fmt.Errorf("soak: %d problem(s) (seed %d), the first: %s", n, o.Seed, rep.Problems[0]))
	}
	return errors.Join(err, jerr, merr)
}
