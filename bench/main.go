package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/agent"
	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/report"
	"github.com/dstack-gw/dstack-gw/bench/rig"
	"github.com/dstack-gw/dstack-gw/bench/soak"
	"github.com/dstack-gw/dstack-gw/bench/suite"
)

const usage = `usage: bench run [flags]    measure (as root); see bench run -h
       bench soak [flags]   keep thousands of connections of all kinds open and check that nothing is lost (as root)
       bench list           print the cases
`

func main() {
	// Programs in the rig are told to end when the thread that started them does (see rig.Start): the main thread
	// lives as long as the harness.
	runtime.LockOSThread()
	os.Exit(command(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func command(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		io.WriteString(stderr, usage)
		return 2
	}
	var err error
	switch args[0] {
	case "run":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = run(ctx, args[1:], stdout, stderr)
	case "soak":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = runSoak(ctx, args[1:], stdout, stderr)
	case "soak-agent":
		if len(args) != 2 {
			err = errUsage
			break
		}
		err = soak.Agent(args[1], stdin, stdout)
	case "list":
		for _, c := range suite.Cases(suite.Sizes{Idle: idleConns}) {
			fmt.Fprintf(stdout, "%-24s %s\n", c.Name, c.Title)
		}
	case "agent":
		if len(args) != 2 {
			err = errUsage
			break
		}
		// The agents' garbage is small; collecting it often would only take time from the gateway.
		debug.SetGCPercent(400)
		err = agent.Main(context.Background(), args[1], stdin, stdout)
	default:
		err = errUsage
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errUsage), errors.Is(err, flag.ErrHelp):
		io.WriteString(stderr, usage)
		return 2
	}
	fmt.Fprintln(stderr, "bench:", err)
	return 1
}

var errUsage = errors.New("usage")

// Defaults of a full run.
const (
	idleConns = 4000
	instances = 10_000
	churnRate = 1000
)

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := flag.NewFlagSet("bench run", flag.ContinueOnError)
	fs.SetOutput(stderr)
	var (
		arms     = fs.String("arms", "", "comma-separated arms: "+strings.Join(arm.Known(), ", ")+", ours, upstream; each may be NAME=FILE for a dstack gateway with FILE appended to its configuration, e.g. ours-relay=relay.toml (default: all peers, ours if it can be built, upstream if --upstream-bin is given)")
		cases    = fs.String("cases", "all", "comma-separated patterns of case names, see bench list")
		rounds   = fs.Int("rounds", 5, "rounds; arms take turns within each")
		duration = fs.Duration("duration", 2*time.Second, "length of a measuring window")
		warmup   = fs.Duration("warmup", 300*time.Millisecond, "load before a window opens")
		idle     = fs.Int("idle", idleConns, "connections of the idle case (at most about 9,500: a proxy needs two descriptors each)")
		inst     = fs.Int("instances", instances, "instances registered before a churn case")
		rate     = fs.Int("churn", churnRate, "registrations a second in the churn cases")
		noise    = fs.Float64("noise", 0.05, "share of the machine that other processes may take in a window (0: do not care)")
		patience = fs.Duration("patience", 30*time.Second, "longest wait for a quiet machine before each cell")
		retries  = fs.Int("retries", 2, "how often a disturbed cell is repeated")
		ours     = fs.String("ours-bin", "", "our gateway (default: built from ./cmd/dstack-gw)")
		upstream = fs.String("upstream-bin", "", "upstream's gateway")
		quick    = fs.Bool("quick", false, "one short round of a few cases: checks that everything runs and that content is intact; its numbers mean nothing")
		jsonOut  = fs.String("json", "", "file for all results")
		mdOut    = fs.String("md", "", "file for the Markdown report (default: standard output)")
		svgOut   = fs.String("svg", "", "directory for the charts")
		verbose  = fs.Bool("v", false, "also say which cells are left out")
	)
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	host := &rig.Host{Log: log}
	o := suite.Options{
		Rounds: *rounds, Warmup: *warmup, Duration: *duration,
		Noise: *noise, Patience: *patience, Retries: *retries,
		Churn: suite.Churn{Instances: *inst, Rate: *rate, Probes: 50},
		Exe:   exe, Host: host, Log: log,
	}
	if *quick {
		o.Rounds, o.Warmup, o.Duration, o.Noise = 1, 30*time.Millisecond, 150*time.Millisecond, 0
		o.Churn.Instances, o.Churn.Probes, *idle = 200, 5, 200
	}
	all := suite.Cases(suite.Sizes{Idle: *idle})
	if o.Cases, err = suite.Select(all, *cases); err != nil {
		return err
	}
	if *quick && *cases == "all" {
		o.Cases = nil
		for _, c := range all {
			if c.Quick {
				o.Cases = append(o.Cases, c)
			}
		}
	}
	if err := host.Sweep(); err != nil {
		return err
	}
	tmp, err := host.TempDir("build")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	b := binaries{ours: *ours, upstream: *upstream, dir: tmp, log: log}
	if o.Arms, err = b.arms(ctx, *arms); err != nil {
		return err
	}
	rep, err := suite.Run(ctx, o)
	if rep == nil {
		return err
	}
	return errors.Join(err, save(rep, *jsonOut, *mdOut, *svgOut, stdout), failures(rep))
}

// failures says which cells failed.
func failures(rep *report.Report) error {
	failed := rep.Failed()
	if len(failed) == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d cells failed, the first: %s on %s: %s", len(failed), len(rep.Cells), failed[0].Case, failed[0].Arm, failed[0].Error)
}

// binaries finds or builds the dstack gateways.
type binaries struct {
	ours, upstream string
	dir            string
	log            *slog.Logger
}

func (b *binaries) arms(ctx context.Context, names string) ([]arm.Arm, error) {
	var out []arm.Arm
	if names == "" {
		names = strings.Join(arm.Known(), ",")
		if _, err := b.build(ctx); err == nil {
			names += ",ours"
		} else {
			b.log.Warn("arm ours is left out", "reason", err)
		}
		if b.upstream != "" {
			names += ",upstream"
		}
	}
	for _, name := range strings.Split(names, ",") {
		name, file, _ := strings.Cut(name, "=")
		var a arm.Arm
		var err error
		switch {
		case strings.HasPrefix(name, "ours"):
			var bin, extra string
			if bin, err = b.build(ctx); err == nil {
				extra, err = read(file)
			}
			a = arm.Dstack{Label: name, Binary: bin, Extra: extra}
		case strings.HasPrefix(name, "upstream"):
			if b.upstream == "" {
				return nil, errors.New("arm upstream needs --upstream-bin")
			}
			var extra string
			extra, err = read(file)
			a = arm.Dstack{Label: name, Binary: b.upstream, Extra: extra}
		default:
			a, err = arm.Peer(ctx, name)
		}
		if err != nil {
			return nil, err
		}
		if err := a.Check(); err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

func read(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading the arm's configuration: %w", err)
	}
	return string(b), nil
}

// build returns the path of our gateway, built on first use.
func (b *binaries) build(ctx context.Context) (string, error) {
	if b.ours != "" {
		return filepath.Abs(b.ours)
	}
	out := filepath.Join(b.dir, "dstack-gw")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "./cmd/dstack-gw")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building ours (or give --ours-bin): %w: %s", err, strings.TrimSpace(string(text)))
	}
	b.ours = out
	return out, nil
}

// save writes the outputs that were asked for.
func save(rep *report.Report, jsonOut, mdOut, svgOut string, stdout io.Writer) error {
	if jsonOut != "" {
		b, err := rep.JSON()
		if err != nil {
			return err
		}
		if err := os.WriteFile(jsonOut, b, 0o644); err != nil {
			return fmt.Errorf("saving results: %w", err)
		}
	}
	if mdOut == "" {
		if _, err := io.WriteString(stdout, rep.Markdown()); err != nil {
			return err
		}
	} else if err := os.WriteFile(mdOut, []byte(rep.Markdown()), 0o644); err != nil {
		return fmt.Errorf("saving the report: %w", err)
	}
	if svgOut == "" {
		return nil
	}
	if err := os.MkdirAll(svgOut, 0o755); err != nil {
		return fmt.Errorf("saving charts: %w", err)
	}
	for _, c := range rep.Charts() {
		if err := os.WriteFile(filepath.Join(svgOut, c.Name+".svg"), []byte(c.SVG()), 0o644); err != nil {
			return fmt.Errorf("saving charts: %w", err)
		}
	}
	return nil
}
