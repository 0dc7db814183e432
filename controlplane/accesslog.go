package controlplane

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane"
)

// accessLog writes one line a connection, outside the event loops. A full queue
// drops lines and counts them: the log must not slow traffic.
type accessLog struct {
	log     *slog.Logger
	all     bool
	sample  uint64
	n       atomic.Uint64
	dropped atomic.Uint64
	queue   chan dataplane.Record
}

const (
	accessQueue = 1024
	// rejections are always worth a line, but not thousands of the same one.
	rejectionsPerSecond = 5
)

func newAccessLog(log *slog.Logger, all bool, sample int) *accessLog {
	return &accessLog{log: log, all: all, sample: uint64(max(1, sample)), queue: make(chan dataplane.Record, accessQueue)}
}

// closed runs on an event loop.
func (a *accessLog) closed(r *dataplane.Record) {
	if r.Reason.Served() {
		if !a.all || a.n.Add(1)%a.sample != 0 {
			return
		}
	}
	select {
	case a.queue <- *r:
	default:
		a.dropped.Add(1)
	}
}

func (a *accessLog) run(ctx context.Context) {
	var second int64
	var written [64]int
	var suppressed, seen uint64
	for {
		var r dataplane.Record
		select {
		case <-ctx.Done():
			return
		case r = <-a.queue:
		}
		if now := time.Now().Unix(); now != second {
			dropped := a.dropped.Load()
			if n := suppressed + dropped - seen; n > 0 {
				a.log.Warn("access log lines were left out", "count", n)
			}
			seen = dropped
			second, suppressed, written = now, 0, [64]int{}
		}
		if !r.Reason.Served() {
			if written[r.Reason&63]++; written[r.Reason&63] > rejectionsPerSecond {
				suppressed++
				continue
			}
		}
		a.write(&r)
	}
}

func (a *accessLog) write(r *dataplane.Record) {
	attrs := []slog.Attr{slog.Uint64("conn", r.ID), slog.String("peer", r.Peer.String()), slog.String("name", r.Name), slog.String("reason", r.Reason.String())}
	if r.Routed {
		attrs = append(attrs, slog.String("mode", r.Mode.String()), slog.Int("port", int(r.Port)))
	}
	if r.App != "" {
		attrs = append(attrs, slog.String("app", r.App))
	}
	if r.Instance != "" {
		attrs = append(attrs, slog.String("instance", r.Instance), slog.Uint64("up", r.Up), slog.Uint64("down", r.Down))
	}
	attrs = append(attrs, slog.Duration("duration", r.Duration.Round(time.Microsecond)))
	if r.Detail != nil {
		attrs = append(attrs, slog.String("detail", r.Detail.Error()))
	}
	msg := "connection"
	if !r.Reason.Served() {
		msg = "connection refused"
	}
	a.log.LogAttrs(context.Background(), slog.LevelInfo, msg, attrs...)
}
