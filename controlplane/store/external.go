package store

import (
	"fmt"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// openExternal makes a client for a cluster. It does not wait for a connection: the first call does.
func openExternal(opts Options, log *slog.Logger) (*backend, error) {
	c, err := clientv3.New(clientv3.Config{
		Endpoints:            opts.Endpoints,
		TLS:                  opts.TLS,
		Username:             opts.Username,
		Password:             opts.Password,
		DialTimeout:          5 * time.Second,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		Logger:               clientLogger(log),
		// gRPC's own default would let two minutes pass before it looks again after a long outage.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 250 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		})},
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to etcd at %v: %w", opts.Endpoints, err)
	}
	b := &backend{
		kv: c.KV, watcher: c.Watcher, lease: c.Lease, maint: c.Maintenance, endpoint: opts.Endpoints[0],
		close: func(timeout time.Duration) bool { return abandon(func() { c.Close() }, timeout) },
	}
	if opts.Prefix != "" {
		b.kv = namespace.NewKV(c.KV, opts.Prefix)
		b.watcher = namespace.NewWatcher(c.Watcher, opts.Prefix)
		b.lease = namespace.NewLease(c.Lease, opts.Prefix)
	}
	return b, nil
}
