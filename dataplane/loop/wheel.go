package loop

import (
	"math/bits"
	"time"
)

const (
	tickShift = 24 // 2^24 ns = 16.8 ms: resolution of every data-plane timeout
	wheelSize = 4096
	wheelMask = wheelSize - 1
)

// TimerHandler is told, on the loop's goroutine, that one of its timers fired.
type TimerHandler interface{ Expired(t *Timer) }

// Timer is an intrusive timer; the zero value is unarmed. It belongs to one loop.
type Timer struct {
	H          TimerHandler
	next, prev *Timer
	when       int64 // loop clock, ns
	slot       int32
	armed      bool
}

// Armed reports whether the timer waits to fire.
func (t *Timer) Armed() bool { return t.armed }

// wheel is a hashed timer wheel: O(1) arm and cancel, one list a slot. A timer
// beyond the horizon (about 69 s) is parked in the farthest slot and looked at
// again then, which costs a five-hour timer one visit every 69 seconds.
type wheel struct {
	slots  [wheelSize]*Timer
	bitmap [wheelSize / 64]uint64
	tick   int64 // next tick to be run
	n      int
}

func (w *wheel) add(t *Timer, now int64) {
	tick := (t.when + (1 << tickShift) - 1) >> tickShift
	if tick < w.tick {
		tick = w.tick
	}
	if tick-w.tick >= wheelSize-1 {
		// Not the very last slot: for a timer parked again from within advance that is the one being emptied.
		tick = w.tick + wheelSize - 2
	}
	s := int32(tick & wheelMask)
	t.slot, t.armed, t.prev = s, true, nil
	t.next = w.slots[s]
	if t.next != nil {
		t.next.prev = t
	}
	w.slots[s] = t
	w.bitmap[s>>6] |= 1 << (s & 63)
	w.n++
}

func (w *wheel) remove(t *Timer) {
	if !t.armed {
		return
	}
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		w.slots[t.slot] = t.next
		if t.next == nil {
			w.bitmap[t.slot>>6] &^= 1 << (t.slot & 63)
		}
	}
	if t.next != nil {
		t.next.prev = t.prev
	}
	t.next, t.prev, t.armed = nil, nil, false
	w.n--
}

// wait returns how long the loop may sleep, or -1 for ever.
func (w *wheel) wait(now int64) time.Duration {
	if w.n == 0 {
		return -1
	}
	start := int(w.tick & wheelMask)
	for i := 0; i <= len(w.bitmap); i++ {
		word := ((start >> 6) + i) % len(w.bitmap)
		b := w.bitmap[word]
		if i == 0 {
			b &= ^uint64(0) << (start & 63)
		} else if i == len(w.bitmap) {
			b &= 1<<(start&63) - 1
		}
		if b == 0 {
			continue
		}
		slot := word<<6 + bits.TrailingZeros64(b)
		tick := w.tick + int64((slot-start)&wheelMask)
		d := time.Duration(tick<<tickShift - now)
		if d < 0 {
			d = 0
		}
		return d
	}
	return -1
}

// advance collects every timer due at now; fire is called for each.
func (w *wheel) advance(now int64, fire func(*Timer)) {
	target := now >> tickShift
	if w.n == 0 {
		w.tick = max(w.tick, target+1)
		return
	}
	if target-w.tick > wheelSize {
		w.tick = target - wheelSize // every slot is visited once below
	}
	for ; w.tick <= target; w.tick++ {
		s := w.tick & wheelMask
		for t := w.slots[s]; t != nil; t = w.slots[s] {
			w.remove(t)
			if t.when > now {
				// Parked beyond the horizon: the slot it belongs to now is ahead of this one.
				w.tick++
				w.add(t, now)
				w.tick--
				continue
			}
			fire(t)
		}
	}
}
