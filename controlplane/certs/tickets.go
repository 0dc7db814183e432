package certs

import (
	"context"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"strconv"
	"sync"
	"time"
)

// TicketOptions configures NewTicketKeys. All fields may be left zero.
type TicketOptions struct {
	// Secret, if set, makes every process that has it use the same keys, so
	// that a session opened on one node resumes on another. At least 32 random
	// bytes. It weakens forward secrecy: who learns it can read recorded TLS
	// 1.2 sessions that were resumed. Without it keys are random, live in
	// memory only and are forgotten.
	Secret   []byte
	Rotation time.Duration    // age at which a key stops encrypting, default 24 h
	Keep     int              // older keys that still decrypt, default 2
	Now      func() time.Time // default time.Now
}

// TicketKeys gives session ticket keys to several tls.Configs, so that a
// session opened through one of them resumes through any (upstream keeps a set
// per acceptor, gateway spec 7.3).
type TicketKeys struct {
	opt TicketOptions

	mu      sync.Mutex
	configs []*tls.Config
	period  int64      // number of the current rotation period
	keys    [][32]byte // the current one first, then the older ones
}

// NewTicketKeys makes the first keys. Run rotates them.
func NewTicketKeys(opt TicketOptions) (*TicketKeys, error) {
	if opt.Secret != nil && len(opt.Secret) < 32 {
		return nil, fmt.Errorf("session ticket secret: %d bytes are too few, 32 are needed", len(opt.Secret))
	}
	if opt.Rotation <= 0 {
		opt.Rotation = 24 * time.Hour
	}
	if opt.Keep <= 0 {
		opt.Keep = 2
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	t := &TicketKeys{opt: opt, period: -1}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t, t.rotate()
}

// Attach gives cfgs the current keys and all later ones. A config stays
// attached as long as t lives, so attach those of listeners, not of
// connections.
func (t *TicketKeys) Attach(cfgs ...*tls.Config) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range cfgs {
		c.SetSessionTicketKeys(t.keys)
	}
	t.configs = append(t.configs, cfgs...)
}

// Run rotates the keys until ctx ends.
func (t *TicketKeys) Run(ctx context.Context) error {
	for {
		now := t.opt.Now()
		next := time.Unix(0, (t.number(now)+1)*int64(t.opt.Rotation))
		// The clock may be set meanwhile.
		timer := time.NewTimer(min(next.Sub(now), time.Hour))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		t.mu.Lock()
		err := t.rotate()
		t.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// number is the rotation period of an instant, the same on all nodes.
func (t *TicketKeys) number(now time.Time) int64 { return now.UnixNano() / int64(t.opt.Rotation) }

// rotate makes the keys of the current period, if it is a new one, with mu held.
func (t *TicketKeys) rotate() error {
	n := t.number(t.opt.Now())
	if n == t.period {
		return nil
	}
	var keys [][32]byte
	if t.opt.Secret == nil {
		var k [32]byte
		rand.Read(k[:]) // never fails
		keys = append([][32]byte{k}, t.keys...)
		keys = keys[:min(len(keys), 1+t.opt.Keep)]
	} else {
		for i := range int64(1 + t.opt.Keep) {
			k, err := t.derive(n - i)
			if err != nil {
				return err
			}
			keys = append(keys, k)
		}
		// A node whose clock is ahead may use the next key already.
		k, err := t.derive(n + 1)
		if err != nil {
			return err
		}
		keys = append(keys, k)
	}
	t.period, t.keys = n, keys
	for _, c := range t.configs {
		c.SetSessionTicketKeys(keys)
	}
	return nil
}

func (t *TicketKeys) derive(period int64) (k [32]byte, err error) {
	info := "dstack-gw session ticket " + t.opt.Rotation.String() + " " + strconv.FormatInt(period, 10)
	b, err := hkdf.Key(sha256.New, t.opt.Secret, nil, info, len(k))
	if err != nil {
		return k, fmt.Errorf("derive a session ticket key: %w", err)
	}
	return [32]byte(b), nil
}
