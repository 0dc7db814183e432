package controlplane

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"github.com/dstack-gw/dstack-gw/controlplane/explain"
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
	return map[string]http.Handler{explain.Path: e.Handler()}, nil
}
