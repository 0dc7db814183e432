package soak

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/rig"
	"github.com/dstack-gw/dstack-gw/bench/soak"
)

// TestMain lets this program be started by the harness as its client and app.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "soak-agent" {
		if err := soak.Agent(os.Args[2], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func options(t *testing.T) soak.Options {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("program ip not found: install the Debian package iproute2")
	}
	runtime.LockOSThread() // see rig.Start
	t.Cleanup(runtime.UnlockOSThread)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	gateway := filepath.Join(t.TempDir(), "dstack-gw")
	if out, err := exec.Command("go", "build", "-o", gateway, "../../cmd/dstack-gw").CombinedOutput(); err != nil {
		t.Fatalf("build dstack-gw: %v: %s", err, out)
	}
	log := slog.New(slog.DiscardHandler)
	return soak.Options{Seed: uint64(time.Now().UnixNano()), Gateway: gateway, Exe: exe, Log: log, Host: &rig.Host{Log: log}}
}

func run(t *testing.T, o soak.Options) *soak.Report {
	t.Helper()
	rep, err := soak.Run(context.Background(), o)
	if err != nil {
		t.Fatalf("seed %d: %v", o.Seed, err)
	}
	for _, p := range rep.Problems {
		t.Errorf("seed %d: %s", o.Seed, p)
	}
	t.Log("\n" + rep.Markdown())
	return rep
}

func TestMix(t *testing.T) {
	o := options(t)
	o.Conns, o.TLS, o.Duration = 600, 80, 8*time.Second
	rep := run(t, o)
	for k := soak.Requests; k <= soak.Hasty; k++ {
		if c := rep.Mix.Client.Kinds[k.String()]; c == nil || c.Orderly+c.Cut == 0 {
			t.Errorf("no connection of kind %q came to its end: nothing was tested", k)
		}
	}
	if rep.Mix.After.Metric("dstack_gateway_splice_engaged_total", "") == 0 {
		t.Error("no connection was spliced: half of the relay was not tested")
	}
}

func TestIdleMemory(t *testing.T) {
	o := options(t)
	o.Idle, o.IdleTLS, o.Settle = 200, 100, time.Second
	rep := run(t, o)
	// Far above what it is: the figure itself comes from the bench, here only a blunder should show.
	if f, c := rep.Idle.Forwarded, rep.Idle.Terminated; f.PSS > 40 || c.PSS > 150 {
		t.Errorf("KiB of the gateway's memory an idle connection: %.1f forwarded, %.1f terminated", f.PSS, c.PSS)
	}
}

// Directions that stall in splice(2) must leave descriptors for new connections.
func TestPressure(t *testing.T) {
	o := options(t)
	o.Stalled, o.Settle = 60, time.Second
	rep := run(t, o)
	if rep.Pressure.Client.Served != 60 {
		t.Errorf("%d of 60 small connections were served", rep.Pressure.Client.Served)
	}
	if rep.Pressure.After.Metric("dstack_gateway_splice_engaged_total", "") == 0 {
		t.Error("no connection was spliced: nothing was tested")
	}
}
