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

// enough healthy instances to look at for one choice: two dozen samples balance well,
// and a large app need not be walked to its end.
const enough = 24

// rank orders candidates, best first. The last field decides between equals: order
// in the list must not, or the one that follows many unhealthy ones gets their share.
type rank struct {
	failed bool
	active int64
	chance uint32
}

func (r rank) before(o rank) bool {
	switch {
	case r.failed != o.failed:
		return o.failed
	case r.active != o.active:
		return r.active < o.active
	}
	return r.chance < o.chance
}

// Choose fills c with the instances to try for one connection to app, best first.
// Healthy means a WireGuard handshake younger than Stale. Load is spread by open
// connections, or by chance alone where TopN is 0; an instance that failed lately
// comes last but is never left out when nothing else is healthy. unix is the wall
// clock in seconds, mono the monotonic clock of State.FailedAt in ns.
func (a *App) Choose(c *Candidates, sel Selection, unix, mono int64) {
	a.choose(c, sel, unix, mono, nil)
}

// ChooseFor is Choose among the instances whose policy allows port: for the case
// that every one Choose came up with refuses it.
func (a *App) ChooseFor(c *Candidates, sel Selection, port uint16, unix, mono int64) {
	a.choose(c, sel, unix, mono, func(i *Instance) bool {
		v, _ := i.Policy.Check(port)
		return v == Allow
	})
}

func (a *App) choose(c *Candidates, sel Selection, unix, mono int64, fit func(*Instance) bool) {
	c.n = 0
	stale := int64(sel.Stale / time.Second)
	want := min(max(sel.TopN, 1), MaxCandidates)
	var ranks [MaxCandidates]rank
	n := len(a.Instances)
	dice := rand.Uint64() | 1
	start := int(dice>>1) % n
	seen := 0
	for k := range n {
		i := a.Instances[(start+k)%n]
		if h := i.State.Handshake.Load(); h <= 0 || unix-h >= stale || fit != nil && !fit(i) {
			continue
		}
		seen++
		dice *= 0x5851f42d4c957f2d // a step of a multiplicative generator
		r := rank{chance: uint32(dice >> 32)}
		if f := i.State.FailedAt.Load(); f != 0 && mono-f < int64(sel.Penalty) {
			r.failed = true
		}
		if sel.TopN > 0 {
			r.active = i.State.Active.Load()
		}
		at := c.n
		for at > 0 && r.before(ranks[at-1]) {
			at--
		}
		if at < want {
			if c.n < want {
				c.n++
			}
			copy(c.list[at+1:c.n], c.list[at:c.n-1])
			copy(ranks[at+1:c.n], ranks[at:c.n-1])
			c.list[at], ranks[at] = i, r
		}
		if seen >= enough && c.n == want && !ranks[c.n-1].failed {
			return
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
