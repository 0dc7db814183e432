package suite

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/agent"
	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/cpu"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// TestMain lets this program be started by the harness under test as its agents and as a gateway.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 {
		var err error
		switch os.Args[1] {
		case "agent":
			err = agent.Main(context.Background(), os.Args[2], os.Stdin, os.Stdout)
		case "-c":
			err = runFakeGateway(os.Args[2])
		default:
			os.Exit(m.Run())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Println("fake gateway")
		return
	}
	os.Exit(m.Run())
}

func TestCases(t *testing.T) {
	all := Cases(Sizes{Idle: 10})
	seen := map[string]bool{}
	quickKinds := map[string]bool{}
	for _, c := range all {
		if seen[c.Name] {
			t.Errorf("two cases %s", c.Name)
		}
		seen[c.Name] = true
		d := c.Describe()
		if d.Title == "" || d.Group == "" || len(d.Metrics) == 0 {
			t.Errorf("%s: %+v", c.Name, d)
		}
		compared := 0
		for _, m := range d.Metrics {
			if m.Compare {
				compared++
			}
		}
		if compared == 0 {
			t.Errorf("%s: nothing is compared", c.Name)
		}
		if (c.Mode == arm.Terminate) != (c.Spec.TLS != nil) {
			t.Errorf("%s: mode %s, TLS %v", c.Name, c.Mode, c.Spec.TLS)
		}
		if c.Quick {
			quickKinds[fmt.Sprint(c.Mode, c.Spec.Kind)] = true
		}
	}
	// The quick run exercises every kind of load in every mode.
	for _, c := range all {
		if !quickKinds[fmt.Sprint(c.Mode, c.Spec.Kind)] {
			t.Errorf("no quick case like %s", c.Name)
		}
	}
}

func TestSelect(t *testing.T) {
	all := Cases(Sizes{Idle: 10})
	for pattern, want := range map[string]int{
		"": len(all), "all": len(all), "pass-requests-*": 3, "pass-requests-*,pass-idle": 4, "pass-idle,pass-idle": 1, "*-requests-32": 3,
	} {
		if got, err := Select(all, pattern); err != nil || len(got) != want {
			t.Errorf("%q: %d cases, %v, want %d", pattern, len(got), err, want)
		}
	}
	for _, pattern := range []string{"nonsense", "pass-idle,nonsense", "["} {
		if _, err := Select(all, pattern); err == nil {
			t.Errorf("%q accepted", pattern)
		}
	}
}

// Every metric that a case announces must come out of its windows, or be set by the run itself.
func TestValues(t *testing.T) {
	elsewhere := map[string]bool{"tracked": true, "registrations": true, "registration_p99": true}
	u := cpu.Usage{Wall: 2, Machine: 3.2, Foreign: 0.2, GatewayUser: 0.5, GatewaySystem: 1, CPUs: 2}
	w := load.Window{Usage: u, Count: 4000, Bytes: 5e9, P50: 30, P99: 90, Max: 100, Memory: 12, Slab: 5, RSS: 6}
	first := w
	first.P50, first.P99 = 20, 45
	for _, c := range Cases(Sizes{Idle: 10}) {
		got := c.values([]load.Window{first, w})
		for _, m := range c.metrics() {
			if _, ok := got[m.Key]; !ok && !elsewhere[m.Key] {
				t.Errorf("%s: no %s", c.Name, m.Key)
			}
		}
		want := map[string]float64{}
		switch {
		case c.Spec.Kind == load.Bulk:
			want = map[string]float64{"gbit": 20, "cpu": 0.6, "process": 0.3}
		case c.Spec.Kind == load.Idle:
			want = map[string]float64{"memory": 12, "slab": 5, "rss": 6, "accounted": 11, "busy": 75}
		case c.Spec.Kind == load.Reachable:
			want = map[string]float64{"p50": 30, "max": 100}
		case c.Churn:
			want = map[string]float64{"p50": 30, "p99": 90, "quiet_p50": 20, "quiet_p99": 45, "p99_ratio": 2, "process_share": 0.75}
		default:
			want = map[string]float64{"rate": 2000, "p50": 30, "p99": 90, "cpu": 750, "process": 375}
		}
		for k, v := range want {
			if d := got[k] - v; d > 1e-9 || d < -1e-9 {
				t.Errorf("%s: %s = %v, want %v", c.Name, k, got[k], v)
			}
		}
	}
}

// Every case has a goal for both paths, and every goal names a metric of its case.
func TestBars(t *testing.T) {
	all := Cases(Sizes{Idle: 10})
	arms := []arm.Arm{arm.L3{}, arm.HAProxy{}, arm.HAProxy{Splice: true}, arm.Nginx{}, arm.Dstack{Label: "ours"}, arm.Dstack{Label: "ours-express"}}
	got := bars(all, arms)
	for _, c := range all {
		metrics := map[string]bool{}
		for _, m := range c.metrics() {
			metrics[m.Key] = true
		}
		count := map[string]int{}
		for _, b := range got {
			if b.Case != c.Name {
				continue
			}
			count[b.Arm]++
			if !metrics[b.Metric] {
				t.Errorf("%s: goal for %s, which the case does not have", c.Name, b.Metric)
			}
		}
		if !c.Spec.HalfClose && (count["ours"] == 0 || count["ours-express"] == 0) {
			t.Errorf("%s: goals %v", c.Name, count)
		}
	}
	for _, b := range bars(all, []arm.Arm{arm.Dstack{Label: "ours"}}) {
		if b.Base != "" {
			t.Errorf("goal against an arm that does not take part: %+v", b)
		}
	}
	if got := bars(all, []arm.Arm{arm.L3{}, arm.HAProxy{}}); len(got) != 0 {
		t.Errorf("goals for peers: %+v", got)
	}
}

func options(t *testing.T, arms ...arm.Arm) Options {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	runtime.LockOSThread() // see rig.Start
	t.Cleanup(runtime.UnlockOSThread)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Arms: arms, Rounds: 1, Warmup: 10 * time.Millisecond, Duration: 80 * time.Millisecond,
		Churn: Churn{Instances: 20, Rate: 200, Probes: 3}, Exe: exe,
		Log: slog.New(slog.DiscardHandler), Host: &rig.Host{Log: slog.New(slog.DiscardHandler)},
	}
}

// A whole run over a gateway with registrations and TLS, and over plain forwarding.
func TestRun(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o := options(t, arm.L3{}, arm.Dstack{Label: "fake", Binary: exe})
	if o.Cases, err = Select(Cases(Sizes{Idle: 20}),
		"pass-bulk-duplex-8,pass-requests-32,pass-setup-pq-16,pass-idle,tls-bulk-down-1,tls-handshake-mlkem-4,churn-*"); err != nil {
		t.Fatal(err)
	}
	rep, err := Run(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Cells) != 2*len(o.Cases) || rep.Interrupted {
		t.Errorf("%d cells", len(rep.Cells))
	}
	for _, c := range rep.Failed() {
		t.Errorf("%s on %s: %s", c.Case, c.Arm, c.Error)
	}
	for _, cell := range rep.Cells {
		if cell.Lacks != "" {
			if cell.Arm != "l3" {
				t.Errorf("%s on %s: %s", cell.Case, cell.Arm, cell.Lacks)
			}
			continue
		}
		for _, c := range o.Cases {
			if c.Name != cell.Case {
				continue
			}
			for _, m := range c.metrics() {
				if _, ok := cell.Metrics[m.Key]; !ok {
					t.Errorf("%s on %s: no %s", cell.Case, cell.Arm, m.Key)
				}
			}
		}
		if cell.Arm == "fake" && cell.Facts["accel splice mode"] != "fake" {
			t.Errorf("%s: facts %v", cell.Case, cell.Facts)
		}
	}
	if md := rep.Markdown(); !strings.Contains(md, "fake gateway") || !strings.Contains(md, "Linux") {
		t.Errorf("report without contestants or machine:\n%s", md)
	}
}

// again is plain forwarding under another name.
type again struct{ arm.L3 }

func (again) Name() string { return "again" }

// Arms take turns, and the one that begins changes from round to round.
func TestOrder(t *testing.T) {
	o := options(t, arm.L3{}, again{})
	o.Rounds = 2
	var err error
	if o.Cases, err = Select(Cases(Sizes{Idle: 20}), "pass-requests-1"); err != nil {
		t.Fatal(err)
	}
	rep, err := Run(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, c := range rep.Cells {
		order = append(order, fmt.Sprint(c.Round, " ", c.Arm))
	}
	if got := strings.Join(order, ", "); got != "0 l3, 0 again, 1 again, 1 l3" {
		t.Errorf("order: %s", got)
	}
}

// broken is forwarding to the wrong port: the client's connections are refused.
type broken struct{ arm.L3 }

func (broken) Name() string { return "broken" }

func (broken) Start(ctx context.Context, r *rig.Rig, c arm.Certificate) (arm.Running, error) {
	run, err := arm.L3{}.Start(ctx, r, c)
	entry := run.Entry
	run.Entry = func(m arm.Mode, s arm.Service) netip.AddrPort {
		a := entry(m, s)
		return netip.AddrPortFrom(a.Addr(), a.Port()+1000)
	}
	return run, err
}

func TestFailingArm(t *testing.T) {
	o := options(t, broken{}, arm.L3{})
	var err error
	if o.Cases, err = Select(Cases(Sizes{Idle: 20}), "pass-requests-1"); err != nil {
		t.Fatal(err)
	}
	rep, err := Run(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	failed := rep.Failed()
	if len(failed) != 1 || failed[0].Arm != "broken" || !strings.Contains(failed[0].Error, "refused") {
		t.Errorf("failed: %+v", failed)
	}
	if len(rep.Cells) != 2 {
		t.Errorf("one broken arm must not stop the others: %d cells", len(rep.Cells))
	}
}

func TestInterruptedRun(t *testing.T) {
	o := options(t, arm.L3{})
	o.Rounds = 1000
	o.Cases = Cases(Sizes{Idle: 20})[:1]
	ctx, cancel := context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer cancel()
	rep, err := Run(ctx, o)
	if err == nil || rep == nil || !rep.Interrupted {
		t.Fatalf("report %v, %v", rep, err)
	}
	for _, c := range rep.Cells {
		if c.Error != "" {
			t.Errorf("the interrupted cell was reported as failed: %s", c.Error)
		}
	}
}

func TestField(t *testing.T) {
	const text = "processor\t: 0\nmodel name\t: AMD EPYC\nmodel name\t: other\n"
	if got := field(text, "model name"); got != "AMD EPYC" {
		t.Errorf("got %q", got)
	}
	if got := field(text, "flags"); got != "unknown" {
		t.Errorf("got %q", got)
	}
}
