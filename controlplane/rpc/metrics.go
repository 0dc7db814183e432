package rpc

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the admission series of ops spec 6.2.
type metrics struct {
	registrations *prometheus.CounterVec
	auth          prometheus.Histogram
	admin         *prometheus.CounterVec
}

// What a registration came to.
const (
	resultCreated      = "created"
	resultChanged      = "changed"
	resultUnchanged    = "unchanged"
	resultUnauthorized = "unauthorized" // the webhook said no, or nothing
	resultRefused      = "refused"
)

func newMetrics() *metrics {
	m := &metrics{
		registrations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstack_gateway_registrations_total",
			Help: "Registrations of CVMs by result: created, changed, unchanged, unauthorized (by the webhook) or refused.",
		}, []string{"result"}),
		auth: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "dstack_gateway_auth_seconds",
			Help:    "Duration of authorization by the webhook.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10},
		}),
		admin: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstack_gateway_admin_requests_total",
			Help: "Answered calls of the Admin service by method and HTTP status.",
		}, []string{"method", "code"}),
	}
	for _, r := range []string{resultCreated, resultChanged, resultUnchanged, resultUnauthorized, resultRefused} {
		m.registrations.WithLabelValues(r)
	}
	return m
}

func (m *metrics) register(r prometheus.Registerer) error {
	for _, c := range []prometheus.Collector{m.registrations, m.auth, m.admin} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}

func (m *metrics) observeAdmin(method string, code int, _ time.Duration) {
	m.admin.WithLabelValues(method, strconv.Itoa(code)).Inc()
}
