package customdomain

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const metricPrefix = "dstack_gateway_custom_domain_"

// metrics are the dstack_gateway_custom_domain_* series.
type metrics struct {
	hits, misses, coalesced, stale, refused prometheus.Counter

	lookups    *prometheus.CounterVec // by result
	seconds    prometheus.Histogram
	collectors []prometheus.Collector
}

// results are the values of the label "result", by state of the entry.
var results = [...]string{unknown: "failed", absent: "absent", malformed: "malformed", found: "found"}

func newMetrics(r *Resolver) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: metricPrefix + name, Help: help})
	}
	m := &metrics{
		hits:      counter("cache_hits_total", "Names of custom domains answered from memory."),
		misses:    counter("cache_misses_total", "Names of custom domains for which a record had to be looked up."),
		coalesced: counter("coalesced_total", "Lookups of a record saved because the same one was in progress."),
		stale:     counter("stale_total", "Answers from expired records because the resolvers failed."),
		refused:   counter("refused_total", "Lookups of a record not made because too many were in progress."),
		lookups: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricPrefix + "lookups_total", Help: "Lookups of a record, by result.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: metricPrefix + "lookup_seconds", Help: "Duration of a lookup with all its retries.",
			Buckets: []float64{.001, .005, .02, .05, .1, .25, .5, 1, 2, 5},
		}),
	}
	for _, result := range results {
		m.lookups.WithLabelValues(result)
	}
	m.collectors = []prometheus.Collector{
		m.hits, m.misses, m.coalesced, m.stale, m.refused, m.lookups, m.seconds, r.servers.failures,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: metricPrefix + "lookups_in_progress", Help: "Lookups of a record in progress.",
		}, func() float64 {
			r.mu.Lock()
			defer r.mu.Unlock()
			return float64(len(r.flights))
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: metricPrefix + "cache_entries", Help: "Records remembered, those that do not exist included.",
		}, func() float64 { return float64(r.cache.len()) }),
	}
	return m
}

func (m *metrics) observe(s state, d time.Duration) {
	m.lookups.WithLabelValues(results[s]).Inc()
	m.seconds.Observe(d.Seconds())
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.collectors {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.collectors {
		c.Collect(ch)
	}
}
