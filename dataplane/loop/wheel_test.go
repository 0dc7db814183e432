package loop

import (
	"math/rand/v2"
	"testing"
	"time"
)

// Random arms, cancels and jumps of the clock: every timer that stays armed fires
// once, never early, and not later than one tick after a visit that is due; wait
// never sleeps past the earliest timer.
func TestWheelProperties(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 7))
		var w wheel
		w.tick = 1
		now := int64(0)
		due := map[*Timer]int64{}
		var all []*Timer
		for range 2000 {
			switch rng.IntN(4) {
			case 0, 1:
				tm := &Timer{when: now + 1 + rng.Int64N(int64(3*time.Minute))}
				if rng.IntN(3) == 0 {
					tm.when = now + 1 + rng.Int64N(int64(50*time.Millisecond))
				}
				w.add(tm, now)
				due[tm] = tm.when
				all = append(all, tm)
			case 2:
				if len(all) > 0 {
					tm := all[rng.IntN(len(all))]
					w.remove(tm)
					delete(due, tm)
				}
			case 3:
				d := w.wait(now)
				if len(due) == 0 {
					if d != -1 {
						t.Fatalf("seed %d: wait %s without timers", seed, d)
					}
					now += int64(time.Second)
				} else {
					first := int64(1) << 62
					for _, when := range due {
						first = min(first, when)
					}
					// A timer beyond the horizon may ask for an earlier look, never for a later one.
					if late := now + int64(d) - first; late > 2<<tickShift {
						t.Fatalf("seed %d: wait sleeps %s past the first timer", seed, time.Duration(late))
					}
					now += rng.Int64N(int64(d) + int64(2*time.Second))
				}
				w.advance(now, func(tm *Timer) {
					when, ok := due[tm]
					if !ok {
						t.Fatalf("seed %d: a cancelled timer fired", seed)
					}
					if when > now {
						t.Fatalf("seed %d: fired %s early", seed, time.Duration(when-now))
					}
					delete(due, tm)
				})
				for _, when := range due {
					if now-when > 1<<tickShift {
						t.Fatalf("seed %d: a timer is %s late", seed, time.Duration(now-when))
					}
				}
			}
		}
		if w.n != len(due) {
			t.Fatalf("seed %d: wheel counts %d timers, %d are armed", seed, w.n, len(due))
		}
	}
}

// A handler that arms its timer again at once must not keep the loop in one turn.
func TestWheelRearmInsideFire(t *testing.T) {
	var w wheel
	w.tick = 1
	now := int64(0)
	tm := &Timer{when: 1}
	w.add(tm, now)
	fired := 0
	for range 10 {
		now += 1 << tickShift
		w.advance(now, func(t *Timer) {
			fired++
			t.when = now + 1
			w.add(t, now)
		})
	}
	if fired < 4 || fired > 10 {
		t.Errorf("fired %d times in 10 ticks", fired)
	}
}
