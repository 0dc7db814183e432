package wireguard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// How changes reach the device. Callers edit the wanted set under mu and add
// the keys they touched to the pending batch; one goroutine takes the batch at
// most every BatchWindow, compares wanted and held for just these keys and
// sends the difference. The first change after a quiet window goes out at once,
// so a lone registration does not wait. When a request fails, what the device
// holds is unknown: the next attempt reads all of it and sends the difference.

// batch is a set of changed keys that is applied together.
type batch struct {
	keys map[wgtypes.Key]struct{}
	done chan struct{} // closed when it was applied or failed
	err  error         // valid after done
}

func (b *batch) finish(err error) {
	b.err = err
	close(b.done)
}

// wait returns the outcome of b, or ctx's error if that comes first.
func (b *batch) wait(ctx context.Context) error {
	select {
	case <-b.done:
		return b.err
	default:
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return fmt.Errorf("wait for WireGuard to apply a change: %w", context.Cause(ctx))
	}
}

// touch adds keys to the pending batch, with mu held.
func (d *Device) touch(keys ...wgtypes.Key) *batch {
	if d.pending == nil {
		d.pending = &batch{keys: make(map[wgtypes.Key]struct{}), done: make(chan struct{})}
	}
	for _, k := range keys {
		d.pending.keys[k] = struct{}{}
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
	return d.pending
}

// Sync makes peers the whole wanted set and waits for one attempt to bring the
// device there: unknown peers are removed, missing ones are added with their
// last endpoint. Invalid and conflicting peers are left out (of two with one
// key or address the one with the smaller id stays) and reported in the error,
// which wraps ErrInvalidPeer; a device error is repaired in the background.
func (d *Device) Sync(ctx context.Context, peers []Peer) error {
	sorted := slices.Clone(peers)
	slices.SortStableFunc(sorted, func(a, b Peer) int { return cmp.Compare(a.ID, b.ID) })
	set := newPeerSet(len(sorted))
	var errs []error
	for _, p := range sorted {
		p, err := d.checkPeer(p)
		if err == nil {
			if _, dup := set.byID[p.ID]; dup {
				err = fmt.Errorf("%w: instance %q occurs twice", ErrInvalidPeer, p.ID)
			} else if id, what, found := set.conflict(p); found {
				err = fmt.Errorf("%w: instance %q: its %s belongs to instance %q", ErrInvalidPeer, p.ID, what, id)
			}
		}
		if err != nil {
			d.invalid(err)
			errs = append(errs, err)
			continue
		}
		set.put(p)
	}

	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return ErrClosed
	}
	d.want = set
	d.synced = true
	d.reconcile = true
	b := d.touch()
	d.mu.Unlock()
	d.markFileDirty()
	return errors.Join(append(errs, b.wait(ctx))...)
}

// Upsert adds or changes peers, without waiting for the device. An instance
// whose key changed loses the old one. Peers of one call may exchange addresses
// or keys. In a conflict with any other instance the newcomer wins: the
// registry has decided, and its events may arrive out of order. Invalid peers
// are skipped and reported in the error.
func (d *Device) Upsert(peers ...Peer) error {
	_, err := d.upsert(peers...)
	return err
}

// Apply is Upsert of one peer that returns when the device was asked to take
// it: the guest starts its handshake as soon as it has its answer. A device
// error is repaired in the background, so callers need not retry. On an
// interface that is not WireGuard it fails at once with ErrNotWireGuard.
func (d *Device) Apply(ctx context.Context, p Peer) error {
	b, err := d.upsert(p)
	if err != nil || b == nil {
		return err
	}
	d.mu.Lock()
	err = d.lastErr
	d.mu.Unlock()
	if errors.Is(err, ErrNotWireGuard) {
		return err
	}
	return b.wait(ctx)
}

// upsert returns the batch that will carry the last of peers, nil if the device
// has it already.
func (d *Device) upsert(peers ...Peer) (*batch, error) {
	var errs []error
	valid := make([]Peer, 0, len(peers))
	for _, p := range peers {
		p, err := d.checkPeer(p)
		if err != nil {
			d.invalid(err)
			errs = append(errs, err)
			continue
		}
		valid = append(valid, p)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, ErrClosed
	}
	var b *batch
	var keys []wgtypes.Key
	changed := valid[:0]
	for _, p := range valid {
		if d.want.byID[p.ID] == p {
			b = d.carrier(p)
			continue
		}
		changed = append(changed, p)
	}
	// All old entries go first, so that what is left in the way of a new one
	// belongs to somebody who is not in this call.
	for _, p := range changed {
		if old, ok := d.want.byID[p.ID]; ok {
			d.want.drop(p.ID)
			keys = append(keys, old.PublicKey)
		}
	}
	for _, p := range changed {
		for {
			id, what, found := d.want.conflict(p)
			if !found {
				break
			}
			d.log.Warn("a WireGuard peer lost its place to another instance",
				slog.String("instance", id), slog.String("to", p.ID), slog.String("both_have", what), slog.String("ip", p.IP.String()))
			d.met.evicted.Inc()
			keys = append(keys, d.want.byID[id].PublicKey)
			d.want.drop(id)
		}
		d.want.put(p)
		keys = append(keys, p.PublicKey)
	}
	if len(keys) > 0 {
		b = d.touch(keys...)
		d.markFileDirty()
	}
	return b, errors.Join(errs...)
}

// carrier finds the batch in which an unchanged peer is under way.
func (d *Device) carrier(p Peer) *batch {
	for _, b := range []*batch{d.pending, d.inflight} {
		if b == nil {
			continue
		}
		if _, ok := b.keys[p.PublicKey]; ok {
			return b
		}
	}
	if d.have[p.PublicKey].ip == p.IP && !d.reconcile {
		return nil
	}
	return d.touch(p.PublicKey)
}

// Remove takes peers off by key, without waiting. Unknown keys are ignored.
func (d *Device) Remove(keys ...wgtypes.Key) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	changed := false
	for _, k := range keys {
		if id, ok := d.want.byKey[k]; ok {
			d.want.drop(id)
			d.touch(k)
			changed = true
		}
	}
	if changed {
		d.markFileDirty()
	}
}

func (d *Device) invalid(err error) {
	d.met.invalid.Inc()
	d.log.Warn("a WireGuard peer was refused", slog.String("error", err.Error()))
}

// runApply applies batches until ctx ends.
func (d *Device) runApply(ctx context.Context) {
	var last time.Time // of the previous attempt
	var retry <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
			if retry != nil {
				continue // the attempt that is due anyway takes it along
			}
		case <-retry:
			retry = nil
		}
		if wait := d.opt.BatchWindow - time.Since(last); !last.IsZero() && wait > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
		err := d.flush()
		last = time.Now()
		if err != nil {
			retry = time.After(d.opt.RetryDelay)
		}
	}
}

// flush makes one reconfiguration of whatever is due.
func (d *Device) flush() error {
	d.mu.Lock()
	if d.closed || (d.pending == nil && !d.reconcile) {
		d.mu.Unlock()
		return nil
	}
	b := d.pending
	d.pending, d.inflight = nil, b
	d.gen++
	d.flushing = true
	gen, full, be := d.gen, d.reconcile, d.be
	// Changes asked for during the attempt stay for the next one.
	d.reconcile = false
	var c change
	if !full && b != nil {
		c = d.difference(b)
	}
	d.mu.Unlock()

	var err error
	switch {
	case full:
		err = d.applyAll(be, gen)
	case !c.empty():
		if err = be.apply(c); err == nil {
			d.recordApplied(c, gen)
		}
	}
	if full || !c.empty() || err != nil {
		d.met.reconfigured.Inc()
	}

	d.mu.Lock()
	d.inflight, d.flushing = nil, false
	d.lastErr = err
	d.failing = err != nil
	if err != nil {
		d.reconcile = true
	}
	d.mu.Unlock()
	if b != nil {
		b.finish(err)
	}
	if err != nil {
		d.met.reconfigureFailures.Inc()
		hint := "traffic of known peers goes on; retried every " + d.opt.RetryDelay.String()
		if errors.Is(err, ErrNotWireGuard) {
			hint = "delete the interface and restart to have it created, or give its name to a WireGuard interface"
		}
		d.applyLog.failed(err, hint)
		return err
	}
	d.applyLog.ok()
	return nil
}

// difference compares wanted and held for the keys of b, with mu held.
// Removals come first, so that an address is free before it is given away.
func (d *Device) difference(b *batch) change {
	var removals, upserts []peerChange
	heard := d.table.Load().Peers
	for k := range b.keys {
		have, held := d.have[k]
		ip, wanted := d.want.want(k)
		if !wanted {
			if held {
				removals = append(removals, peerChange{key: k, remove: true})
			}
			continue
		}
		pc := peerChange{key: k, ip: ip, keepalive: have.keepalive}
		if held {
			pc.keepalive = pc.keepalive || heard[k].Endpoint.IsValid()
		} else {
			pc.endpoint = d.endpointFor(k)
			pc.keepalive = pc.endpoint.IsValid()
		}
		if !held || have.ip != ip || have.keepalive != pc.keepalive {
			upserts = append(upserts, pc)
		}
	}
	return change{peers: append(removals, upserts...)}
}

// recordApplied notes that the device now holds c.
func (d *Device) recordApplied(c change, gen uint64) {
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range c.peers {
		if p.remove {
			delete(d.have, p.key)
			delete(d.young, p.key)
			d.gone[p.key] = gen
			continue
		}
		if _, held := d.have[p.key]; !held {
			d.addYoung(p.key, now)
		}
		d.have[p.key] = applied{ip: p.ip, keepalive: p.keepalive, gen: gen}
	}
}

// applyAll reads the device and makes it equal to the wanted set.
func (d *Device) applyAll(be backend, gen uint64) error {
	be, st, err := d.dumpOrReopen(be)
	if err != nil {
		return err
	}
	d.mu.Lock()
	want := make(map[wgtypes.Key]netip.Addr, len(d.want.byID))
	for _, p := range d.want.byID {
		want[p.PublicKey] = p.IP
	}
	var c change
	if own := d.ownConfig(); d.mode != None {
		if own.privateKey != nil && *own.privateKey != st.privateKey {
			c.privateKey = own.privateKey
		}
		if *own.listenPort != st.listenPort && *own.listenPort != 0 { // 0: whichever it has
			c.listenPort = own.listenPort
		}
	}
	onDevice := make(map[wgtypes.Key]*devPeer, len(st.peers))
	for i := range st.peers {
		p := &st.peers[i]
		onDevice[p.key] = p
		if _, ok := want[p.key]; !ok && d.synced {
			c.peers = append(c.peers, peerChange{key: p.key, remove: true})
		}
	}
	now := time.Now()
	have := make(map[wgtypes.Key]applied, len(want))
	var add []peerChange
	for k, ip := range want {
		found, held := onDevice[k]
		pc := peerChange{key: k, ip: ip}
		if !held || !found.endpoint.IsValid() {
			pc.endpoint = d.endpointFor(k)
		}
		pc.keepalive = pc.endpoint.IsValid() || held && (found.endpoint.IsValid() || found.keepalive == keepalive)
		have[k] = applied{ip: ip, keepalive: pc.keepalive, gen: gen}
		if !held || !found.holds(ip) || pc.endpoint.IsValid() {
			add = append(add, pc)
		}
	}
	// Instances that were last heard of come first: theirs are the tunnels
	// somebody waits for.
	slices.SortFunc(add, func(a, b peerChange) int {
		return d.endpoints[b.key].LastHandshake.Compare(d.endpoints[a.key].LastHandshake)
	})
	c.peers = append(c.peers, add...)
	d.mu.Unlock()

	if !c.empty() {
		if err := be.apply(c); err != nil {
			return err
		}
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	for k := range want {
		if _, ok := onDevice[k]; !ok {
			d.addYoung(k, now)
		}
	}
	d.have = have
	for k := range d.young {
		if _, ok := want[k]; !ok {
			delete(d.young, k)
		}
	}
	for _, p := range c.peers {
		if p.remove {
			d.gone[p.key] = gen
		}
	}
	return nil
}

// dumpOrReopen reads the device. If an interface made by this process is gone,
// because somebody deleted it, it is made again.
func (d *Device) dumpOrReopen(be backend) (backend, *devState, error) {
	st, err := be.dump()
	if err == nil || !(errors.Is(err, errStopped) || errors.Is(err, ErrNotWireGuard)) {
		d.noteDump(st, err)
		return be, st, err
	}
	info, lerr := d.sys.links.get(d.opt.Interface)
	d.mu.Lock()
	adopted := d.adopted
	d.up = lerr == nil && info.up
	d.mu.Unlock()
	switch {
	case adopted && errors.Is(lerr, errNoLink):
		return be, nil, fmt.Errorf("%w: %s: the adopted interface is gone", ErrNotWireGuard, d.opt.Interface)
	case adopted:
		d.noteDump(st, err)
		return be, nil, err
	case lerr == nil:
		// Somebody put another interface in place of ours.
		be.close()
		d.adopt(info)
	default:
		d.log.Warn("the WireGuard interface is gone: creating it again")
		be.close()
		if err := d.create(); err != nil {
			return be, nil, err
		}
	}
	d.mu.Lock()
	be = d.be
	d.mu.Unlock()
	st, err = be.dump()
	return be, st, err
}

// noteDump keeps mode and reason of an adopted interface current.
func (d *Device) noteDump(st *devState, err error) {
	d.mu.Lock()
	adopted := d.adopted
	d.mu.Unlock()
	if !adopted {
		return
	}
	if info, lerr := d.sys.links.get(d.opt.Interface); lerr == nil {
		d.noteAdopted(info, st, err)
	}
}

// endpointFor returns the remembered endpoint of a peer, if it is fresh enough
// to be given back, with mu held.
func (d *Device) endpointFor(k wgtypes.Key) netip.AddrPort {
	e, ok := d.endpoints[k]
	if !ok || time.Since(e.LastHandshake) > d.opt.EndpointMaxAge {
		return netip.AddrPort{}
	}
	return e.Endpoint
}

// addYoung notes a peer whose first handshake is awaited, with mu held.
func (d *Device) addYoung(k wgtypes.Key, now time.Time) {
	first := len(d.young) == 0
	d.young[k] = now
	if first {
		select {
		case d.refreshSoon <- struct{}{}:
		default:
		}
	}
}
