package dataplane

import (
	"sync/atomic"
	"time"
)

// Reason says why a connection ended. Those up to ReasonNormal served the client;
// the others are the values of rejected_total{reason} and of the access log.
type Reason uint8

const (
	ReasonNormal     Reason = iota // both sides closed
	ReasonClientGone               // the client reset or vanished
	ReasonAppGone                  // the app reset or vanished
	ReasonIdle
	ReasonTotal
	ReasonShutdown
	ReasonNoSNI
	ReasonUnknownApp
	ReasonNoInstance
	ReasonAppLimit
	ReasonPortPolicy
	ReasonDNS
	ReasonPPHeader
	ReasonTLS
	ReasonTimeout
	ReasonOverload
	ReasonDial
	ReasonInternal
	reasonCount
)

var reasonNames = [reasonCount]string{"normal", "client_gone", "app_gone", "idle", "total", "shutdown",
	"no_sni", "unknown_app", "no_instance", "app_limit", "port_policy", "dns", "pp_header", "tls", "timeout", "overload", "dial", "internal"}

func (r Reason) String() string { return reasonNames[r] }

// Served reports whether bytes were relayed before the end.
func (r Reason) Served() bool { return r <= ReasonShutdown }

// Histogram counts durations in fixed buckets. One writer, any reader.
type Histogram struct {
	counts [len(bounds) + 1]atomic.Uint64
	sum    atomic.Int64
}

var bounds = [...]time.Duration{100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond,
	2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second}

// Observe adds one duration.
func (h *Histogram) Observe(d time.Duration) {
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	h.counts[i].Add(1)
	h.sum.Add(int64(d))
}

// modes of connections_total: the third counts connections whose name was never read.
const (
	modeTerminate = iota
	modePassthrough
	modeUnknown
	modeCount
)

var modeNames = [modeCount]string{"terminate", "passthrough", "unknown"}

// workerStats belongs to one loop; readers sum over the workers.
type workerStats struct {
	accepted  atomic.Uint64
	shed      atomic.Uint64 // refused for want of descriptors
	ended     [modeCount][reasonCount]atomic.Uint64
	live      atomic.Int64              // connections on this loop
	active    [modeCount]atomic.Int64   // the same by mode
	dialFail  [dialCauses]atomic.Uint64 // by cause
	handshake Histogram
	connect   Histogram
	firstByte Histogram
	_         [64]byte // keep the next worker's counters off this cache line
}

const (
	dialRefused = iota
	dialTimeout
	dialUnreachable
	dialPorts
	dialShortage
	dialOther
	dialCauses
)

var dialNames = [dialCauses]string{"refused", "timeout", "unreachable", "ports_exhausted", "no_descriptors", "other"}
