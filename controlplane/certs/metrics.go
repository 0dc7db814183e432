package certs

import (
	"maps"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// maxSeries bounds the domains in metrics (gateway spec A.3). Those that expire
// first are the ones somebody must know of.
const maxSeries = 256

type metrics struct {
	s        *Store
	notAfter *prometheus.Desc
	rejected prometheus.Counter
}

func newMetrics(s *Store) *metrics {
	return &metrics{
		s: s,
		notAfter: prometheus.NewDesc("dstack_gateway_cert_not_after_timestamp_seconds",
			"When the certificate served for *.domain expires, Unix seconds. The 256 that expire first.", []string{"domain"}, nil),
		rejected: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "dstack_gateway_cert_rejections_total",
			Help: "Certificates not installed because they are expired, broken or do not match their key.",
		}),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.notAfter
	m.rejected.Describe(ch)
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.rejected.Collect(ch)
	expiry := m.s.Expiry()
	domains := slices.SortedFunc(maps.Keys(expiry), func(a, b string) int { return expiry[a].Compare(expiry[b]) })
	for _, d := range domains[:min(len(domains), maxSeries)] {
		ch <- prometheus.MustNewConstMetric(m.notAfter, prometheus.GaugeValue, float64(expiry[d].Unix()), d)
	}
}
