package dataplane

import (
	"hash/maphash"
	"net/netip"
	"sync/atomic"
)

// halfOpen bounds the connections that have not sent a complete hello, in total and
// from one source (gateway spec 14, row 10). All loops share it without a lock.
//
// Sources share sourceSlots counters through a keyed hash: nothing is allocated for a
// source, and one that meets another in a slot is at worst held to the limit together
// with it.
type halfOpen struct {
	max, perSource int64 // 0 = unlimited
	total          atomic.Int64
	seed           maphash.Seed
	sources        []atomic.Int64
}

const sourceSlots = 1 << 16

func newHalfOpen(max, perSource int64) *halfOpen {
	h := &halfOpen{max: max, perSource: perSource, seed: maphash.MakeSeed()}
	if perSource > 0 {
		h.sources = make([]atomic.Int64, sourceSlots)
	}
	return h
}

// slot is nil where sources are not limited. An IPv6 source is its /64.
func (h *halfOpen) slot(a netip.Addr) *atomic.Int64 {
	if h.sources == nil {
		return nil
	}
	b := a.As16()
	key := b[:]
	if a.Is6() && !a.Is4In6() {
		key = b[:8]
	}
	return &h.sources[maphash.Bytes(h.seed, key)%sourceSlots]
}

// enter counts a connection, or reports that a limit forbids it.
func (h *halfOpen) enter(a netip.Addr) bool {
	if !takeBelow(&h.total, h.max) {
		return false
	}
	if s := h.slot(a); s != nil && !takeBelow(s, h.perSource) {
		h.total.Add(-1)
		return false
	}
	return true
}

// leave undoes a successful enter.
func (h *halfOpen) leave(a netip.Addr) {
	h.total.Add(-1)
	if s := h.slot(a); s != nil {
		s.Add(-1)
	}
}

// takeBelow adds one to n unless it has reached max; 0 is no limit. Adding first and
// taking back would refuse others in between.
func takeBelow(n *atomic.Int64, max int64) bool {
	for {
		v := n.Load()
		if max > 0 && v >= max {
			return false
		}
		if n.CompareAndSwap(v, v+1) {
			return true
		}
	}
}
