package controlplane

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/dstack-gw/dstack-gw/controlplane/adminauth"
	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/dashboard"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// SocketName is the control socket in the data directory: the admin interface for
// root on this machine, without a token. Tools use it.
const SocketName = "control.sock"

// openServers binds the main, admin, debug, metrics and control listeners.
func (g *Gateway) openServers() error {
	cfg := g.cfg
	add := func(s *httpServer, err error) error {
		if err == nil {
			g.servers = append(g.servers, s)
			g.onClose(func() { s.lis.Close() })
		}
		return err
	}
	main := g.rpc.MainHandler(prpc.Options{Identify: ratls.IdentifyRequest(nil), MethodLimits: limits(&cfg.Server), Logger: g.log})
	if err := add(listen("main", g.log, &cfg.Server, g.identity.ServerConfig(), guardBodies(main))); err != nil {
		return err
	}
	metrics := promhttp.HandlerFor(g.metrics, promhttp.HandlerOpts{ErrorLog: slogWriter(g.log, "metrics"), MaxRequestsInFlight: 4, Timeout: 30 * time.Second})

	board, err := dashboard.New(dashboard.Options{Source: g.rpc, Version: g.opt.Version, QueryToken: adminauth.QueryToken, Logger: g.log})
	if err != nil {
		return fmt.Errorf("dashboard: %w", err)
	}
	pages := map[string]http.Handler{"/": board, "/dashboard.js": board, "/dashboard.css": board, "/metrics": metrics, "/ready": http.HandlerFunc(g.serveReady)}
	tools, err := g.tools()
	if err != nil {
		return err
	}
	for path, h := range tools {
		pages[path] = h
	}
	if cfg.Core.Admin.Pprof {
		for path, h := range map[string]http.HandlerFunc{"/debug/pprof/": pprof.Index, "/debug/pprof/cmdline": pprof.Cmdline, "/debug/pprof/profile": pprof.Profile, "/debug/pprof/symbol": pprof.Symbol, "/debug/pprof/trace": pprof.Trace} {
			pages[path] = h
		}
		for _, name := range []string{"heap", "goroutine", "allocs", "block", "mutex", "threadcreate"} {
			pages["/debug/pprof/"+name] = pprof.Handler(name)
		}
	}
	admin := g.rpc.AdminHandler(prpc.Options{MethodLimits: limits(&cfg.Core.Admin.Server), Logger: g.log}, pages)
	if cfg.Core.Admin.Enabled {
		t, err := plainTLS(&cfg.Core.Admin.Server)
		if err != nil {
			return fmt.Errorf("admin server: %w", err)
		}
		if err := add(listen("admin", g.log, &cfg.Core.Admin.Server, t, g.auth.Wrap(admin))); err != nil {
			return err
		}
	}
	if cfg.Core.Debug.InsecureEnableDebugRPC {
		t, err := plainTLS(&cfg.Core.Debug.Server)
		if err != nil {
			return fmt.Errorf("debug server: %w", err)
		}
		if err := add(listen("debug", g.log, &cfg.Core.Debug.Server, t, g.rpc.DebugHandler(prpc.Options{Logger: g.log}))); err != nil {
			return err
		}
	}
	if a := cfg.Core.Metrics.Addr; !a.IsZero() {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", metrics)
		mux.HandleFunc("GET /ready", g.serveReady)
		srv := config.Server{Address: a, Reuse: true, KeepAlive: 30, Shutdown: cfg.Server.Shutdown}
		if err := add(listen("metrics", g.log, &srv, nil, mux)); err != nil {
			return err
		}
	}
	return g.openControl(admin)
}

// openControl serves the admin interface on a socket that only root (and the
// gateway's own user) can open. A path too long for a socket only costs the tools.
func (g *Gateway) openControl(h http.Handler) error {
	path := filepath.Join(g.cfg.Core.Sync.DataDir, SocketName)
	if err := removeStaleSocket(path); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		g.log.Warn("no control socket: `dstack-gw explain` and `doctor` cannot reach this process", "path", path, "error", err)
		return nil
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("control socket %s: %w", path, err)
	}
	s, err := newHTTPServer("control", g.log, l, nil, h, 10*time.Second, time.Second)
	if err != nil {
		return err
	}
	g.servers = append(g.servers, s)
	g.onClose(func() { l.Close() })
	return nil
}

// plainTLS is the TLS of the admin or debug server, nil for plain HTTP.
func plainTLS(s *config.Server) (*tls.Config, error) {
	if !s.TLS.Enabled() {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(s.TLS.Certs, s.TLS.Key)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, nil
}

func limits(s *config.Server) map[string]int64 {
	m := make(map[string]int64, len(s.Limits))
	for method := range s.Limits {
		m[method] = s.BodyLimit(method)
	}
	return m
}

type readyCheck struct {
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Cause string `json:"cause,omitempty"`
}

// ready lists what must hold before this node should get traffic (ops spec 6.2).
func (g *Gateway) ready() (ok bool, checks []readyCheck) {
	add := func(name string, ok bool, cause string) {
		if ok {
			cause = ""
		}
		checks = append(checks, readyCheck{name, ok, cause})
	}
	// The store was read before the listeners opened; that it cannot be written now
	// stops no traffic, so it is not a reason to take the node out.
	add("store", true, "")
	st := g.wg.Status()
	add("wireguard", st.Up, fmt.Sprintf("interface %s is not up: %s", st.Interface, st.LastError))
	add("proxy", true, "") // New fails when a port cannot be bound
	for _, b := range g.dp.Snapshot().Bases() {
		// A configured domain that never had a certificate is pending, not broken.
		if b.TLS == nil {
			if _, had := g.store.CertData(b.Domain); had {
				add("certificate "+b.Domain, false, "the stored certificate is not usable; see the log")
			}
			continue
		}
		add("certificate "+b.Domain, true, "")
	}
	ok = true
	for _, c := range checks {
		ok = ok && c.OK
	}
	return ok, checks
}

func (g *Gateway) serveReady(w http.ResponseWriter, _ *http.Request) {
	ok, checks := g.ready()
	w.Header().Set("Content-Type", "application/json")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(struct {
		Ready  bool         `json:"ready"`
		Checks []readyCheck `json:"checks"`
	}{ok, checks}) // the client left
}
