package wireguard

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics collects the wg_ series (ops spec 6.2, gateway spec A.3). Readings of
// the device are taken over from the refresher, so that a scrape never waits
// for it.
type metrics struct {
	d *Device

	reconfigured, reconfigureFailures, refreshFailures prometheus.Counter
	invalid, evicted, repaired, fileFailures           prometheus.Counter

	peers, rx, tx        *prometheus.Desc
	dropped              *prometheus.Desc
	nPeers               atomic.Int64
	rxBytes, txBytes     atomic.Uint64
	linkKnown            atomic.Bool
	rxDropped, txDropped atomic.Uint64
}

func newMetrics(d *Device) *metrics {
	const ns = "dstack_gateway_"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: ns + name, Help: help})
	}
	return &metrics{
		d:                   d,
		reconfigured:        counter("wg_reconfigure_total", "Attempts to change the WireGuard configuration, failed ones included."),
		reconfigureFailures: counter("wg_reconfigure_failures_total", "Failed attempts to change the WireGuard configuration."),
		refreshFailures:     counter("wg_refresh_failures_total", "Failed readings of WireGuard handshakes."),
		invalid:             counter("wg_invalid_peers_total", "Instances kept off WireGuard because their record is invalid."),
		evicted:             counter("wg_evicted_peers_total", "Peers that lost their key or address to another instance."),
		repaired:            counter("wg_repairs_total", "Times the WireGuard interface was found changed by somebody else."),
		fileFailures:        counter("wg_peer_file_failures_total", "Failed writes of the WireGuard peer file."),
		peers:               prometheus.NewDesc(ns+"wg_peers", "Peers on the WireGuard interface at the last reading.", nil, nil),
		rx:                  prometheus.NewDesc(ns+"wg_rx_bytes_total", "Bytes received from WireGuard peers, encrypted, since start.", nil, nil),
		tx:                  prometheus.NewDesc(ns+"wg_tx_bytes_total", "Bytes sent to WireGuard peers, encrypted, since start.", nil, nil),
		dropped:             prometheus.NewDesc(ns+"wg_device_dropped_total", "Packets dropped by the WireGuard interface.", []string{"direction"}, nil),
	}
}

func (m *metrics) counters() []prometheus.Counter {
	return []prometheus.Counter{m.reconfigured, m.reconfigureFailures, m.refreshFailures, m.invalid, m.evicted, m.repaired, m.fileFailures}
}

// traffic takes over a reading: the number of peers and the bytes since the
// previous one.
func (m *metrics) traffic(peers int, rx, tx uint64) {
	m.nPeers.Store(int64(peers))
	m.rxBytes.Add(rx)
	m.txBytes.Add(tx)
}

func (m *metrics) link(info linkInfo) {
	m.rxDropped.Store(info.rxDropped)
	m.txDropped.Store(info.txDropped)
	m.linkKnown.Store(true)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.counters() {
		c.Describe(ch)
	}
	ch <- m.peers
	ch <- m.rx
	ch <- m.tx
	ch <- m.dropped
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.counters() {
		c.Collect(ch)
	}
	ch <- prometheus.MustNewConstMetric(m.peers, prometheus.GaugeValue, float64(m.nPeers.Load()))
	ch <- prometheus.MustNewConstMetric(m.rx, prometheus.CounterValue, float64(m.rxBytes.Load()))
	ch <- prometheus.MustNewConstMetric(m.tx, prometheus.CounterValue, float64(m.txBytes.Load()))
	if m.linkKnown.Load() {
		ch <- prometheus.MustNewConstMetric(m.dropped, prometheus.CounterValue, float64(m.rxDropped.Load()), "rx")
		ch <- prometheus.MustNewConstMetric(m.dropped, prometheus.CounterValue, float64(m.txDropped.Load()), "tx")
	}
}
