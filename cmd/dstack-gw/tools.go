package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/dstack-gw/dstack-gw/controlplane"
	"github.com/dstack-gw/dstack-gw/controlplane/agent"
	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/controlplane/explain"
)

// socket is where the gateway with this configuration can be asked.
func socket(cfg *config.Config) string {
	return filepath.Join(cfg.Core.Sync.DataDir, controlplane.SocketName)
}

func doctorTool(ctx context.Context, path string, asJSON bool, stdout io.Writer) int {
	cfg, warnings, err := load(path)
	address := agent.Address(os.Getenv("DSTACK_AGENT_ADDRESS"), func(p string) bool { _, err := os.Stat(p); return err == nil })
	c := doctor.CLI{Setup: doctor.Setup{Config: cfg, Warnings: warnings, Err: err}, Host: doctor.NewHost(address), Out: stdout, JSON: asJSON, Style: style(stdout)}
	if cfg != nil {
		c.Socket = socket(cfg)
	}
	return doctor.RunCLI(ctx, c)
}

func explainTool(ctx context.Context, path, name string, asJSON bool, stdout, stderr io.Writer) int {
	cfg, _, err := load(path)
	if err != nil {
		fmt.Fprintf(stderr, "dstack-gw: the configuration says where the gateway can be asked, and it does not load: %v\n", err)
		return 2
	}
	return explain.RunCLI(ctx, explain.CLI{Socket: socket(cfg), Input: name, Out: stdout, JSON: asJSON, Style: style(stdout)})
}

// style colours text for a person at a terminal only.
func style(w io.Writer) finding.Style {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return finding.Style{}
	}
	st, err := f.Stat()
	return finding.Style{Color: err == nil && st.Mode()&os.ModeCharDevice != 0}
}
