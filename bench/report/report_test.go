package report

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite golden files")

func sample() *Report {
	r := &Report{
		Environment: []Fact{{"kernel", "Linux 6.18 | test"}},
		Rounds:      3,
		Arms:        []Arm{{Name: "l3", Version: "Linux"}, {Name: "haproxy", Version: "HAProxy 2.6", Config: "global\n"}, {Name: "ours", Version: "v0 <dev>", Config: "[core]\n"}},
		Cases: []Case{
			{Name: "pass-bulk-down-1", Group: "passthrough bulk", Title: "bulk to the client", Metrics: []Metric{
				{Key: "gbit", Title: "Gbit/s", Compare: true, Higher: true}, {Key: "cpu", Title: "CPU s/GB", Compare: true}, {Key: "tracked", Title: "conntrack entries"}}},
			{Name: "pass-bulk-down-8", Group: "passthrough bulk", Title: "bulk to the client", Metrics: []Metric{
				{Key: "gbit", Title: "Gbit/s", Compare: true, Higher: true}}},
			{Name: "pass-idle", Group: "idle connections", Title: "memory", Metrics: []Metric{{Key: "memory", Title: "KiB", Compare: true, Signed: true}}},
			{Name: "tls-handshake", Group: "TLS handshakes", Title: "handshakes", Metrics: []Metric{{Key: "process", Title: "process CPU us/connection", Compare: true}}},
		},
	}
	r.Bars = []Bar{
		{Case: "pass-bulk-down-1", Arm: "ours", Metric: "gbit", Base: "l3", Limit: 1},
		{Case: "pass-bulk-down-1", Arm: "ours", Metric: "cpu", Base: "haproxy", Limit: 0.2, AtMost: true},
		{Case: "pass-bulk-down-1", Arm: "ours", Metric: "tracked", Limit: 0, AtMost: true},
		{Case: "pass-idle", Arm: "ours", Metric: "memory", Base: "l3", Above: true, Limit: 1, AtMost: true},
		{Case: "tls-handshake", Arm: "ours", Metric: "process", Base: "haproxy", Limit: 0.72, AtMost: true},
	}
	add := func(name, arm string, round int, m map[string]float64) {
		r.Cells = append(r.Cells, Cell{Case: name, Arm: arm, Round: round, Metrics: m})
	}
	for round := range 3 {
		x := float64(round)
		add("pass-bulk-down-1", "l3", round, map[string]float64{"gbit": 20 + x, "cpu": 0.5, "tracked": 0})
		add("pass-bulk-down-1", "haproxy", round, map[string]float64{"gbit": 6 + x/10, "cpu": 2 + x, "tracked": 0})
		add("pass-bulk-down-1", "ours", round, map[string]float64{"gbit": (20 + x) * 1.1, "cpu": 0.51, "tracked": 0})
		add("pass-bulk-down-8", "l3", round, map[string]float64{"gbit": 21})
		add("pass-idle", "l3", round, map[string]float64{"memory": 7})
		add("pass-idle", "haproxy", round, map[string]float64{"memory": 17.04})
		add("pass-idle", "ours", round, map[string]float64{"memory": -0.3 + x/100})
		add("tls-handshake", "haproxy", round, map[string]float64{"process": 500})
	}
	r.Cells = append(r.Cells,
		Cell{Case: "tls-handshake", Arm: "l3", Lacks: "does not terminate"},
		Cell{Case: "tls-handshake", Arm: "ours", Error: "reset by | peer"},
		Cell{Case: "pass-bulk-down-8", Arm: "haproxy", Noisy: true, Metrics: map[string]float64{"gbit": 5}})
	return r
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (run with -update and look at the diff):\n%s", name, got)
	}
}

func TestMarkdown(t *testing.T) { golden(t, "report.md", sample().Markdown()) }

func TestSVG(t *testing.T) {
	charts := sample().Charts()
	var names []string
	for _, c := range charts {
		names = append(names, c.Name)
		dec := xml.NewDecoder(strings.NewReader(c.SVG()))
		for {
			if _, err := dec.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s is not XML: %v", c.Name, err)
			}
		}
	}
	if got := strings.Join(names, " "); got != "passthrough-bulk-gbit passthrough-bulk-cpu idle-connections-memory tls-handshakes-process" {
		t.Errorf("charts: %s", got)
	}
	if got := strings.Join(charts[0].Cases, " "); got != "pass-bulk-down-1 pass-bulk-down-8" {
		t.Errorf("the cases of a group share a chart: %s", got)
	}
	golden(t, "passthrough-bulk-gbit.svg", charts[0].SVG())
}

func TestJSON(t *testing.T) {
	b, err := sample().JSON()
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if again := back.Markdown(); again != sample().Markdown() {
		t.Error("the report read back renders differently")
	}
}

func TestSet(t *testing.T) {
	r := &Report{Cells: make([]Cell, 1)}
	for k, v := range map[string]float64{"a": 1, "b": math.NaN(), "c": math.Inf(1)} {
		r.Cells[0].Set(k, v)
	}
	if _, err := r.JSON(); err != nil || len(r.Cells[0].Metrics) != 1 {
		t.Errorf("%v, %v", r.Cells[0].Metrics, err)
	}
}

func TestRatio(t *testing.T) {
	r := sample()
	if got := r.Ratio("pass-bulk-down-1", "ours", "l3", "gbit"); got.N != 3 || got.Median < 1.0999 || got.Median > 1.1001 || got.Max-got.Min > 1e-9 {
		t.Errorf("got %+v", got)
	}
	if got := r.Summary("tls-handshake", "ours", "process"); got.N != 0 {
		t.Errorf("a failed cell counts: %+v", got)
	}
	if got := r.Failed(); len(got) != 1 || got[0].Arm != "ours" {
		t.Errorf("failed: %+v", got)
	}
}

func TestJudge(t *testing.T) {
	r := sample()
	// ours / l3 in throughput is 1.1 in all rounds; ours / haproxy in CPU is 0.255, 0.17 and 0.1275.
	gbit := func(limit float64, atMost bool) Bar {
		return Bar{Case: "pass-bulk-down-1", Arm: "ours", Metric: "gbit", Base: "l3", Limit: limit, AtMost: atMost}
	}
	cpu := func(limit float64) Bar {
		return Bar{Case: "pass-bulk-down-1", Arm: "ours", Metric: "cpu", Base: "haproxy", Limit: limit, AtMost: true}
	}
	memory := func(base string, limit float64) Bar {
		return Bar{Case: "pass-idle", Arm: "haproxy", Metric: "memory", Base: base, Above: true, Limit: limit, AtMost: true}
	}
	for _, c := range []struct {
		bar  Bar
		want Verdict
	}{
		{gbit(1, false), Met}, {gbit(1.2, false), Missed}, {gbit(1.2, true), Met}, {gbit(1, true), Missed},
		{cpu(0.3), Met}, {cpu(0.2), MetClose}, {cpu(0.15), MissClose}, {cpu(0.1), Missed},
		{memory("l3", 10.5), Met}, {memory("l3", 10), Missed}, {memory("absent", 100), Unknown},
		{Bar{Case: "pass-bulk-down-1", Arm: "ours", Metric: "tracked", AtMost: true}, Met},
		{Bar{Case: "tls-handshake", Arm: "ours", Metric: "process", Base: "haproxy", Limit: 0.72, AtMost: true}, Unknown},
	} {
		if text, got := r.Judge(c.bar); got != c.want {
			t.Errorf("%+v: %s (%s), want %s", c.bar, got, text, c.want)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.01234: "0.012", 0.9996: "1.00", 1.234: "1.23", 9.996: "10.0", 12.34: "12.3", 99.96: "100", 123.4: "123", 54321: "54321", -0.3: "-0.300", -250.4: "-250",
	} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %s, want %s", v, got, want)
		}
	}
}
