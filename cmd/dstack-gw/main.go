// Command dstack-gw is the gateway daemon and its tools.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/dstack-gw/dstack-gw/controlplane"
	"github.com/dstack-gw/dstack-gw/controlplane/config"
)

// Set by the linker (make build).
var (
	version  = "0.6.0"
	revision = "0000000000000000000000000000000000000000"
)

const usage = `dstack-gw puts HTTPS names in front of confidential VMs.

Usage:
  dstack-gw [-c FILE]                      run the gateway
  dstack-gw config check|print [-c FILE]   check or print the effective configuration
  dstack-gw doctor [-c FILE] [--json]      find out what is wrong on this machine
  dstack-gw explain [-c FILE] [--json] NAME  say what happens to a connection for NAME

Options:
  -c, --config FILE   configuration file (TOML, or JSON with any other suffix)
  -V                  print the version
      --version       print the version and the commit
  -h, --help          print this text
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Exit codes: 0 after a graceful exit, 1 for a start-up error, 2 for bad usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("dstack-gw", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var path string
	var short, long, asJSON bool
	fs.StringVar(&path, "c", "", "")
	fs.StringVar(&path, "config", "", "")
	fs.BoolVar(&short, "V", false, "")
	fs.BoolVar(&long, "version", false, "")
	fs.BoolVar(&asJSON, "json", false, "")
	// Flags may stand before and after the words.
	var words []string
	for rest := args; ; {
		if err := fs.Parse(rest); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				fmt.Fprint(stdout, usage)
				return 0
			}
			fmt.Fprintf(stderr, "dstack-gw: %v\n\n%s", err, usage)
			return 2
		}
		if fs.NArg() == 0 {
			break
		}
		words = append(words, fs.Arg(0))
		rest = fs.Args()[1:]
	}
	bad := func(format string, a ...any) int {
		fmt.Fprintf(stderr, "dstack-gw: "+format+"\n\n%s", append(a, usage)...)
		return 2
	}
	switch {
	case short:
		fmt.Fprintf(stdout, "dstack-gateway %s\n", version)
		return 0
	case long:
		fmt.Fprintf(stdout, "dstack-gateway v%s (git:%.20s)\n", version, revision)
		return 0
	case len(words) == 0:
		return daemon(ctx, path, stderr)
	case words[0] == "config" && len(words) == 2 && (words[1] == "check" || words[1] == "print"):
		return configTool(words[1], path, stdout, stderr)
	case words[0] == "doctor" && len(words) == 1:
		return doctorTool(ctx, path, asJSON, stdout)
	case words[0] == "explain" && len(words) == 2:
		return explainTool(ctx, path, words[1], asJSON, stdout, stderr)
	}
	return bad("unknown command %q", words)
}

func load(path string) (*config.Config, []config.Warning, error) {
	return config.Load(config.LoadOptions{Path: path, Env: os.Getenv, Dir: ".", EtcDir: config.DefaultEtcDir})
}

func configTool(what, path string, stdout, stderr io.Writer) int {
	cfg, warnings, err := load(path)
	if what == "check" {
		ok, werr := config.WriteCheck(stdout, warnings, err)
		if werr != nil {
			fmt.Fprintf(stderr, "dstack-gw: %v\n", werr)
			return 1
		}
		if !ok {
			return 1
		}
		return 0
	}
	if err == nil {
		err = config.Print(stdout, cfg)
	}
	if err != nil {
		fmt.Fprintf(stderr, "dstack-gw: %v\n", err)
		return 1
	}
	return 0
}

func daemon(ctx context.Context, path string, stderr io.Writer) int {
	cfg, warnings, err := load(path)
	if err != nil {
		fmt.Fprintf(stderr, "dstack-gw: configuration: %v\n", err)
		return 1
	}
	log := logger(cfg, stderr)
	for _, w := range warnings {
		log.Warn(w.Text, "key", w.Key, "file", filepath.Base(w.File), "line", w.Line)
	}
	tuneMemory()
	tuneScheduler(min(cfg.Core.Proxy.Workers, runtime.NumCPU()))
	g, err := controlplane.New(ctx, controlplane.Options{Config: cfg, Logger: log, Version: version, Revision: revision, Env: os.Getenv})
	if err != nil {
		fmt.Fprintf(stderr, "dstack-gw: %v\n", err)
		return 1
	}
	if err := g.Run(ctx); err != nil {
		fmt.Fprintf(stderr, "dstack-gw: %v\n", err)
		return 1
	}
	return 0
}

func logger(cfg *config.Config, w io.Writer) *slog.Logger {
	filter, complaints := config.ParseLogFilter(os.Getenv("RUST_LOG"))
	o := &slog.HandlerOptions{Level: config.LevelTrace}
	var h slog.Handler = slog.NewTextHandler(w, o)
	if cfg.Core.Log.Format == config.LogJSON {
		h = slog.NewJSONHandler(w, o)
	}
	l := slog.New(filter.Handler(h))
	for _, c := range complaints {
		l.Warn("RUST_LOG: " + c)
	}
	slog.SetDefault(l)
	return l
}

// tuneScheduler gives each event loop a processor of the Go scheduler beside those of
// the other goroutines. A loop sleeps in epoll_wait, and as long as another processor
// is idle its own is not taken away meanwhile: with GOMAXPROCS equal to the CPUs the
// runtime's monitor thread did that every 20 us and took 11 % of the process's time
// in the connection set-up benchmark; and a loop that wakes up never waits for control
// plane work to be preempted. GOMAXPROCS, where set, decides instead.
func tuneScheduler(loops int) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + loops)
	}
}

// tuneMemory trades memory for fewer collections: handshakes leave much short-lived
// garbage, and the live heap is small. GOGC and GOMEMLIMIT, where set, decide instead.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		if limit := memoryLimit(); limit > 0 {
			debug.SetMemoryLimit(limit / 10 * 7) // beyond it the collector works harder instead of the kernel killing us
		}
	}
}
