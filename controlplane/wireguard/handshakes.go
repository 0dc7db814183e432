package wireguard

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// youngFor is how long a new instance's first handshake is awaited with fast
// refreshes.
const youngFor = time.Minute

// refreshShare bounds the time spent on fast refreshes to one part in so many.
const refreshShare = 20

// Table is one reading of all peers. It is immutable.
type Table struct {
	Taken time.Time // zero: nothing was read yet
	Peers map[wgtypes.Key]PeerState
}

// PeerState is what the device knows of a peer.
type PeerState struct {
	LastHandshake time.Time // zero: never
	RxBytes       uint64    // since the peer was added
	TxBytes       uint64
	Endpoint      netip.AddrPort // invalid: none
	// LastRx is when a reading first saw the current RxBytes, or the last
	// handshake if that was before the first reading. A live tunnel advances it
	// at least every 25 s, so it tells a dead instance long before the
	// handshake ages; it may order candidates but not exclude them.
	LastRx time.Time
}

// Age returns how long ago key's last handshake was, 0 if the clock says it is
// yet to come; false if there has been none.
func (t *Table) Age(key wgtypes.Key, now time.Time) (time.Duration, bool) {
	p, ok := t.Peers[key]
	if !ok || p.LastHandshake.IsZero() {
		return 0, false
	}
	return max(0, now.Sub(p.LastHandshake)), true
}

// Handshakes returns the latest table. It never blocks and never returns nil. A
// table whose refresh keeps failing stays in use and shows its age in Taken.
func (d *Device) Handshakes() *Table { return d.table.Load() }

// Refresh reads the device now. Use it once after Sync, so that routing starts
// with a table.
func (d *Device) Refresh(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return d.refresh()
}

// runRefresh keeps the table current until ctx ends.
func (d *Device) runRefresh(ctx context.Context) {
	var took time.Duration
	last := time.Now()
	for {
		d.mu.Lock()
		young := len(d.young) > 0
		d.mu.Unlock()
		every := d.opt.RefreshInterval
		if young {
			every = min(every, max(d.opt.FastRefresh, refreshShare*took))
		}
		timer := time.NewTimer(time.Until(last.Add(every)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-d.refreshSoon:
			timer.Stop()
			continue // with the shorter interval
		case <-timer.C:
		}
		last = time.Now()
		d.refresh()
		took = time.Since(last)
	}
}

// refresh reads the device and tells whoever listens.
func (d *Device) refresh() error {
	d.refreshMu.Lock()
	defer d.refreshMu.Unlock()
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	if closed {
		return ErrClosed // the backend may be, too
	}
	t, err := d.read()
	if err != nil {
		return err
	}
	d.saveEndpoints(false)
	if d.opt.OnRefresh != nil {
		d.opt.OnRefresh(t)
	}
	return nil
}

// read reads the device, publishes the table and looks for drift. refreshMu is
// held.
func (d *Device) read() (*Table, error) {
	d.mu.Lock()
	be, gen, mode := d.be, d.gen, d.mode
	if d.flushing {
		gen-- // what is under way may or may not show in the dump
	}
	d.mu.Unlock()
	st, err := be.dump()

	if mode != None {
		info, lerr := d.sys.links.get(d.opt.Interface)
		if lerr == nil {
			d.met.link(info)
		}
		d.mu.Lock()
		d.up = lerr == nil && info.up
		d.mu.Unlock()
	}
	if err != nil {
		d.met.refreshFailures.Inc()
		if !errors.Is(err, ErrNotWireGuard) { // flush reports that
			d.refreshLog.failed(err, "the last known handshakes stay in use")
		}
		d.repair()
		return nil, err
	}
	d.refreshLog.ok()

	t := d.newTable(st)
	d.table.Store(t)

	d.mu.Lock()
	for k, since := range d.young {
		if p := t.Peers[k]; !p.LastHandshake.IsZero() || t.Taken.Sub(since) > youngFor {
			delete(d.young, k)
		}
	}
	d.noteEndpoints(t)
	d.startKeepalives(st)
	drifted := d.drift(st, gen)
	d.mu.Unlock()
	if drifted != "" {
		d.log.Warn("the WireGuard interface was changed by somebody else: restoring it", slog.String("difference", drifted))
		d.met.repaired.Inc()
		d.repair()
	}
	return t, nil
}

// startKeepalives asks for keepalives to peers that called in, with mu held.
func (d *Device) startKeepalives(st *devState) {
	if d.reconcile {
		return // which sees to it
	}
	for i := range st.peers {
		p := &st.peers[i]
		if have, ok := d.have[p.key]; ok && !have.keepalive && p.endpoint.IsValid() {
			d.touch(p.key)
		}
	}
}

// newTable turns a dump into the table that follows the current one, and
// counts the bytes since.
func (d *Device) newTable(st *devState) *Table {
	old := d.table.Load()
	now := time.Now()
	t := &Table{Taken: now, Peers: make(map[wgtypes.Key]PeerState, len(st.peers))}
	var rx, tx uint64
	for i := range st.peers {
		p := &st.peers[i]
		s := PeerState{LastHandshake: p.handshake, RxBytes: p.rx, TxBytes: p.tx, Endpoint: p.endpoint}
		before, known := old.Peers[p.key]
		switch {
		case !known:
			s.LastRx = p.handshake
		case p.rx != before.RxBytes:
			s.LastRx = now
		default:
			s.LastRx = before.LastRx
		}
		// A peer that was removed and added again counts from zero.
		if p.rx >= before.RxBytes && p.tx >= before.TxBytes {
			rx += p.rx - before.RxBytes
			tx += p.tx - before.TxBytes
		} else {
			rx += p.rx
			tx += p.tx
		}
		t.Peers[p.key] = s
	}
	d.met.traffic(len(st.peers), rx, tx)
	return t
}

// repair asks for a full comparison.
func (d *Device) repair() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || !d.synced || d.failing {
		return // not yet ours to change, or being retried already
	}
	d.reconcile = true
	d.touch()
}

// drift compares a dump that began at generation gen with what the device
// should hold, and names one difference. Whatever was reconfigured meanwhile is
// left out. mu is held.
func (d *Device) drift(st *devState, gen uint64) string {
	defer func() {
		for k, g := range d.gone {
			if g <= gen {
				delete(d.gone, k)
			}
		}
	}()
	if !d.synced || d.reconcile || d.mode == None {
		return ""
	}
	if d.opt.PrivateKey != zeroKey && st.privateKey != d.opt.PrivateKey {
		return "private key"
	}
	if st.listenPort != d.opt.ListenPort && d.opt.ListenPort != 0 {
		return "listen port"
	}
	seen := 0
	for i := range st.peers {
		p := &st.peers[i]
		have, ok := d.have[p.key]
		if !ok {
			if g, removed := d.gone[p.key]; (!removed || g <= gen) && !d.moving(p.key) {
				return "unknown peer " + p.key.String()
			}
			continue
		}
		seen++
		if !p.holds(have.ip) && have.gen <= gen && !d.moving(p.key) {
			return "settings of peer " + p.key.String()
		}
	}
	if seen == len(d.have) {
		return ""
	}
	onDevice := make(map[wgtypes.Key]struct{}, len(st.peers))
	for i := range st.peers {
		onDevice[st.peers[i].key] = struct{}{}
	}
	for k, have := range d.have {
		if _, ok := onDevice[k]; !ok && have.gen <= gen && !d.moving(k) {
			return "missing peer " + k.String()
		}
	}
	return ""
}

// moving reports whether key is in a batch that is not finished, with mu held.
func (d *Device) moving(key wgtypes.Key) bool {
	for _, b := range []*batch{d.pending, d.inflight} {
		if b != nil {
			if _, ok := b.keys[key]; ok {
				return true
			}
		}
	}
	return false
}
