package controlplane

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// registerMetrics exports what has no package of its own.
func (g *Gateway) registerMetrics(r prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dstack_gateway_" + name, Help: help}, f))
	}
	counter := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "dstack_gateway_" + name, Help: help}, f))
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dstack_gateway_build_info", Help: "Always 1; the version is in the label."}, []string{"version", "revision"})
	build.WithLabelValues(g.opt.Version, g.opt.Revision).Set(1)
	r.MustRegister(build)
	accel := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "dstack_gateway_accel_info", Help: "Always 1; how a feature runs, and why."}, []string{"feature", "mode", "reason"})
	for _, a := range g.accelFacts() {
		accel.WithLabelValues(a.feature, a.mode, a.reason).Set(1)
	}
	r.MustRegister(accel)
	gauge("start_time_seconds", "When this process began to serve, unix time.", func() float64 { return float64(g.started.Unix()) })
	gauge("cluster_instances", "Registered instances.", func() float64 { return float64(g.reg.Len()) })
	gauge("cluster_nodes", "Gateway nodes in the store.", func() float64 { return float64(len(g.store.Nodes())) })
	gauge("ip_pool_used", "Addresses of client_ip_range in use.", func() float64 { used, _ := g.reg.PoolUsage(); return float64(used) })
	gauge("ip_pool_size", "Addresses of client_ip_range.", func() float64 { _, size := g.reg.PoolUsage(); return float64(size) })
	counter("policy_fetch_failures_total", "Port policies that could not be fetched from an instance.", func() float64 { return float64(g.pol.failures.Load()) })
	counter("access_log_dropped_total", "Access log lines dropped because the log was slower than the traffic.", func() float64 { return float64(g.access.dropped.Load()) })
	r.MustRegister(&instanceCollector{dp: g.dp, stale: g.cfg.Core.Proxy.Timeouts.HandshakeStale.Std()})
	g.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

type accelFact struct{ feature, mode, reason string }

// accelFacts says how each accelerated feature runs and why.
func (g *Gateway) accelFacts() []accelFact {
	st := g.wg.Status()
	splice := accelFact{"splice", "on", "bulk directions move to splice(2) by themselves"}
	if p := &g.cfg.Core.Proxy; p.TCPSplice.Enabled {
		splice.mode, splice.reason = "gated", "core.proxy.tcp_splice decides"
	}
	ktls := accelFact{"ktls", "off", "not configured"}
	if g.cfg.Core.Proxy.KTLS.Enabled {
		ktls.reason = "configured, but this release terminates TLS in user space"
	}
	return []accelFact{{"wireguard", string(st.Mode), st.Reason}, splice, ktls}
}

// instanceCollector counts instances by health and the age of their handshakes.
type instanceCollector struct {
	dp    router
	stale time.Duration
}

var (
	instancesDesc = prometheus.NewDesc("dstack_gateway_instances", "Registered instances by state: online has a WireGuard handshake younger than handshake_stale.", []string{"state"}, nil)
	ageDesc       = prometheus.NewDesc("dstack_gateway_instance_handshake_age_seconds", "Ages of the last WireGuard handshakes of all instances that had one.", nil, nil)
	ageBounds     = []float64{30, 60, 120, 180, 300, 600, 1800, 3600, 36000}
)

func (c *instanceCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- instancesDesc
	ch <- ageDesc
}

func (c *instanceCollector) Collect(ch chan<- prometheus.Metric) {
	now := time.Now().Unix()
	var online, stale float64
	var count uint64
	var sum float64
	buckets := make(map[float64]uint64, len(ageBounds))
	for _, b := range ageBounds {
		buckets[b] = 0
	}
	c.dp.Snapshot().Instances(func(i *routing.Instance) bool {
		h := i.State.Handshake.Load()
		age := float64(max(0, now-h))
		if h > 0 && age < c.stale.Seconds() {
			online++
		} else {
			stale++
		}
		if h > 0 {
			count++
			sum += age
			for _, b := range ageBounds {
				if age <= b {
					buckets[b]++
				}
			}
		}
		return true
	})
	ch <- prometheus.MustNewConstMetric(instancesDesc, prometheus.GaugeValue, online, "online")
	ch <- prometheus.MustNewConstMetric(instancesDesc, prometheus.GaugeValue, stale, "stale")
	ch <- prometheus.MustNewConstHistogram(ageDesc, count, sum, buckets)
}
