package cvm

import "time"

// action is what a poll of the checker asks for.
type action int

const (
	actNothing action = iota
	// actRegister registers; the tunnel is touched only if the answer changed.
	actRegister
	// actForce registers and builds the tunnel anew.
	actForce
)

// checker decides when to register again, by the rules of the released guests'
// gateway checker (guest spec 5.10). Its states are driven by poll and done.
type checker struct {
	refresh time.Duration // 180 s in guests
	stale   time.Duration // 180 s in guests
	backoff func(failures int) time.Duration

	failures    int
	retryAt     time.Time
	refreshed   time.Time // last registration of any kind
	forced      time.Time // last forced one
	noHandshake time.Time // when a missing handshake was first seen
}

func newChecker(refresh, stale time.Duration, start time.Time) *checker {
	return &checker{refresh: refresh, stale: stale, backoff: retryDelay, refreshed: start}
}

// retryDelay waits less than guests do (30, 60, 120 s): somebody is looking.
func retryDelay(failures int) time.Duration {
	return min(time.Second<<min(failures-1, 6), 30*time.Second)
}

// poll decides by the time, whether there is a tunnel, and its newest handshake
// (zero: none).
func (c *checker) poll(now time.Time, haveTunnel bool, handshake time.Time) action {
	if !haveTunnel {
		if now.Before(c.retryAt) {
			return actNothing
		}
		return actRegister
	}
	since := handshake
	if handshake.IsZero() {
		if c.noHandshake.IsZero() {
			c.noHandshake = now
		}
		since = c.noHandshake
	} else {
		c.noHandshake = time.Time{}
	}
	if now.Sub(since) >= c.stale {
		if !c.forced.IsZero() && now.Sub(c.forced) < c.stale {
			return actNothing
		}
		return actForce
	}
	if now.Sub(c.refreshed) >= c.refresh {
		return actRegister
	}
	return actNothing
}

// done notes the end of what poll asked for.
func (c *checker) done(now time.Time, a action, err error) {
	c.refreshed = now
	if a == actForce {
		c.forced = now
	}
	if err != nil {
		c.failures++
		c.retryAt = now.Add(c.backoff(c.failures))
		return
	}
	c.failures, c.retryAt = 0, time.Time{}
}
