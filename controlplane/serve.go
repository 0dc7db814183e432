package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
)

// httpServer is one of the gateway's HTTP listeners.
type httpServer struct {
	name string // main, admin, debug, metrics, control
	srv  *http.Server
	lis  net.Listener
	log  *slog.Logger
	stop time.Duration // graceful stop
}

// listen binds cfg's address. tlsConf is nil for plain HTTP.
func listen(name string, log *slog.Logger, cfg *config.Server, tlsConf *tls.Config, h http.Handler) (*httpServer, error) {
	network, address := cfg.Address.Listen()
	if network == "unix" && cfg.Reuse {
		if err := removeStaleSocket(address); err != nil {
			return nil, fmt.Errorf("%s server: %w", name, err)
		}
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, fmt.Errorf("%s server: listen on %s: %w (set its address or port in the configuration, or stop the other process)", name, cfg.Address, err)
	}
	stop := time.Duration(cfg.Shutdown.Grace+cfg.Shutdown.Mercy) * time.Second
	return newHTTPServer(name, log, l, tlsConf, ident(cfg.Ident, h), time.Duration(cfg.KeepAlive)*time.Second, stop)
}

func newHTTPServer(name string, log *slog.Logger, l net.Listener, tlsConf *tls.Config, h http.Handler, keepAlive, stop time.Duration) (*httpServer, error) {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		// A guest has 60 s for a whole call (gateway spec 12.1); twice that ends what hangs.
		ReadTimeout:    2 * time.Minute,
		WriteTimeout:   2 * time.Minute,
		IdleTimeout:    keepAlive,
		MaxHeaderBytes: 64 << 10,
		ErrorLog:       slogWriter(log, name),
	}
	if keepAlive == 0 {
		s.SetKeepAlivesEnabled(false)
		s.IdleTimeout = time.Second
	}
	if tlsConf != nil {
		s.Protocols = new(http.Protocols)
		s.Protocols.SetHTTP1(true)
		s.Protocols.SetHTTP2(true)
		s.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 250}
		tlsConf = tlsConf.Clone()
		tlsConf.NextProtos = []string{"h2", "http/1.1"}
		l = tls.NewListener(l, tlsConf)
	}
	return &httpServer{name: name, srv: s, lis: l, log: log, stop: stop}, nil
}

// run serves until ctx ends, then gives calls under way time to finish.
func (s *httpServer) run(ctx context.Context) error {
	ended := make(chan error, 1)
	go func() { ended <- s.srv.Serve(s.lis) }()
	select {
	case err := <-ended:
		return fmt.Errorf("%s server: %w", s.name, err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), s.stop)
	defer cancel()
	if err := s.srv.Shutdown(grace); err != nil {
		s.srv.Close()
	}
	<-ended
	return nil
}

func ident(name string, next http.Handler) http.Handler {
	if name == "" {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", name)
		next.ServeHTTP(w, r)
	})
}

// removeStaleSocket removes a unix socket that nobody serves any more.
func removeStaleSocket(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s exists and is not a socket: remove it or choose another address", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return fmt.Errorf("another process serves the socket %s", path)
	}
	return os.Remove(path)
}

// slogWriter routes net/http's complaints about single connections (port scans, bad
// handshakes) to the debug level: they are the internet's, not ours.
func slogWriter(l *slog.Logger, name string) *log.Logger {
	return slog.NewLogLogger(l.With("server", name).Handler(), slog.LevelDebug)
}
