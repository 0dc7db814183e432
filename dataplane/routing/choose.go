package routing

import (
	"math/rand/v2"
	"slices"
	"time"
)

// MaxCandidates bounds how many instances one connection may try.
const MaxCandidates = 8

// Selection rules (gateway spec 5.1, with the balancing that it asks for).
type Selection struct {
	// TopN is how many instances may be tried for one connection; 0 = one random healthy instance.
	TopN int
	// Stale is the largest handshake age of a healthy instance.
	Stale time.Duration
	// Penalty is how long an instance whose dial failed is tried last.
	Penalty time.Duration
}

// Candidates is a short ordered list without allocation.
type Candidates struct {
	list [MaxCandidates]*Instance
	n    int
}

// Len is the number of candidates.
func (c *Candidates) Len() int { return c.n }

// At returns candidate i, best first.
func (c *Candidates) At(i int) *Instance { return c.list[i] }

// Add appends an instance while there is room.
func (c *Candidates) Add(i *Instance) {
	if c.n < MaxCandidates {
		c.list[c.n] = i
		c.n++
	}
}

// Filter keeps the candidates for which keep is true.
func (c *Candidates) Filter(keep func(*Instance) bool) {
	k := 0
	for i := range c.n {
		if keep(c.list[i]) {
			c.list[k] = c.list[i]
			k++
		}
	}
	c.n = k
}

// Choose fills c with the instances to try for one connection to app, best first.
// Healthy means a WireGuard handshake younger than Stale. Load is spread by open
// connections; an instance that failed lately comes last but is never left out
// when nothing else is healthy. unix is the wall clock in seconds, mono the
// monotonic clock of State.FailedAt in ns.
func (a *App) Choose(c *Candidates, sel Selection, unix, mono int64) {
	c.n = 0
	stale := int64(sel.Stale / time.Second)
	healthy := func(i *Instance) bool {
		h := i.State.Handshake.Load()
		return h > 0 && unix-h < stale
	}
	if sel.TopN == 0 {
		start := rand.IntN(len(a.Instances))
		for k := range a.Instances {
			if i := a.Instances[(start+k)%len(a.Instances)]; healthy(i) {
				c.Add(i)
				return
			}
		}
		return
	}
	want := min(sel.TopN, MaxCandidates)

	// Keep the best `want` in c, ordered. Ties are broken by where the walk begins,
	// which is random, so equal instances share the load.
	type key struct {
		failed bool
		active int64
	}
	rank := func(i *Instance) key {
		f := i.State.FailedAt.Load()
		return key{f != 0 && mono-f < int64(sel.Penalty), i.State.Active.Load()}
	}
	less := func(x, y key) bool {
		if x.failed != y.failed {
			return y.failed
		}
		return x.active < y.active
	}
	var keys [MaxCandidates]key
	n := len(a.Instances)
	start := rand.IntN(n)
	for k := range n {
		i := a.Instances[(start+k)%n]
		if !healthy(i) {
			continue
		}
		rk := rank(i)
		at := c.n
		for at > 0 && less(rk, keys[at-1]) {
			at--
		}
		if at >= want {
			continue
		}
		if c.n < want {
			c.n++
		}
		copy(c.list[at+1:c.n], c.list[at:c.n-1])
		copy(keys[at+1:c.n], keys[at:c.n-1])
		c.list[at], keys[at] = i, rk
		// A large app need not be walked to its end: two dozen samples balance well.
		if k >= 24 && c.n == want && !keys[c.n-1].failed {
			break
		}
	}
}

// Sorted returns the instance ids of the app; for tools.
func (a *App) Sorted() []string {
	ids := make([]string, 0, len(a.Instances))
	for _, i := range a.Instances {
		ids = append(ids, i.ID)
	}
	slices.Sort(ids)
	return ids
}
