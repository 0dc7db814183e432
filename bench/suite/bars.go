package suite

import (
	"slices"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/report"
)

// level is what counts as level with another gateway: differences of a few per cent are not established on machines
// that client, gateway and backend share.
const level = 0.05

// bars returns the goals of our gateway for the cases and arms of a run. An arm named ours-express... is held to those
// of the express path (as cheap as forwarding), every other one named ours... to those of the relay (level with
// HAProxy's splicing); terminated TLS and churn have one set.
func bars(cases []Case, arms []arm.Arm) []report.Bar {
	present := func(name string) bool {
		return slices.ContainsFunc(arms, func(a arm.Arm) bool { return a.Name() == name })
	}
	var out []report.Bar
	for _, a := range arms {
		if !strings.HasPrefix(a.Name(), "ours") {
			continue
		}
		express := strings.HasPrefix(a.Name(), "ours-express")
		for _, c := range cases {
			for _, b := range c.bars(express) {
				b.Case, b.Arm = c.Name, a.Name()
				if b.Base == "" || present(b.Base) {
					out = append(out, b)
				}
			}
		}
	}
	return out
}

func (c Case) bars(express bool) []report.Bar {
	atMost := func(metric, base string, limit float64) report.Bar {
		return report.Bar{Metric: metric, Base: base, Limit: limit, AtMost: true}
	}
	atLeast := func(metric, base string, limit float64) report.Bar {
		return report.Bar{Metric: metric, Base: base, Limit: limit}
	}
	above := func(metric, base string, limit float64) report.Bar {
		return report.Bar{Metric: metric, Base: base, Above: true, Limit: limit, AtMost: true}
	}
	untracked := report.Bar{Metric: "tracked", AtMost: true}
	kind, terminate := c.Spec.Kind, c.Mode == arm.Terminate
	switch {
	case c.Spec.HalfClose:
		return nil // it passes or fails
	case kind == load.Reachable:
		return []report.Bar{{Metric: "max", Limit: 100_000, AtMost: true}}
	case c.Churn:
		return []report.Bar{
			{Metric: "p99_ratio", Limit: 1 + 2*level, AtMost: true},
			{Metric: "registrations", Limit: 950},
		}
	case terminate && kind == load.Bulk:
		return []report.Bar{atMost("process", "haproxy", 1+level), atLeast("gbit", "haproxy", 1-level)}
	case terminate && kind == load.Requests:
		return []report.Bar{atLeast("rate", "haproxy", 1-level), atMost("process", "haproxy", 1+level)}
	case terminate:
		return []report.Bar{atMost("process", "haproxy", 0.72), atMost("process", "upstream", 1)}
	case kind == load.Bulk && express:
		return []report.Bar{atLeast("gbit", "l3", 1-level), atMost("cpu", "l3", 1.05), atLeast("gbit", "haproxy", 1.5), untracked}
	case kind == load.Bulk:
		return []report.Bar{atMost("cpu", "haproxy-splice", 1+level), untracked}
	case kind == load.Requests && express:
		out := []report.Bar{atMost("p50", "l3", 1.05), atMost("p99", "l3", 1.05), atMost("cpu", "l3", 1.05), untracked}
		if c.Spec.Conns == 32 {
			out = append(out, atLeast("rate", "haproxy", 1.5))
		}
		return out
	case kind == load.Requests:
		return []report.Bar{atLeast("rate", "haproxy-splice", 1-level), untracked}
	case kind == load.Setup && express:
		return []report.Bar{above("cpu", "l3", 20), untracked}
	case kind == load.Setup:
		return []report.Bar{atMost("cpu", "haproxy-splice", 1+level), atLeast("rate", "haproxy-splice", 1-level), untracked}
	case kind == load.Idle && express:
		return []report.Bar{above("accounted", "l3", 1), untracked}
	case kind == load.Idle:
		return []report.Bar{above("accounted", "l3", 12), untracked}
	}
	return nil
}
