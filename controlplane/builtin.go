package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/rpc"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// builtinServer serves the reserved names of the proxy port (gateway spec 4.4, 9.3)
// with net/http; with `g` that is real HTTP/2.
type builtinServer struct {
	servers map[hostname.Service]*http.Server
	queues  map[hostname.Service]*connQueue
	wg      sync.WaitGroup
	log     *slog.Logger
}

func newBuiltinServer(log *slog.Logger, r *rpc.Server) *builtinServer {
	b := &builtinServer{servers: map[hostname.Service]*http.Server{}, queues: map[hostname.Service]*connQueue{}, log: log}
	for _, svc := range []hostname.Service{hostname.GatewayService, hostname.HealthService} {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(true)
		protocols.SetHTTP2(true)
		s := &http.Server{Handler: r.Builtin(svc), Protocols: protocols, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 30 * time.Second,
			MaxHeaderBytes: 16 << 10, ErrorLog: slogWriter(log, "builtin")}
		q := &connQueue{conns: make(chan net.Conn), done: make(chan struct{})}
		b.servers[svc], b.queues[svc] = s, q
		b.wg.Go(func() { _ = s.Serve(q) })
	}
	return b
}

// serve owns c.
func (b *builtinServer) serve(svc hostname.Service, mode hostname.Mode, base *routing.Base, c net.Conn) {
	cfg := base.TLS
	if mode == hostname.TerminateH2 {
		cfg = base.TLSH2
	}
	q := b.queues[svc]
	if cfg == nil || q == nil {
		c.Close()
		return
	}
	t := tls.Server(c, cfg)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		c.Close()
		return
	}
	select {
	case q.conns <- t:
	case <-q.done:
		c.Close()
	}
}

func (b *builtinServer) close() {
	for svc, s := range b.servers {
		b.queues[svc].Close()
		s.Close()
	}
	b.wg.Wait()
}

// connQueue is a net.Listener over connections accepted elsewhere.
type connQueue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

var errQueueClosed = errors.New("listener closed")

func (q *connQueue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, errQueueClosed
	}
}

func (q *connQueue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *connQueue) Addr() net.Addr { return &net.TCPAddr{} }
