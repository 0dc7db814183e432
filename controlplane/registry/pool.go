package registry

import (
	"cmp"
	"container/heap"
	"encoding/binary"
	"net/netip"
	"slices"
)

// pool gives out the lowest free host address of the client range, in amortised O(log n) whatever the size of the
// range; memory follows the addresses in use.
//
// Invariant: every free host address below next is in freed. Entries of freed may be claimed by now; they are dropped
// when they surface.
type pool struct {
	rng         netip.Prefix
	first, last uint64     // host addresses of the range, inclusive; first > last when there are none
	blocked     []interval // sorted, disjoint: never given out
	next        uint64
	freed       addrHeap
	inFreed     map[uint32]struct{}
	// claims counts the records that name an address. More than one is a conflict that was decided elsewhere; the
	// address is free again when the last one lets go.
	claims map[uint32]int
}

type interval struct{ from, to uint64 }

func toU32(a netip.Addr) uint32 { b := a.As4(); return binary.BigEndian.Uint32(b[:]) }
func fromU32(v uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return netip.AddrFrom4(b)
}

// span returns the first and last address of a prefix.
func span(p netip.Prefix) (lo, hi uint64) {
	lo = uint64(toU32(p.Masked().Addr()))
	return lo, lo + 1<<(32-p.Bits()) - 1
}

func newPool(cfg Config) *pool {
	p := &pool{rng: cfg.ClientRange.Masked()}
	p.first, p.last = span(p.rng)
	if p.rng.Bits() <= 30 {
		p.first, p.last = p.first+1, p.last-1
	}
	_, broadcast := span(cfg.Network)
	own := uint64(toU32(cfg.Network.Addr()))
	p.blocked = []interval{{own, own}, {broadcast, broadcast}}
	for _, r := range append(notUnicast(), cfg.Reserved...) {
		lo, hi := span(r)
		p.blocked = append(p.blocked, interval{lo, hi})
	}
	slices.SortFunc(p.blocked, func(a, b interval) int { return cmp.Compare(a.from, b.from) })
	merged := p.blocked[:1]
	for _, iv := range p.blocked[1:] {
		if top := &merged[len(merged)-1]; iv.from <= top.to+1 {
			top.to = max(top.to, iv.to)
		} else {
			merged = append(merged, iv)
		}
	}
	p.blocked = merged
	p.reset()
	return p
}

func (p *pool) reset() {
	p.next = p.first
	p.freed = nil
	p.inFreed = make(map[uint32]struct{})
	p.claims = make(map[uint32]int)
}

// blockedAt returns the blocked interval that contains v.
func (p *pool) blockedAt(v uint64) (interval, bool) {
	i, found := slices.BinarySearchFunc(p.blocked, v, func(iv interval, v uint64) int { return cmp.Compare(iv.from, v) })
	if !found {
		i--
	}
	if i >= 0 && v <= p.blocked[i].to {
		return p.blocked[i], true
	}
	return interval{}, false
}

// valid is the "valid IP" rule of gateway spec 3.2.
func (p *pool) valid(a netip.Addr) bool {
	if !a.Is4() || !p.rng.Contains(a) {
		return false
	}
	_, blocked := p.blockedAt(uint64(toU32(a)))
	return !blocked
}

// lowest returns the lowest free address without claiming it.
func (p *pool) lowest() (netip.Addr, bool) {
	for p.freed.Len() > 0 {
		if v := p.freed[0]; p.claims[v] == 0 {
			return fromU32(v), true
		}
		delete(p.inFreed, heap.Pop(&p.freed).(uint32))
	}
	for p.next <= p.last {
		if iv, blocked := p.blockedAt(p.next); blocked {
			p.next = iv.to + 1
		} else if v := uint32(p.next); p.claims[v] == 0 {
			return fromU32(v), true
		} else {
			p.next++
		}
	}
	return netip.Addr{}, false
}

// claim notes that a record names a; addresses outside the range are none of the pool's business.
func (p *pool) claim(a netip.Addr) {
	if p.rng.Contains(a) {
		p.claims[toU32(a)]++
	}
}

// contested reports whether several records name a.
func (p *pool) contested(a netip.Addr) bool { return p.rng.Contains(a) && p.claims[toU32(a)] > 1 }

func (p *pool) release(a netip.Addr) {
	if !p.rng.Contains(a) {
		return
	}
	v := toU32(a)
	if p.claims[v]--; p.claims[v] > 0 {
		return
	}
	delete(p.claims, v)
	if uint64(v) < p.first || uint64(v) >= p.next {
		return
	}
	if _, blocked := p.blockedAt(uint64(v)); blocked {
		return
	}
	if _, queued := p.inFreed[v]; !queued {
		p.inFreed[v] = struct{}{}
		heap.Push(&p.freed, v)
	}
}

// size returns how many addresses the pool can give out altogether.
func (p *pool) size() uint64 {
	if p.first > p.last {
		return 0
	}
	n := p.last - p.first + 1
	for _, iv := range p.blocked {
		if lo, hi := max(iv.from, p.first), min(iv.to, p.last); lo <= hi {
			n -= hi - lo + 1
		}
	}
	return n
}

// addrHeap is a min-heap for container/heap.
type addrHeap []uint32

func (h addrHeap) Len() int           { return len(h) }
func (h addrHeap) Less(i, j int) bool { return h[i] < h[j] }
func (h addrHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *addrHeap) Push(x any)        { *h = append(*h, x.(uint32)) }
func (h *addrHeap) Pop() any {
	old := *h
	v := old[len(old)-1]
	*h = old[:len(old)-1]
	return v
}
