package controlplane

import (
	"context"
	"net"

	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// hooks answers what the data plane asks.
type hooks struct{ g *Gateway }

var _ dataplane.Hooks = hooks{}

func (h hooks) CachedCustom(name string) (string, uint16, error, bool) {
	a, err, ok := h.g.txt.Cached(name)
	return a.ID, a.Port, err, ok
}

func (h hooks) ResolveCustom(ctx context.Context, name string) (string, uint16, error) {
	a, err := h.g.txt.Resolve(ctx, name)
	return a.ID, a.Port, err
}

func (h hooks) NeedPolicy(id string) { h.g.pol.need(id) }

func (h hooks) ServeBuiltin(svc hostname.Service, mode hostname.Mode, base *routing.Base, c net.Conn) {
	h.g.builtin.serve(svc, mode, base, c)
}

func (h hooks) Closed(r *dataplane.Record) { h.g.access.closed(r) }
