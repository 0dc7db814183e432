package customdomain

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// state is what is known about a record.
type state uint8

const (
	unknown   state = iota // the lookup failed and nothing is remembered
	absent                 // it does not exist
	malformed              // it exists and cannot be read
	found
)

// entry is the outcome of a lookup. It is not changed once it is published, but
// for used.
type entry struct {
	state  state
	answer Answer
	// err tells what is wrong with a malformed record, or why the lookup failed
	// when the entry is unknown or stale.
	err   error
	stale bool // repeats an expired entry because the resolvers failed

	expires    time.Time
	staleUntil time.Time // may be repeated until then

	used atomic.Int64 // unix time of the last use, in seconds
}

func (e *entry) fresh(now time.Time) bool {
	return e != nil && now.Before(e.expires)
}

// repeat returns e as a stale entry for another while, or nil if e knows nothing
// or is too old.
func (e *entry) repeat(now time.Time, cause error) *entry {
	if e == nil || e.state == unknown || !now.Before(e.staleUntil) {
		return nil
	}
	again := &entry{
		state:      e.state,
		answer:     e.answer,
		err:        e.err,
		stale:      true,
		expires:    now.Add(staleRetry),
		staleUntil: e.staleUntil,
	}
	if e.state != malformed {
		again.err = cause
	}
	again.used.Store(e.used.Load())
	return again
}

// touch notes a use. The time is coarse so that a busy entry is mostly read.
func (e *entry) touch(now time.Time) {
	if t := now.Unix(); e.used.Load() != t {
		e.used.Store(t)
	}
}

// cache remembers a bounded number of entries. Reading takes one read lock out of
// many.
type cache struct {
	seed   maphash.Seed
	limit  int // entries in one shard
	shards [cacheShards]shard
}

type shard struct {
	mu sync.RWMutex
	m  map[key]*entry
}

const (
	cacheShards = 16
	// evictionSample is how many entries compete when one has to go. A handful is
	// close enough to the least recently used one and costs nothing to maintain.
	evictionSample = 8
)

func newCache(size int) *cache {
	c := &cache{seed: maphash.MakeSeed(), limit: (size + cacheShards - 1) / cacheShards}
	for i := range c.shards {
		c.shards[i].m = make(map[key]*entry)
	}
	return c
}

func (c *cache) shard(k key) *shard {
	return &c.shards[maphash.Comparable(c.seed, k)%cacheShards]
}

// get returns the entry of k, expired or not, or nil.
func (c *cache) get(k key) *entry {
	s := c.shard(k)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.m[k]
}

func (c *cache) put(k key, e *entry, now time.Time) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.m[k]; !ok && len(s.m) >= c.limit {
		s.evict(now)
	}
	s.m[k] = e
}

// evict removes the least worthy of a few entries. Map iteration starts at a
// random place.
func (s *shard) evict(now time.Time) {
	var victim key
	var worst *entry
	n := 0
	for k, e := range s.m {
		if worst == nil || e.less(worst, now) {
			victim, worst = k, e
		}
		if n++; n == evictionSample {
			break
		}
	}
	delete(s.m, victim)
}

// less tells whether e is worth less than o. Somebody who asks for names at
// random must not displace those that lead somewhere.
func (e *entry) less(o *entry, now time.Time) bool {
	if a, b := e.worth(now), o.worth(now); a != b {
		return a < b
	}
	return e.used.Load() < o.used.Load()
}

func (e *entry) worth(now time.Time) int {
	switch {
	case !now.Before(e.expires) && !now.Before(e.staleUntil):
		return 0
	case e.state != found:
		return 1
	}
	return 2
}

func (c *cache) len() int {
	n := 0
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		n += len(s.m)
		s.mu.RUnlock()
	}
	return n
}
