package soak

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/cpu"
)

// Report is a whole run.
type Report struct {
	Version string   `json:"version"` // of the gateway
	Kernel  string   `json:"kernel"`
	CPUs    int      `json:"cpus"`
	Load    []string `json:"load"` // /proc/loadavg before the first part and after each
	Options Options  `json:"-"`

	Idle     *Idle     `json:"idle,omitempty"`
	Mix      *Mix      `json:"mix,omitempty"`
	Pressure *Pressure `json:"pressure,omitempty"`

	// Problems is empty if all is well.
	Problems []string `json:"problems"`
}

// Mix is what the main part saw.
type Mix struct {
	Client Outcome   `json:"client"`
	App    Side      `json:"app"`
	Before Look      `json:"before"`
	During []Look    `json:"during"`
	After  Look      `json:"after"`
	Usage  cpu.Usage `json:"usage"`
	// ListenDrops are connections that the kernel dropped before the gateway accepted them.
	ListenDrops uint64 `json:"listen_drops"`
	Output      string `json:"output"` // the end of the gateway's log
}

// Idle is what idle connections cost.
type Idle struct {
	Ends       *IdleCost `json:"ends,omitempty"` // without a gateway: the client's and the app's sockets
	Forwarded  *IdleCost `json:"forwarded,omitempty"`
	Terminated *IdleCost `json:"terminated,omitempty"`
}

// IdleCost is in KiB a connection.
type IdleCost struct {
	Conns   int     `json:"conns"`
	PSS     float64 `json:"pss_kib"`     // the gateway's process
	Live    float64 `json:"live_kib"`    // of it in use after a garbage collection
	Slab    float64 `json:"slab_kib"`    // the kernel's objects, of both ends too
	Machine float64 `json:"machine_kib"` // the whole machine without others, the harness's processes included
	Foreign float64 `json:"foreign_kib"` // how others' memory changed meanwhile: what they do to Slab is unknown
	// Descriptors and Goroutines of the gateway while all were open.
	Descriptors int `json:"descriptors,omitempty"`
	Goroutines  int `json:"goroutines,omitempty"`
}

// relayed returns what the gateway and its sockets cost a connection in KiB: process and kernel.
func (i *Idle) relayed(c *IdleCost) (process, kernel float64) { return c.PSS, c.Slab - i.Ends.Slab }

// Pressure is what the part with few descriptors saw.
type Pressure struct {
	Limit   int     `json:"limit"` // descriptors
	Stalled int     `json:"stalled"`
	Small   int     `json:"small"`
	Client  Outcome `json:"client"`
	App     Side    `json:"app"`
	Before  Look    `json:"before"`
	During  Look    `json:"during"` // while all stall, before the small ones
	Tried   Look    `json:"tried"`  // with the small ones
	After   Look    `json:"after"`
	// Blind says when the gateway had no descriptor for its admin interface.
	Blind  []string `json:"blind,omitempty"`
	Output string   `json:"output"`
}

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // only types of this package, which have no such values
	}
	return b
}

// JSON returns the report for programs.
func (r *Report) JSON() ([]byte, error) { return json.MarshalIndent(r, "", "  ") }

// Markdown returns the report for people.
func (r *Report) Markdown() string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p("# Soak\n")
	p("%s; Linux %s, %d processors shared by client, gateway and app; load averages before and after each part: %s.\n", r.Version, r.Kernel, r.CPUs, strings.Join(r.Load, " / "))
	if len(r.Problems) == 0 {
		p("**Nothing wrong.**\n")
	} else {
		p("**%d problem(s):**\n", len(r.Problems))
		for _, x := range r.Problems {
			p("- %s", x)
		}
		p("")
	}
	if i := r.Idle; i != nil {
		p("## Memory of an idle relayed connection\n")
		p("| KiB a connection | connections | gateway process (PSS) | of it in use (heap, stacks) | kernel objects (slab), without both ends | PSS and slab | machine, all in all | others meanwhile |")
		p("|---|---|---|---|---|---|---|---|")
		for _, x := range []struct {
			name string
			c    *IdleCost
		}{{"forwarded", i.Forwarded}, {"terminated", i.Terminated}} {
			if x.c != nil {
				process, kernel := i.relayed(x.c)
				p("| %s | %d | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f |", x.name, x.c.Conns, process, x.c.Live, kernel, process+kernel, x.c.Machine, x.c.Foreign)
			}
		}
		p("\nThe sockets of client and app cost %.1f KiB of slab a connection, measured without a gateway and taken off.\n", i.Ends.Slab)
	}
	if m := r.Mix; m != nil {
		m.markdown(&r.Options, p)
	}
	if x := r.Pressure; x != nil {
		p("## Descriptors under pressure\n")
		p("%d descriptors allowed; %d connections stalled in both directions, then %d small ones one after the other: %d served, %d not.\n", x.Limit, x.Stalled, x.Small, x.Client.Served, x.Client.Refused)
		p("| | before | stalled | with small ones | after |")
		p("|---|---|---|---|---|")
		looks(p, []Look{x.Before, x.During, x.Tried, x.After})
	}
	return b.String()
}

func (m *Mix) markdown(o *Options, p func(string, ...any)) {
	p("## Mix\n")
	p("%d connections, %d of them terminated, kept open for %v; %.0f open on average, %d at least. Processor seconds a second: gateway %.2f, client %.2f, app %.2f, others %.2f.\n",
		o.Conns, o.TLS, o.Duration, m.Client.OpenMean, m.Client.OpenMin,
		m.Usage.Gateway()/m.Usage.Wall, m.Usage.Client/m.Usage.Wall, m.Usage.Backend/m.Usage.Wall, m.Usage.Foreign/m.Usage.Wall)
	p("TLS handshakes: %d full, %d resumed. connect(2) took %.1f ms on average and %.0f ms at most, with the client's own delays; the kernel dropped %d connections because they were not accepted in time.\n",
		m.Client.Full, m.Client.Resumed, m.Client.ConnectMean, m.Client.ConnectMost, m.ListenDrops)
	p("| kind | begun | ended in order, SHA-256 equal | cut as planned, prefixes right | MiB to the app | MiB to the client |")
	p("|---|---|---|---|---|---|")
	var sum Tally
	for _, k := range slices.Sorted(maps.Keys(m.Client.Kinds)) {
		c := m.Client.Kinds[k]
		a := m.App.Kinds[k]
		if a == nil {
			a = &Tally{}
		}
		p("| %s | %d | %d | %d | %.1f | %.1f |", k, c.Begun, c.Orderly, c.Cut, float64(a.Received)/(1<<20), float64(c.Received)/(1<<20))
		sum.Begun, sum.Orderly, sum.Cut = sum.Begun+c.Begun, sum.Orderly+c.Orderly, sum.Cut+c.Cut
		sum.Sent, sum.Received = sum.Sent+a.Received, sum.Received+c.Received
	}
	p("| all | %d | %d | %d | %.1f | %.1f |\n", sum.Begun, sum.Orderly, sum.Cut, float64(sum.Sent)/(1<<20), float64(sum.Received)/(1<<20))
	p("| gateway | before | most | after |")
	p("|---|---|---|---|")
	looks(p, []Look{m.Before, most(m.During), m.After})
}

// most returns the highest of each number.
func most(all []Look) Look {
	out := Look{Metrics: map[string]float64{}}
	for _, l := range all {
		out.Descriptors = max(out.Descriptors, l.Descriptors)
		out.Sockets, out.Pipes, out.Others = max(out.Sockets, l.Sockets), max(out.Pipes, l.Pipes), max(out.Others, l.Others)
		out.Threads = max(out.Threads, l.Threads)
		out.Goroutines, out.Kept = max(out.Goroutines, l.Goroutines), max(out.Kept, l.Kept)
		out.Live = max(out.Live, l.Live)
		out.RSS, out.PSS, out.Slab = max(out.RSS, l.RSS), max(out.PSS, l.PSS), max(out.Slab, l.Slab)
		for k, v := range l.Metrics {
			out.Metrics[k] = max(out.Metrics[k], v)
		}
	}
	return out
}

// looks prints a line for each number.
func looks(p func(string, ...any), ls []Look) {
	row := func(name string, f func(l *Look) float64) {
		line := "| " + name + " |"
		for i := range ls {
			if ls[i].Goroutines == 0 {
				line += " not known |"
				continue
			}
			line += fmt.Sprintf(" %.0f |", f(&ls[i]))
		}
		p("%s", line)
	}
	row("descriptors", func(l *Look) float64 { return float64(l.Descriptors) })
	row("of sockets", func(l *Look) float64 { return float64(l.Sockets) })
	row("of pipes", func(l *Look) float64 { return float64(l.Pipes) })
	row("goroutines", func(l *Look) float64 { return float64(l.Goroutines) })
	row("of them kept for handshakes", func(l *Look) float64 { return float64(l.Kept) })
	row("threads", func(l *Look) float64 { return float64(l.Threads) })
	row("RSS, MiB", func(l *Look) float64 { return float64(l.RSS) / 1024 })
	row("PSS, MiB", func(l *Look) float64 { return float64(l.PSS) / 1024 })
	row("heap and stacks in use, MiB", func(l *Look) float64 { return float64(l.Live) / 1024 })
	row("slab of the machine, MiB", func(l *Look) float64 { return float64(l.Slab) / 1024 })
	for _, name := range []string{"connections", "connections_active", "connections_half_open", "app_connections", "handler_panics_total",
		"accept_shed_total", "splice_no_pipe_total", "splice_engaged_total", "rejected_total", "dial_failures_total"} {
		row(name, func(l *Look) float64 { return l.Metric("dstack_gateway_"+name, "") })
	}
	p("")
}
