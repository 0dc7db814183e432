package controlplane

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// publishWindow is the least time between two snapshots: the first change of a burst is
// out at once, what follows is gathered. A snapshot a change would only serve the
// garbage collector.
const publishWindow = 10 * time.Millisecond

// router is the part of the data plane that routing needs.
type router interface {
	Snapshot() *routing.Snapshot
	SetSnapshot(*routing.Snapshot)
}

// tunnels is the part of the WireGuard device that mirrors the registry.
type tunnels interface {
	Upsert(peers ...wireguard.Peer) error
	Remove(keys ...wgtypes.Key)
	Handshakes() *wireguard.Table
}

// publisher mirrors the registry into routing snapshots and WireGuard peers. It is
// the only writer of snapshots.
type publisher struct {
	log    *slog.Logger
	reg    *registry.Registry
	dp     router
	wg     tunnels
	bases  func() []*routing.Base
	rebase chan struct{}
	keys   map[string]wgtypes.Key // of the peers handed to WireGuard, by instance
}

func newPublisher(log *slog.Logger, reg *registry.Registry, dp router, wg tunnels, bases func() []*routing.Base) *publisher {
	return &publisher{log: log, reg: reg, dp: dp, wg: wg, bases: bases, rebase: make(chan struct{}, 1), keys: map[string]wgtypes.Key{}}
}

// basesChanged asks for a look at the platform domains and their certificates.
func (p *publisher) basesChanged() {
	select {
	case p.rebase <- struct{}{}:
	default:
	}
}

// run publishes until ctx ends. The first snapshot is out before ready is closed.
func (p *publisher) run(ctx context.Context, ready chan<- struct{}) {
	feed := p.reg.Follow()
	defer feed.Close()
	p.publish(feed, true)
	close(ready)
	last := time.Now()
	for {
		rebase := false
		select {
		case <-ctx.Done():
			return
		case <-feed.C:
		case <-p.rebase:
			rebase = true
		}
		if d := publishWindow - time.Since(last); d > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(d):
			}
		}
		last = time.Now()
		select {
		case <-p.rebase:
			rebase = true
		default:
		}
		p.publish(feed, rebase)
	}
}

func (p *publisher) publish(feed *registry.Feed, rebase bool) {
	changed, removed, all := feed.Take()
	snap := p.dp.Snapshot()
	if all {
		have := make(map[string]bool, len(changed))
		for _, i := range changed {
			have[i.ID] = true
		}
		snap.Instances(func(i *routing.Instance) bool {
			if !have[i.ID] {
				removed = append(removed, i.ID)
			}
			return true
		})
	}
	if len(changed)+len(removed) > 0 {
		records := make([]routing.Record, 0, len(changed))
		for _, i := range changed {
			records = append(records, record(i))
		}
		snap = snap.With(records, removed)
		p.mirrorPeers(changed, removed)
		// A new instance starts with what the device already knows of its key.
		table := p.wg.Handshakes()
		for _, i := range changed {
			if k, ok := p.keys[i.ID]; ok {
				snap.Instance(i.ID).State.Handshake.Store(handshakeOf(table, k))
			}
		}
	}
	if rebase {
		snap = snap.WithBases(p.bases())
	}
	p.dp.SetSnapshot(snap)
}

func (p *publisher) mirrorPeers(changed []registry.Instance, removed []string) {
	var gone []wgtypes.Key
	for _, id := range removed {
		if k, ok := p.keys[id]; ok {
			gone = append(gone, k)
			delete(p.keys, id)
		}
	}
	if len(gone) > 0 {
		p.wg.Remove(gone...)
	}
	var peers []wireguard.Peer
	for _, i := range changed {
		k, err := wgtypes.ParseKey(i.PublicKey)
		if err != nil {
			p.log.Error("an instance has an unusable WireGuard key; it gets no tunnel", "instance", i.ID, "error", err)
			continue
		}
		if old, ok := p.keys[i.ID]; ok && old == k && i.IP == p.addr(i.ID) {
			continue // only the policy changed
		}
		p.keys[i.ID] = k
		peers = append(peers, wireguard.Peer{ID: i.ID, PublicKey: k, IP: i.IP})
	}
	if len(peers) > 0 {
		if err := p.wg.Upsert(peers...); err != nil {
			p.log.Error("WireGuard peers were not accepted", "error", err)
		}
	}
}

// addr is the address under which the instance is routed now.
func (p *publisher) addr(id string) netip.Addr {
	if i := p.dp.Snapshot().Instance(id); i != nil {
		return i.Addr
	}
	return netip.Addr{}
}

// handshakes copies a new table into the instances' states.
func (p *publisher) handshakes(t *wireguard.Table) {
	snap := p.dp.Snapshot()
	for _, i := range p.reg.List() {
		r := snap.Instance(i.ID)
		if r == nil {
			continue
		}
		if k, err := wgtypes.ParseKey(i.PublicKey); err == nil {
			r.State.Handshake.Store(handshakeOf(t, k))
		}
	}
}

func handshakeOf(t *wireguard.Table, k wgtypes.Key) int64 {
	s, ok := t.Peers[k]
	if !ok || s.LastHandshake.IsZero() {
		return 0
	}
	return s.LastHandshake.Unix()
}

func record(i registry.Instance) routing.Record {
	r := routing.Record{ID: i.ID, AppID: i.AppID, Addr: i.IP}
	if p, _ := i.Effective(); p != nil {
		r.Policy = routing.Policy{Known: true, Restrict: p.Restrict, Ports: make(map[uint16]bool, len(p.Ports))}
		for port, f := range p.Ports {
			r.Policy.Ports[port] = f.PP
		}
	}
	return r
}
