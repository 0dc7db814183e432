package suite

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/report"
	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// shown are settings of the gateway's namespace that move the results, besides those the rig sets.
var shown = []string{"net.ipv4.tcp_timestamps", "net.ipv4.tcp_sack", "net.ipv4.tcp_syncookies"}

// environment describes the machine and the run.
func environment(o Options) ([]report.Fact, error) {
	var out []report.Fact
	add := func(name, value string) { out = append(out, report.Fact{Name: name, Value: value}) }
	file := func(name, path string) error {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("describing the machine: %w", err)
		}
		add(name, strings.TrimSpace(string(b)))
		return nil
	}
	add("date", time.Now().UTC().Format(time.RFC3339))
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil, fmt.Errorf("describing the machine: %w", err)
	}
	add("processors", fmt.Sprintf("%d x %s", runtime.NumCPU(), field(string(info), "model name")))
	mem, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, fmt.Errorf("describing the machine: %w", err)
	}
	add("memory", field(string(mem), "MemTotal"))
	for _, f := range []struct{ name, path string }{
		{"kernel", "/proc/version"},
		{"clock", "/sys/devices/system/clocksource/clocksource0/current_clocksource"},
		{"BPF JIT", "/proc/sys/net/core/bpf_jit_enable"},
	} {
		if err := file(f.name, f.path); err != nil {
			return nil, err
		}
	}
	add("harness", runtime.Version())
	add("cell", fmt.Sprintf("warm-up %v, window %v; client, gateway and backend share the processors", o.Warmup, o.Duration))
	r, err := o.Host.New()
	if err != nil {
		return nil, err
	}
	names := slices.Clone(shown)
	for _, s := range rig.Sysctls {
		names = append(names, s.Name)
	}
	slices.Sort(names)
	for _, name := range names {
		v, err := r.Sysctl(rig.Gateway, name)
		if err != nil {
			return nil, errors.Join(err, r.Close())
		}
		for _, s := range rig.Sysctls {
			if s.Name == name && s.Value == v {
				v += " (set by the rig)"
			} else if s.Name == name {
				v += " (the host's; the rig may not choose " + s.Value + ", see net.ipv4.tcp_allowed_congestion_control)"
			}
		}
		add(name, v)
	}
	return out, r.Close()
}

// field returns the first "name : value" of a text.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
