package controlplane

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"github.com/dstack-gw/dstack-gw/controlplane/agent"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor"
	"github.com/dstack-gw/dstack-gw/controlplane/explain"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// tools are the pages that the command line tools ask for.
func (g *Gateway) tools() (map[string]http.Handler, error) {
	o := g.dataplaneOptions()
	p := &g.cfg.Core.Proxy
	dns := &explain.DNS{Servers: p.AppAddressDNSServers}
	d := explain.Deps{
		Snapshot: g.dp.Snapshot, Mono: g.dp.Mono, Registry: g.reg, WireGuard: g.wg, Resolver: g.txt,
		LookupTXT: dns.LookupTXT, Prefix: p.AppAddressNSPrefix, Compat: p.AppAddressNSCompat,
		LookupHost: func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		},
		Listeners: o.Listen, InboundPROXY: o.InboundPROXY, TrustedSources: o.TrustedSources,
		Selection: o.Selection, MaxPerApp: o.MaxPerApp, Localhost: o.LocalhostBackend, PolicyHold: o.PolicyHold, Connect: o.Connect,
		PolicyFetch: g.pol.lastFailure,
	}
	if at, err := netip.ParseAddrPort(g.cfg.Core.WG.Endpoint); err == nil {
		d.PublicAddrs = []netip.Addr{at.Addr()}
	}
	e, err := explain.New(d)
	if err != nil {
		return nil, fmt.Errorf("explain: %w", err)
	}
	return map[string]http.Handler{explain.Path: e.Handler(), doctor.Path: doctor.Handler(g.patient(o.Selection))}, nil
}

// patient is what doctor looks at in this process.
func (g *Gateway) patient(sel routing.Selection) doctor.Gateway {
	return doctor.Gateway{
		Version: g.opt.Version, Started: g.started, Config: g.cfg, Host: doctor.NewHost(agent.Address(g.opt.Env("DSTACK_AGENT_ADDRESS"), exists)),
		WireGuard: g.wg.Status, Store: g.store.Status, Snapshot: g.dp.Snapshot, Mono: g.dp.Mono, Selection: sel,
		Connections: g.dp.Connections,
		CertificateNote: func(string) (string, bool) {
			return "automatic issuance is not part of this release: store a certificate, or use the static one (core.proxy.base_domain, cert_chain, cert_key)", false
		},
		Listeners: func() []doctor.Listener {
			list := []doctor.Listener{}
			for _, at := range g.dataplaneOptions().Listen {
				list = append(list, doctor.Listener{Name: "proxy", Address: at.String()})
			}
			for _, s := range g.servers {
				list = append(list, doctor.Listener{Name: s.name, Address: s.lis.Addr().String()})
			}
			return list
		},
		PolicyFetches:    g.pol.state,
		AccessLogDropped: g.access.dropped.Load,
		Panics:           g.dp.Panics,
		Capabilities: func() []doctor.Capability {
			var list []doctor.Capability
			for _, a := range g.accelFacts() {
				list = append(list, doctor.Capability{Name: a.feature + " (" + a.mode + ")", On: a.mode != "off", Reason: a.reason, Wanted: a.feature == "ktls" && g.cfg.Core.Proxy.KTLS.Enabled})
			}
			return list
		},
	}
}
