package controlplane

import (
	"context"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/store"
)

// background starts what runs beside the servers until ctx ends.
func (g *Gateway) background(ctx context.Context) {
	g.bg.Go(func() { g.access.run(ctx) })
	g.bg.Go(func() { _ = g.tickets.Run(ctx) })
	g.bg.Go(func() { g.identity.Watch(ctx, 0) })
	if g.cfg.Core.Proxy.StaticCert() {
		g.watchStatic(ctx)
	}
	if g.cfg.Core.Recycle.Enabled {
		g.bg.Go(func() { g.recycle(ctx) })
	}
	g.bg.Go(func() { g.followStore(ctx) })
}

// followStore adopts what other nodes, or this one's RPCs, wrote to the store.
func (g *Gateway) followStore(ctx context.Context) {
	w := g.store.Watch(store.PrefixInstances, store.PrefixCerts)
	defer w.Close()
	for {
		events, err := w.Next(ctx)
		if err != nil {
			return
		}
		certs := false
		for _, e := range events {
			switch e.Kind {
			case store.KindInstance:
				g.adopt(e.ID)
			case store.KindCertData:
				certs = true
			case store.KindZTDomain:
				g.pub.basesChanged()
			}
		}
		if certs {
			_ = g.reloadCerts() // says itself what was rejected
			g.pub.basesChanged()
		}
	}
}

// adopt makes the registry's record of an instance what the store has.
func (g *Gateway) adopt(id string) {
	if g.rpc.Changing(id) {
		return // a younger record is on its way; its own event follows
	}
	unlock := g.rpc.LockInstance(id)
	defer unlock()
	want, ok := g.store.Instance(id)
	if !ok {
		if _, had := g.reg.Remove(id); had {
			g.log.Info("an instance was removed from the store", "instance", id)
		}
		return
	}
	have, known := g.reg.Instance(id)
	if known && have.Equal(want) {
		return
	}
	if _, err := g.reg.Apply(want); err != nil {
		g.log.Error("a stored registration is not used", "instance", id, "error", err)
	}
}

// recycle removes instances that nobody has heard of for a long time (gateway spec 6.6).
func (g *Gateway) recycle(ctx context.Context) {
	r := &g.cfg.Core.Recycle
	tick := time.NewTicker(r.Interval.Std())
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := g.wg.Refresh(ctx); err != nil {
			g.log.Warn("no instances are recycled: WireGuard handshakes could not be read", "error", err)
			continue
		}
		table := g.wg.Handshakes()
		gone := g.reg.Recycle(func(id string) time.Time {
			i, ok := g.reg.Instance(id)
			if !ok {
				return time.Time{}
			}
			k, err := wgtypes.ParseKey(i.PublicKey)
			if err != nil {
				return time.Time{}
			}
			return table.Peers[k].LastHandshake
		}, r.Timeout.Std(), g.started)
		for _, i := range gone {
			g.forget(ctx, i.ID)
		}
	}
}

func (g *Gateway) forget(ctx context.Context, id string) {
	unlock := g.rpc.LockInstance(id)
	defer unlock()
	if _, again := g.reg.Instance(id); again {
		return // it registered in the meantime
	}
	g.pol.forget(id)
	g.log.Info("recycled an instance without a handshake", "instance", id, "timeout", g.cfg.Core.Recycle.Timeout.String())
	if d, err := g.store.DeleteInstance(ctx, id); err != nil {
		g.log.Error("a recycled instance could not be deleted from the store; it comes back at the next start", "instance", id, "durability", d.String(), "error", err)
	}
}
