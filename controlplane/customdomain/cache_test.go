package customdomain

import (
	"fmt"
	"testing"
	"time"
)

// TestCacheBound floods the cache with names that lead nowhere.
func TestCacheBound(t *testing.T) {
	const size = 256
	c := newCache(size)
	now := time.Unix(1000, 0)
	precious := make([]key, size/4)
	for i := range precious {
		precious[i] = key{primary, fmt.Sprintf("app%d.example", i)}
		c.put(precious[i], &entry{state: found, expires: now.Add(time.Minute), staleUntil: now.Add(time.Hour)}, now)
	}
	for i := range 100 * size {
		c.put(key{primary, fmt.Sprintf("scan%d.example", i)}, &entry{state: absent, expires: now.Add(time.Second), staleUntil: now.Add(time.Hour)}, now)
		if n := c.len(); n > size {
			t.Fatalf("%d entries, want at most %d", n, size)
		}
	}
	lost := 0
	for _, k := range precious {
		if c.get(k) == nil {
			lost++
		}
	}
	// A sample may by chance hold nothing but precious entries; hardly ever.
	if lost > len(precious)/10 {
		t.Errorf("lost %d of %d entries that lead somewhere", lost, len(precious))
	}
}

// TestCacheUpdate replaces an entry of a full cache without evicting another.
func TestCacheUpdate(t *testing.T) {
	c := newCache(cacheShards) // one entry a shard
	now := time.Unix(1000, 0)
	k := key{wildcard, "example"}
	c.put(k, &entry{state: absent}, now)
	c.put(k, &entry{state: found}, now)
	if e := c.get(k); e == nil || e.state != found || c.len() != 1 {
		t.Errorf("%+v, %d entries", e, c.len())
	}
	if c.get(key{primary, "example"}) != nil {
		t.Error("records of different kinds are confused")
	}
}

func TestLess(t *testing.T) {
	now := time.Unix(1000, 0)
	live, dead := now.Add(time.Minute), now.Add(-time.Minute)
	mk := func(s state, expires, staleUntil time.Time, used int64) *entry {
		e := &entry{state: s, expires: expires, staleUntil: staleUntil}
		e.used.Store(used)
		return e
	}
	order := []*entry{ // from worthless to precious
		mk(found, dead, dead, 5),
		mk(found, dead, dead, 6),
		mk(absent, live, live, 1),
		mk(malformed, dead, live, 2),
		mk(unknown, live, live, 3),
		mk(found, live, live, 1),
		mk(found, dead, live, 2),
	}
	for i, a := range order {
		for j, b := range order {
			if got := a.less(b, now); got != (i < j) {
				t.Errorf("less of %d and %d is %v", i, j, got)
			}
		}
	}
}
