package rpc

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/prpc"
)

var errNoAgent = errors.New("there is no guest agent: the gateway does not run in a CVM")

func gatewayPrefixes() []string { return []string{"Tproxy.", "Gateway."} }

// Gateway is the service of the main server. Options.Identify must be ratls.IdentifyRequest.
func (s *Server) Gateway() *prpc.Service {
	p := prpc.NewService("Gateway", gatewayPrefixes()...)
	prpc.Handle(p, "RegisterCvm", s.RegisterCvm)
	prpc.Handle(p, "AcmeInfo", s.AcmeInfo)
	prpc.Handle(p, "Info", s.Info)
	prpc.Handle(p, "GetPeers", s.GetPeers)
	return p
}

// Admin is the service of the admin server. It trusts every caller.
func (s *Server) Admin() *prpc.Service {
	p := prpc.NewService("Admin", "Admin.")
	prpc.Handle(p, "Status", s.Status)
	prpc.Handle(p, "GetInfo", s.GetInfo)
	prpc.Handle(p, "GetMeta", s.GetMeta)
	prpc.Handle(p, "Exit", s.Exit)
	prpc.Handle(p, "SetNodeUrl", s.SetNodeURL)
	prpc.Handle(p, "SetNodeStatus", s.SetNodeStatus)
	prpc.Handle(p, "GetNodeStatuses", s.GetNodeStatuses)
	prpc.Handle(p, "WaveKvStatus", s.WaveKvStatus)
	prpc.Handle(p, "GetInstanceHandshakes", s.GetInstanceHandshakes)
	prpc.Handle(p, "GetGlobalConnections", s.GetGlobalConnections)

	prpc.Handle(p, "RenewCert", s.RenewCert)
	prpc.Handle(p, "ReloadCert", s.ReloadCert)
	prpc.Handle(p, "SetCaa", s.SetCaa)
	prpc.Handle(p, "RotateAcmeCredentials", s.RotateAcmeCredentials)
	prpc.Handle(p, "ListDnsCredentials", s.ListDNSCredentials)
	prpc.Handle(p, "GetDnsCredential", s.GetDNSCredential)
	prpc.Handle(p, "CreateDnsCredential", s.CreateDNSCredential)
	prpc.Handle(p, "UpdateDnsCredential", s.UpdateDNSCredential)
	prpc.Handle(p, "DeleteDnsCredential", s.DeleteDNSCredential)
	prpc.Handle(p, "GetDefaultDnsCredential", s.GetDefaultDNSCredential)
	prpc.Handle(p, "SetDefaultDnsCredential", s.SetDefaultDNSCredential)
	prpc.Handle(p, "ListZtDomains", s.ListZtDomains)
	prpc.Handle(p, "GetZtDomain", s.GetZtDomain)
	prpc.Handle(p, "AddZtDomain", s.AddZtDomain)
	prpc.Handle(p, "UpdateZtDomain", s.UpdateZtDomain)
	prpc.Handle(p, "DeleteZtDomain", s.DeleteZtDomain)
	prpc.Handle(p, "RenewZtDomainCert", s.RenewZtDomainCert)
	prpc.Handle(p, "ForceReleaseCertLock", s.ForceReleaseCertLock)
	prpc.Handle(p, "ListCertAttestations", s.ListCertAttestations)
	prpc.Handle(p, "GetCertbotConfig", s.GetCertbotConfig)
	prpc.Handle(p, "SetCertbotConfig", s.SetCertbotConfig)

	prpc.Handle(p, "SetInstancePortPolicy", s.SetInstancePortPolicy)
	prpc.Handle(p, "ClearInstancePortPolicy", s.ClearInstancePortPolicy)
	prpc.Handle(p, "GetInstancePortPolicy", s.GetInstancePortPolicy)
	return p
}

// Debug is the service of the debug server. It registers whatever it is told to, for everybody.
func (s *Server) Debug() *prpc.Service {
	p := prpc.NewService("Debug", "Debug.")
	prpc.Handle(p, "RegisterCvm", s.DebugRegisterCvm)
	prpc.Handle(p, "Info", s.Info)
	prpc.Handle(p, "GetSyncData", s.GetSyncData)
	prpc.Handle(p, "GetProxyState", s.GetProxyState)
	return p
}

// MainHandler is everything that the main server answers: /prpc, /health, and X-App-Version on all of it. o.Identify
// must be ratls.IdentifyRequest, or no guest can register.
func (s *Server) MainHandler(o prpc.Options) http.Handler {
	service := s.cachedAcmeInfo(s.Gateway().Handler(o))
	return s.WithVersion(router{mounts: []mount{{"/prpc", service}}, pages: map[string]http.Handler{"/health": Health()}})
}

// AdminHandler is everything that the admin server answers, before authentication is put in front of it: the Admin
// service at / and /prpc, /health, and pages by exact path, such as the dashboard's. o.Observe is called besides the
// server's own accounting.
func (s *Server) AdminHandler(o prpc.Options, pages map[string]http.Handler) http.Handler {
	theirs := o.Observe
	o.Observe = func(method string, code int, d time.Duration) {
		s.metrics.observeAdmin(method, code, d)
		if theirs != nil {
			theirs(method, code, d)
		}
	}
	service := s.Admin().Handler(o)
	all := map[string]http.Handler{"/health": Health()}
	for path, h := range pages {
		all[path] = h
	}
	return router{mounts: []mount{{"/prpc", service}, {"", service}}, pages: all}
}

// DebugHandler is everything that the debug server answers: /prpc and /health.
func (s *Server) DebugHandler(o prpc.Options) http.Handler {
	return router{mounts: []mount{{"/prpc", s.Debug().Handler(o)}}, pages: map[string]http.Handler{"/health": Health()}}
}

type mount struct {
	prefix  string
	service http.Handler
}

// router is less than an http.ServeMux on purpose: no cleaning of paths, no redirects.
type router struct {
	mounts []mount
	pages  map[string]http.Handler
}

func (h router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if page, ok := h.pages[r.URL.Path]; ok {
		page.ServeHTTP(w, r)
		return
	}
	for _, m := range h.mounts {
		if strings.HasPrefix(r.URL.Path, m.prefix+"/") {
			http.StripPrefix(m.prefix, m.service).ServeHTTP(w, r)
			return
		}
	}
	prpc.NotFound(w, r)
}

// Health answers GET with 200 and the text OK, for as long as the server runs.
func Health() http.Handler {
	const body = "OK"
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			prpc.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		_, _ = w.Write([]byte(body)) // the client left
	})
}

// WithVersion puts X-App-Version on every answer of next: v<version> (git:<20 hex digits>).
func (s *Server) WithVersion(next http.Handler) http.Handler {
	value := fmt.Sprintf("v%s (git:%.20s)", s.d.Version, s.d.Revision)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", value)
		next.ServeHTTP(w, r)
	})
}
