package cvm

import (
	"errors"
	"testing"
	"time"
)

// TestCheckerScenarios drives the checker over 900 s in polls of 10 s, as guest
// spec 5.10 lists them. Handshakes are given as the second of the newest one by
// the second of the poll, -1 for none.
func TestCheckerScenarios(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		name      string
		handshake func(at int) int
		forced    int
		refreshed int
	}{
		{"healthy tunnel", func(at int) int { return at - at%120 }, 0, 4},
		{"never a handshake", func(int) int { return -1 }, 4, 0},
		{"frozen handshake", func(int) int { return 0 }, 4, 0},
		{"one handshake, then gone", func(at int) int {
			if at <= 180 {
				return at - at%120
			}
			return -1
		}, 3, 2},
		{"recovery at 540 s", func(at int) int {
			if at < 540 {
				return 0
			}
			return at - at%120
		}, 2, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newChecker(180*time.Second, 180*time.Second, start)
			var forced, refreshed int
			for at := 0; at < 900; at += 10 {
				now := start.Add(time.Duration(at) * time.Second)
				var hs time.Time
				if s := tt.handshake(at); s >= 0 {
					hs = start.Add(time.Duration(s) * time.Second)
				}
				a := c.poll(now, true, hs)
				switch a {
				case actForce:
					forced++
				case actRegister:
					refreshed++
				}
				if a != actNothing {
					c.done(now, a, nil)
				}
			}
			if forced != tt.forced || refreshed != tt.refreshed {
				t.Errorf("%d forced and %d periodic refreshes, want %d and %d", forced, refreshed, tt.forced, tt.refreshed)
			}
		})
	}
}

// Without a tunnel, tries follow each other at 1, 2, 4 ... 30 s; a success ends
// that.
func TestCheckerRetries(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	c := newChecker(180*time.Second, 180*time.Second, now)
	down := errors.New("refused")
	for i, seconds := range []int{1, 2, 4, 8, 16, 30, 30} {
		wait := time.Duration(seconds) * time.Second
		if a := c.poll(now, false, time.Time{}); a != actRegister {
			t.Fatalf("try %d: got %v, want a registration", i, a)
		}
		c.done(now, actRegister, down)
		if a := c.poll(now.Add(wait-1), false, time.Time{}); a != actNothing {
			t.Fatalf("try %d: tried again before %v had passed", i, wait)
		}
		now = now.Add(wait)
	}
	c.poll(now, false, time.Time{})
	c.done(now, actRegister, nil)
	if c.failures != 0 || !c.retryAt.IsZero() {
		t.Error("a success does not reset the delay")
	}
}
