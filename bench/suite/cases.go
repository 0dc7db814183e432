package suite

import (
	"fmt"
	"path"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/report"
	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// Case is one thing to measure.
type Case struct {
	Name    string
	Group   string
	Title   string
	Mode    arm.Mode
	Service arm.Service
	Spec    load.Spec // without address, name, times and processes
	Churn   bool      // registrations go on meanwhile
	Quick   bool      // part of the quick run
}

func (c Case) need() arm.Need {
	return arm.Need{
		Mode:        c.Mode,
		PostQuantum: c.Spec.TLS != nil && c.Spec.TLS.Group == mlkem,
		HalfClose:   c.Spec.HalfClose,
		Control:     c.Churn,
	}
}

const (
	x25519 = "X25519"
	mlkem  = "X25519MLKEM768"
)

// Sizes of the cases that have one.
type Sizes struct {
	Idle int // idle connections
}

// Cases returns all cases in the order of the report.
func Cases(s Sizes) []Case {
	var out []Case
	for _, mode := range []arm.Mode{arm.Passthrough, arm.Terminate} {
		short, title := "pass", "passthrough"
		var client *load.TLS
		if mode == arm.Terminate {
			short, title = "tls", "TLS terminated"
			client = &load.TLS{Group: x25519}
		}
		for _, d := range []struct {
			name, title string
			dir         wire.Direction
		}{{"down", "to the client", wire.Down}, {"up", "to the app", wire.Up}, {"duplex", "both ways at once", wire.Duplex}} {
			for _, n := range []int{1, 8} {
				out = append(out, Case{
					Name: fmt.Sprintf("%s-bulk-%s-%d", short, d.name, n), Group: title + " bulk",
					Title: fmt.Sprintf("%s, bulk %s, %d connections", title, d.title, n),
					Mode:  mode, Service: arm.Bulk,
					Spec:  load.Spec{Kind: load.Bulk, Conns: n, Direction: d.dir, TLS: client},
					Quick: n == 8 && d.dir == wire.Duplex || n == 1 && d.dir == wire.Down && mode == arm.Passthrough,
				})
			}
		}
		out = append(out, Case{
			Name: short + "-halfclose-8", Group: title + " half-close",
			Title: fmt.Sprintf("%s, bulk both ways, each end closes its sending side when it is done, 8 connections, SHA-256", title),
			Mode:  mode, Service: arm.Bulk,
			Spec:  load.Spec{Kind: load.Bulk, Conns: 8, Direction: wire.Duplex, HalfClose: true, TLS: client},
			Quick: true,
		})
		for _, n := range []int{1, 32, 512} {
			out = append(out, Case{
				Name: fmt.Sprintf("%s-requests-%d", short, n), Group: title + " requests",
				Title: fmt.Sprintf("%s, 64 B request and response, %d connections", title, n),
				Mode:  mode, Service: arm.Requests,
				Spec:  load.Spec{Kind: load.Requests, Conns: n, TLS: client},
				Quick: n == 32,
			})
		}
		if mode == arm.Passthrough {
			for _, pq := range []bool{false, true} {
				name, hello := "setup", "hello in one segment"
				if pq {
					name, hello = "setup-pq", "post-quantum hello in two segments"
				}
				for _, n := range []int{1, 16} {
					out = append(out, Case{
						Name: fmt.Sprintf("pass-%s-%d", name, n), Group: "passthrough set-up",
						Title: fmt.Sprintf("connect, %s, one request, close; %d at once", hello, n),
						Mode:  mode, Service: arm.Requests,
						Spec:  load.Spec{Kind: load.Setup, Conns: n, PostQuantum: pq},
						Quick: n == 16,
					})
				}
			}
			out = append(out, Case{
				Name: "pass-idle", Group: "idle connections",
				Title: fmt.Sprintf("memory of %d idle passthrough connections", s.Idle),
				Mode:  mode, Service: arm.Requests,
				Spec:  load.Spec{Kind: load.Idle, Conns: s.Idle},
				Quick: true,
			})
			continue
		}
		for _, t := range []struct {
			name, title string
			tls         load.TLS
		}{
			{"x25519", "full TLS 1.3 handshake, ECDSA P-256, X25519", load.TLS{Group: x25519}},
			{"mlkem", "full TLS 1.3 handshake, ECDSA P-256, X25519MLKEM768", load.TLS{Group: mlkem}},
			{"resumed", "resumed TLS 1.3 handshake, X25519", load.TLS{Group: x25519, Resume: true}},
		} {
			for _, n := range []int{4, 32} {
				out = append(out, Case{
					Name: fmt.Sprintf("tls-handshake-%s-%d", t.name, n), Group: "TLS handshakes",
					Title: fmt.Sprintf("%s, one request, close; %d at once", t.title, n),
					Mode:  mode, Service: arm.Requests,
					Spec:  load.Spec{Kind: load.Setup, Conns: n, TLS: &t.tls},
					Quick: n == 4,
				})
			}
		}
	}
	return append(out, Case{
		Name: "churn-requests-32", Group: "registration churn",
		Title: "passthrough requests on 32 connections, without and with registrations going on",
		Mode:  arm.Passthrough, Service: arm.Requests, Churn: true, Quick: true,
		Spec: load.Spec{Kind: load.Requests, Conns: 32, Windows: []string{quiet, churning}},
	}, Case{
		Name: "churn-visible", Group: "registration churn",
		Title: "from a registration's answer to the first reply under its name, while registrations go on",
		Mode:  arm.Passthrough, Service: arm.Requests, Churn: true, Quick: true,
		Spec: load.Spec{Kind: load.Reachable, Conns: 1},
	})
}

// Select returns the cases that match one of the comma-separated patterns (path.Match); "" and "all" mean all.
func Select(all []Case, patterns string) ([]Case, error) {
	if patterns == "" || patterns == "all" {
		return all, nil
	}
	keep := map[string]bool{}
	for _, p := range strings.Split(patterns, ",") {
		found := false
		for _, c := range all {
			ok, err := path.Match(p, c.Name)
			if err != nil {
				return nil, fmt.Errorf("pattern of cases %q: %w", p, err)
			}
			if ok {
				keep[c.Name], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("no case matches %q: run `bench list`", p)
		}
	}
	var out []Case
	for _, c := range all {
		if keep[c.Name] {
			out = append(out, c)
		}
	}
	return out, nil
}

// Names of the two windows of a churn case.
const (
	quiet    = "quiet"
	churning = "churn"
)

// Describe returns what the report says about a case.
func (c Case) Describe() report.Case {
	return report.Case{Name: c.Name, Group: c.Group, Title: c.Title, Metrics: c.metrics()}
}

func (c Case) metrics() []report.Metric {
	cpu := func(per string) []report.Metric {
		machine := report.Metric{Key: "cpu", Title: "CPU " + per, Compare: true}
		process := report.Metric{Key: "process", Title: "process CPU " + per, Compare: c.Mode == arm.Terminate}
		return []report.Metric{machine, process, {Key: "tracked", Title: "conntrack entries"}}
	}
	latency := []report.Metric{
		{Key: "p50", Title: "p50 us", Compare: true},
		{Key: "p99", Title: "p99 us", Compare: true},
	}
	switch {
	case c.Spec.Kind == load.Bulk:
		return append([]report.Metric{{Key: "gbit", Title: "Gbit/s", Compare: true, Higher: true}}, cpu("s/GB")...)
	case c.Spec.Kind == load.Idle:
		return []report.Metric{
			// Slab and process are exact; the whole machine's growth also shows what neither contains, but only on a
			// machine that nobody else uses.
			{Key: "accounted", Title: "slab and process KiB/connection", Compare: true, Signed: true},
			{Key: "slab", Title: "of it kernel slab", Signed: true},
			{Key: "rss", Title: "of it gateway process", Signed: true},
			{Key: "memory", Title: "whole machine KiB/connection", Compare: true, Signed: true},
			{Key: "busy", Title: "CPU while idle %"},
			{Key: "tracked", Title: "conntrack entries"},
		}
	case c.Spec.Kind == load.Reachable:
		return []report.Metric{
			{Key: "p50", Title: "p50 us", Compare: true},
			{Key: "max", Title: "worst us"},
			{Key: "registrations", Title: "registrations/s"},
			{Key: "registration_p99", Title: "registration p99 us"},
		}
	case c.Churn:
		return []report.Metric{
			{Key: "quiet_p50", Title: "p50 us, quiet"},
			{Key: "p50", Title: "p50 us, churn"},
			{Key: "quiet_p99", Title: "p99 us, quiet"},
			{Key: "p99", Title: "p99 us, churn"},
			{Key: "p99_ratio", Title: "p99 churn/quiet", Compare: true},
			{Key: "registrations", Title: "registrations/s"},
			{Key: "registration_p99", Title: "registration p99 us"},
			{Key: "process_share", Title: "gateway CPU, churn, cores"},
		}
	case c.Spec.Kind == load.Requests:
		m := append([]report.Metric{{Key: "rate", Title: "requests/s", Compare: true, Higher: true}}, latency...)
		return append(m, cpu("us/request")...)
	default:
		m := append([]report.Metric{{Key: "rate", Title: "connections/s", Compare: true, Higher: true}}, latency...)
		return append(m, cpu("us/connection")...)
	}
}

// values translates windows into the metrics of the case.
func (c Case) values(w []load.Window) map[string]float64 {
	last := w[len(w)-1]
	u := last.Usage
	out := map[string]float64{}
	per := func(n float64) {
		out["cpu"] = u.Bench() / n
		out["process"] = u.Gateway() / n
	}
	switch {
	case c.Spec.Kind == load.Bulk:
		gb := float64(last.Bytes) / 1e9
		out["gbit"] = gb * 8 / u.Wall
		per(gb)
	case c.Spec.Kind == load.Idle:
		out["memory"], out["slab"], out["rss"] = last.Memory, last.Slab, last.RSS
		out["accounted"] = last.Slab + last.RSS
		out["busy"] = 100 * u.Bench() / (u.Wall * float64(u.CPUs))
	case c.Spec.Kind == load.Reachable:
		out["p50"], out["max"] = last.P50, last.Max
	case c.Churn:
		out["quiet_p50"], out["quiet_p99"] = w[0].P50, w[0].P99
		out["p50"], out["p99"] = last.P50, last.P99
		out["p99_ratio"] = last.P99 / w[0].P99
		out["process_share"] = u.Gateway() / u.Wall
	default:
		out["rate"] = float64(last.Count) / u.Wall
		out["p50"], out["p99"] = last.P50, last.P99
		per(float64(last.Count) / 1e6)
	}
	return out
}
