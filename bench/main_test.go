package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/bench/report"
)

func TestCommand(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		out  string // part of standard output
		err  string // part of standard error
	}{
		{nil, 2, "", "usage:"},
		{[]string{"help"}, 2, "", "usage:"},
		{[]string{"agent"}, 2, "", "usage:"},
		{[]string{"agent", "spy"}, 1, "", `unknown agent "spy"`},
		{[]string{"list"}, 0, "pass-setup-pq-16", ""},
		{[]string{"run", "-h"}, 2, "", "-patience"},
		{[]string{"run", "--cases", "nonsense"}, 1, "", `no case matches "nonsense"`},
		{[]string{"run", "extra"}, 1, "", `unexpected argument "extra"`},
		{[]string{"soak", "-h"}, 2, "", "-stalled"},
		{[]string{"soak", "extra"}, 1, "", `unexpected argument "extra"`},
		{[]string{"soak", "--conns", "5", "--tls", "6"}, 1, "", "--tls 6 is more"},
		{[]string{"run", "--arms", "envoy"}, 1, "", `no arm "envoy"`},
		{[]string{"run", "--arms", "upstream"}, 1, "", "--upstream-bin"},
		{[]string{"run", "--arms", "ours", "--ours-bin", "/nonexistent/dstack-gw"}, 1, "", "/nonexistent/dstack-gw"},
	} {
		var out, errs bytes.Buffer
		code := command(c.args, strings.NewReader(""), &out, &errs)
		if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errs.String(), c.err) {
			t.Errorf("%q: %d\n%s\n%s", c.args, code, out.String(), errs.String())
		}
	}
}

func TestArms(t *testing.T) {
	extra := filepath.Join(t.TempDir(), "relay.toml")
	if err := os.WriteFile(extra, []byte("[core.proxy.tcp_splice]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := binaries{ours: "/bin/sh", upstream: "/bin/sh", log: slog.New(slog.DiscardHandler)}
	got, err := b.arms(context.Background(), "l3,ours,ours-relay="+extra+",upstream")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, a := range got {
		names = append(names, a.Name())
	}
	if s := strings.Join(names, " "); s != "l3 ours ours-relay upstream" {
		t.Errorf("arms: %s", s)
	}
	if strings.Contains(got[1].Config(), "tcp_splice") || !strings.Contains(got[2].Config(), "tcp_splice") {
		t.Error("the file belongs to ours-relay only")
	}
	if _, err := b.arms(context.Background(), "ours="+extra+".absent"); err == nil {
		t.Error("missing file accepted")
	}
}

func TestSave(t *testing.T) {
	dir := t.TempDir()
	rep := &report.Report{
		Arms:  []report.Arm{{Name: "l3"}},
		Cases: []report.Case{{Name: "c", Group: "g", Metrics: []report.Metric{{Key: "m", Title: "M", Compare: true}}}},
		Cells: []report.Cell{{Case: "c", Arm: "l3", Metrics: map[string]float64{"m": 1}}, {Case: "c", Arm: "l3", Error: "boom"}},
	}
	var out bytes.Buffer
	if err := save(rep, filepath.Join(dir, "r.json"), "", filepath.Join(dir, "svg"), &out); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "# Bench results") {
		t.Errorf("without a file the report goes to standard output: %q", out.String())
	}
	for _, name := range []string{"r.json", "svg/g-m.svg"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || len(b) == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := failures(rep); err == nil || !strings.Contains(err.Error(), "c on l3: boom") {
		t.Errorf("failures: %v", err)
	}
	if err := failures(&report.Report{}); err != nil {
		t.Error(err)
	}
}
