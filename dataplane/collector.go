package dataplane

import (
	"cmp"
	"slices"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// Collector exports a server's counters in Prometheus form. Everything is read
// from atomics at scrape time; the loops do no work for it.
type Collector struct {
	s       *Server
	topApps int

	total, active, conns, bytes, rejected, dialFail, shed, halfOpen, splice, nopipe, panics, tls, apps *prometheus.Desc
	handshake, connect, firstByte                                                                      *prometheus.Desc
}

const prefix = "dstack_gateway_"

// NewCollector returns a collector for s. Connections are exported by app for the
// topApps busiest apps; the others share app="other".
func NewCollector(s *Server, topApps int) *Collector {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prefix+name, help, labels, nil)
	}
	return &Collector{s: s, topApps: topApps,
		total:     d("connections_total", "Proxied connections that ended, by result: ok, error (cut off after bytes flowed) or rejected.", "listener", "mode", "result"),
		active:    d("connections_active", "Open client connections by mode; unknown = no server name read yet.", "mode"),
		conns:     d("connections", "Open client connections."),
		bytes:     d("bytes_total", "Relayed bytes (plaintext where TLS is terminated) by direction and path.", "direction", "path"),
		rejected:  d("rejected_total", "Connections closed before they reached an app, by reason.", "reason"),
		dialFail:  d("dial_failures_total", "Failed dials to instances, by reason.", "reason"),
		shed:      d("accept_shed_total", "Connections refused for want of descriptors or memory."),
		halfOpen:  d("connections_half_open", "Connections that have not sent a complete ClientHello."),
		splice:    d("splice_engaged_total", "Connections that moved to splice(2)."),
		nopipe:    d("splice_no_pipe_total", "Times that a pipe was wanted for splice(2) and none could be had."),
		panics:    d("handler_panics_total", "Contained panics of the data plane; each closed one connection."),
		tls:       d("tls_handshakes_total", "TLS handshakes of terminated connections, by result: full, resumed or failed.", "result"),
		apps:      d("app_connections", "Open connections by app, for the busiest apps.", "app"),
		handshake: d("handshake_seconds", "Duration of TLS handshakes at the gateway."),
		connect:   d("connect_seconds", "Time from the first dial to an established connection to an instance."),
		firstByte: d("first_byte_seconds", "Time from accept to the first byte towards the client."),
	}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.total, c.active, c.conns, c.bytes, c.rejected, c.dialFail, c.shed, c.halfOpen, c.splice, c.nopipe, c.panics, c.tls, c.apps, c.handshake, c.connect, c.firstByte} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	sum := func(get func(*worker) *atomic.Uint64) (n uint64) {
		for _, w := range c.s.workers {
			n += get(w).Load()
		}
		return n
	}

	var rejected [reasonCount]uint64
	for m := range modeCount {
		var ok, failed, refused uint64
		for r := range reasonCount {
			n := sum(func(w *worker) *atomic.Uint64 { return &w.stats.ended[m][r] })
			switch {
			case r == ReasonNormal || r == ReasonClientGone || r == ReasonIdle:
				ok += n // the client left, or nobody had anything to say: no fault of ours
			case r.Served():
				failed += n
			default:
				refused += n
				rejected[r] += n
			}
		}
		counter(c.total, ok, "proxy", modeNames[m], "ok")
		counter(c.total, failed, "proxy", modeNames[m], "error")
		counter(c.total, refused, "proxy", modeNames[m], "rejected")
		var live int64
		for _, w := range c.s.workers {
			live += w.stats.active[m].Load()
		}
		gauge(c.active, float64(live), modeNames[m])
	}
	for r := ReasonNoSNI; r < reasonCount; r++ {
		counter(c.rejected, rejected[r], r.String())
	}
	for i := range dialCauses {
		counter(c.dialFail, sum(func(w *worker) *atomic.Uint64 { return &w.stats.dialFail[i] }), dialNames[i])
	}
	gauge(c.conns, float64(c.s.Connections()))
	gauge(c.halfOpen, float64(c.s.half.total.Load()))
	counter(c.shed, sum(func(w *worker) *atomic.Uint64 { return &w.stats.shed }))
	counter(c.splice, c.s.SpliceEngaged())
	counter(c.nopipe, sum(func(w *worker) *atomic.Uint64 { return &w.relay.NoPipe }))
	var panics uint64
	for _, w := range c.s.workers {
		panics += w.l.Panics()
	}
	counter(c.panics, panics)

	up := sum(func(w *worker) *atomic.Uint64 { return &w.relay.Copied[relay.ToApp] }) + sum(func(w *worker) *atomic.Uint64 { return &w.tls.Decrypted })
	down := sum(func(w *worker) *atomic.Uint64 { return &w.relay.Copied[relay.ToClient] }) + sum(func(w *worker) *atomic.Uint64 { return &w.tls.Encrypted })
	counter(c.bytes, up, "to_app", "userspace")
	counter(c.bytes, down, "to_client", "userspace")
	counter(c.bytes, sum(func(w *worker) *atomic.Uint64 { return &w.relay.Spliced[relay.ToApp] }), "to_app", "splice")
	counter(c.bytes, sum(func(w *worker) *atomic.Uint64 { return &w.relay.Spliced[relay.ToClient] }), "to_client", "splice")

	counter(c.tls, sum(func(w *worker) *atomic.Uint64 { return &w.tls.Full }), "full")
	counter(c.tls, sum(func(w *worker) *atomic.Uint64 { return &w.tls.Resumed }), "resumed")
	counter(c.tls, sum(func(w *worker) *atomic.Uint64 { return &w.tls.Failed }), "failed")

	c.histogram(ch, c.handshake, func(w *worker) *Histogram { return &w.stats.handshake })
	c.histogram(ch, c.connect, func(w *worker) *Histogram { return &w.stats.connect })
	c.histogram(ch, c.firstByte, func(w *worker) *Histogram { return &w.stats.firstByte })

	type load struct {
		id string
		n  int64
	}
	var loads []load
	c.s.Snapshot().Apps(func(a *routing.App) bool {
		if n := a.State.Active.Load(); n > 0 {
			loads = append(loads, load{a.ID, n})
		}
		return true
	})
	slices.SortFunc(loads, func(a, b load) int { return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.id, b.id)) })
	var other int64
	for i, l := range loads {
		if i < c.topApps {
			gauge(c.apps, float64(l.n), l.id)
		} else {
			other += l.n
		}
	}
	gauge(c.apps, float64(other), "other")
}

func (c *Collector) histogram(ch chan<- prometheus.Metric, d *prometheus.Desc, get func(*worker) *Histogram) {
	buckets := map[float64]uint64{}
	var count uint64
	var sum float64
	for i := range len(bounds) + 1 {
		for _, w := range c.s.workers {
			count += get(w).counts[i].Load()
		}
		if i < len(bounds) {
			buckets[bounds[i].Seconds()] = count
		}
	}
	for _, w := range c.s.workers {
		sum += float64(get(w).sum.Load()) / 1e9
	}
	ch <- prometheus.MustNewConstHistogram(d, count, sum, buckets)
}
