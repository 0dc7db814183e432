package soak

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/cpu"
)

// Look is the gateway at one moment.
type Look struct {
	At float64 `json:"at_s"` // since the gateway's start
	// Descriptors are those of sockets, pipes (two a pipe) and others.
	Descriptors int `json:"descriptors"`
	Sockets     int `json:"sockets"`
	Pipes       int `json:"pipes"`
	Others      int `json:"others"`
	Threads     int `json:"threads"`

	Goroutines int `json:"goroutines"`
	// Kept are goroutines that wait for the next TLS handshake; the gateway keeps up to 256 a worker.
	Kept int `json:"kept,omitempty"`

	RSS  uint64 `json:"rss_kib"`
	PSS  uint64 `json:"pss_kib"`
	Slab uint64 `json:"slab_kib"` // the whole machine
	// Live is what Go's heap and stacks have in use; with garbage while connections are open.
	Live uint64 `json:"live_kib"`

	// Metrics are those of the gateway that are not 0 by their full names.
	Metrics map[string]float64 `json:"metrics,omitempty"`

	stacks []stack
}

// Metric sums all series of a name whose labels contain with.
func (l *Look) Metric(name, with string) float64 {
	sum := 0.0
	for series, v := range l.Metrics {
		n, labels, _ := strings.Cut(series, "{")
		if n == name && strings.Contains(labels, with) {
			sum += v
		}
	}
	return sum
}

// stack is a group of goroutines that stand at the same place.
type stack struct {
	count int
	text  string
}

// watched are the metrics kept in a Look.
var watched = []string{"dstack_gateway_", "go_goroutines", "go_memstats_heap_alloc_bytes", "go_memstats_stack_inuse_bytes"}

// look reads everything. It needs core.admin.pprof. With collect garbage is collected before, so that Live is right.
func look(ctx context.Context, run arm.Running, began time.Time, collect bool) (Look, error) {
	l := Look{At: time.Since(began).Seconds()}
	fail := func(err error) (Look, error) { return l, fmt.Errorf("looking at the gateway: %w", err) }
	if collect {
		if _, err := run.Control.Get(ctx, "/debug/pprof/heap?gc=1"); err != nil {
			return fail(err)
		}
	}
	proc := filepath.Join("/proc", strconv.Itoa(run.PID))
	dir, err := os.Open(filepath.Join(proc, "fd"))
	if err != nil {
		return fail(err)
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return fail(err)
	}
	for _, n := range names {
		to, err := os.Readlink(filepath.Join(proc, "fd", n))
		if os.IsNotExist(err) {
			continue // closed meanwhile
		}
		switch {
		case err != nil:
			return fail(err)
		case strings.HasPrefix(to, "socket:"):
			l.Sockets++
		case strings.HasPrefix(to, "pipe:"):
			l.Pipes++
		default:
			l.Others++
		}
	}
	l.Descriptors = l.Sockets + l.Pipes + l.Others
	text, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return fail(err)
	}
	if l.Threads, err = field(text, "Threads"); err != nil {
		return fail(err)
	}
	rss, err := field(text, "VmRSS")
	if err != nil {
		return fail(err)
	}
	l.RSS = uint64(rss)
	if text, err = os.ReadFile(filepath.Join(proc, "smaps_rollup")); err != nil {
		return fail(err)
	}
	if l.PSS, err = cpu.ParsePss(text); err != nil {
		return fail(err)
	}
	if text, err = os.ReadFile("/proc/meminfo"); err != nil {
		return fail(err)
	}
	m, err := cpu.ParseMeminfo(text)
	if err != nil {
		return fail(err)
	}
	l.Slab = m.Slab
	if text, err = run.Control.Get(ctx, "/metrics"); err != nil {
		return fail(err)
	}
	if l.Metrics, err = parseMetrics(text); err != nil {
		return fail(err)
	}
	l.Live = uint64(l.Metrics["go_memstats_heap_alloc_bytes"]+l.Metrics["go_memstats_stack_inuse_bytes"]) / 1024
	if text, err = run.Control.Get(ctx, "/debug/pprof/goroutine?debug=1"); err != nil {
		return fail(err)
	}
	l.stacks = parseStacks(text)
	for _, s := range l.stacks {
		l.Goroutines += s.count
		if s.kept() {
			l.Kept += s.count
		}
	}
	if l.Goroutines == 0 {
		return fail(fmt.Errorf("no goroutines in the profile of %d bytes", len(text)))
	}
	return l, nil
}

// field returns the number after "name:" in a file like /proc/PID/status (proc(5)).
func field(text []byte, name string) (int, error) {
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == name {
			return strconv.Atoi(strings.Fields(v + " 0")[0])
		}
	}
	return 0, fmt.Errorf("no line %s", name)
}

// parseMetrics reads the watched series that are not 0 from Prometheus' text format, without histograms.
func parseMetrics(text []byte) (map[string]float64, error) {
	out := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		use := false
		for _, w := range watched {
			use = use || strings.HasPrefix(line, w)
		}
		if !use || strings.Contains(line, "_bucket{") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			return nil, fmt.Errorf("metric %q: %w", line, err)
		}
		if v != 0 {
			out[line[:i]] = v
		}
	}
	if out["go_goroutines"] == 0 {
		return nil, fmt.Errorf("no go_goroutines among the metrics: is this the gateway?")
	}
	return out, nil
}

// parseStacks reads a goroutine profile of debug=1: "N @ addresses" and lines of frames.
func parseStacks(text []byte) []stack {
	var out []stack
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		line := s.Text()
		if n, _, ok := strings.Cut(line, " @ "); ok {
			if count, err := strconv.Atoi(n); err == nil {
				out = append(out, stack{count: count})
				continue
			}
		}
		if f := strings.Fields(line); len(out) > 0 && len(f) > 2 && f[0] == "#" {
			name, _, _ := strings.Cut(f[2], "+")
			out[len(out)-1].text += name + " < "
		}
	}
	return out
}

func (s stack) kept() bool { return strings.Contains(s.text, "terminate.(*Worker).coro") }

// grown describes the places where more goroutines stand than before.
func grown(before, after []stack) []string {
	had := map[string]int{}
	for _, s := range before {
		had[s.text] += s.count
	}
	var out []string
	for _, s := range after {
		if n := s.count - had[s.text]; n > 0 && !s.kept() {
			out = append(out, fmt.Sprintf("%d more in %s", n, s.text[:min(len(s.text), 200)]))
		}
	}
	return out
}
