package rpc

import (
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/prpc"
)

// appInfoFor is how long an answer of the own guest agent is given out again: everybody may ask.
const appInfoFor = 10 * time.Second

type appInfoCache struct {
	mu   sync.Mutex
	json []byte
	at   time.Time
}

// Builtin is the HTTP server behind a reserved name on the proxy port: of the gateway (gateway spec 9.3) or of the
// health check (4.4). Other services get 404 for everything.
func (s *Server) Builtin(svc hostname.Service) http.Handler {
	switch svc {
	case hostname.GatewayService:
		return http.HandlerFunc(s.serveGateway)
	case hostname.HealthService:
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			status := http.StatusNotFound
			if r.Method == http.MethodGet && r.URL.EscapedPath() == "/" {
				status = http.StatusOK
			}
			empty(w, status)
		})
	default:
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { empty(w, http.StatusNotFound) })
	}
}

func empty(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(status)
}

func (s *Server) serveGateway(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		empty(w, http.StatusMethodNotAllowed)
		return
	}
	path := r.URL.EscapedPath()
	for strings.HasPrefix(path, "/.dstack") {
		path = strings.TrimPrefix(path, "/.dstack")
	}
	switch path {
	case "/health":
		empty(w, http.StatusOK)
	case "/index":
		writeJSON(w, []byte(`{"type":"dstack gateway","paths":["/index","/app-info","/acme-info"]}`))
	case "/app-info":
		s.serveAppInfo(w, r)
	case "/acme-info":
		s.serveAcmeInfo(w, r)
	default:
		empty(w, http.StatusNotFound)
	}
}

func writeJSON(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body) // the client left
}

// serveAppInfo drops the connection when the agent fails, as released gateways do: there is nothing true to answer.
func (s *Server) serveAppInfo(w http.ResponseWriter, r *http.Request) {
	body, err := s.ownAppInfo(r)
	if err != nil {
		s.log.Warn("/app-info cannot be answered: the guest agent of this CVM failed", "error", err)
		panic(http.ErrAbortHandler)
	}
	writeJSON(w, body)
}

func (s *Server) ownAppInfo(r *http.Request) ([]byte, error) {
	if s.d.AgentInfo == nil {
		return nil, errNoAgent
	}
	c := &s.appInfo
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := s.now(); c.json != nil && now.Sub(c.at) < appInfoFor && !now.Before(c.at) {
		return c.json, nil
	}
	info, err := s.d.AgentInfo(r.Context())
	if err != nil {
		return nil, err
	}
	body, err := prpc.Marshal(info)
	if err != nil {
		return nil, err
	}
	c.json, c.at = body, s.now()
	return body, nil
}

func (s *Server) serveAcmeInfo(w http.ResponseWriter, r *http.Request) {
	a, err := s.acmeInfo()
	if err != nil {
		s.log.Error("/acme-info cannot be answered", "error", err)
		panic(http.ErrAbortHandler)
	}
	if q := r.URL.Query(); q.Has("since") || q.Has("limit") {
		if a, err = a.since(q); err != nil {
			empty(w, http.StatusBadRequest)
			return
		}
	}
	w.Header().Set("Cache-Control", "max-age=60")
	a.serveJSON(w, r)
}
