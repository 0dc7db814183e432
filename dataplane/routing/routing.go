package routing

import (
	"crypto/tls"
	"hash/maphash"
	"maps"
	"net/netip"
	"slices"
	"sync/atomic"
)

// Policy is an instance's effective port policy (gateway spec 5.9).
type Policy struct {
	// Known is false while nobody reported a policy: every port is denied and a fetch is due.
	Known    bool
	Restrict bool
	// Ports maps a declared port to "prepend a PROXY header".
	Ports map[uint16]bool
}

// Verdict is the decision of a policy for one port.
type Verdict uint8

const (
	Deny Verdict = iota
	Allow
	Unknown
)

// Check decides about port; pp tells whether a PROXY header is wanted.
func (p *Policy) Check(port uint16) (v Verdict, pp bool) {
	if !p.Known {
		return Unknown, false
	}
	pp, listed := p.Ports[port]
	if p.Restrict && !listed {
		return Deny, false
	}
	return Allow, pp
}

// State is the volatile part of an instance.
type State struct {
	// Active counts open and dialling connections of this gateway.
	Active atomic.Int64
	// Handshake is the last WireGuard handshake, unix seconds, 0 = never.
	Handshake atomic.Int64
	// FailedAt is the loop-independent monotonic time (ns, see Clock) of the last
	// failed dial not followed by a successful one; 0 = none.
	FailedAt atomic.Int64
}

// AppState is the volatile part of an app.
type AppState struct {
	// Active counts connections from the first dial for one to its end.
	Active atomic.Int64
}

// Instance is immutable.
type Instance struct {
	ID, AppID string
	Addr      netip.Addr
	Policy    Policy
	State     *State
	// Trusted marks the debugging backend `localhost`, which has no policy.
	Trusted bool
}

// App is immutable; Instances is ordered by id.
type App struct {
	ID        string
	Instances []*Instance
	State     *AppState
}

// Base is a platform domain. TLS is nil while it has no usable certificate: names
// under it still route as passthrough, terminate names are refused.
type Base struct {
	Domain     string
	TLS        *tls.Config // no ALPN
	TLSH2      *tls.Config // ALPN h2 only
	Configured bool        // a configured ZT domain or the static one, as opposed to a leftover certificate
}

const shards = 256

var seed = maphash.MakeSeed()

func shardOf(id string) int { return int(maphash.String(seed, id) % shards) }

// Snapshot is what connections read.
type Snapshot struct {
	Version   uint64
	instances [shards]map[string]*Instance
	apps      [shards]map[string]*App
	bases     map[string]*Base
	count     int
}

// Empty is a snapshot without anything in it.
func Empty() *Snapshot { return &Snapshot{} }

// Instance looks an instance up by id.
func (s *Snapshot) Instance(id string) *Instance { return s.instances[shardOf(id)][id] }

// App looks an app up by id.
func (s *Snapshot) App(id string) *App { return s.apps[shardOf(id)][id] }

// Base looks a platform domain up by its exact name.
func (s *Snapshot) Base(domain string) *Base { return s.bases[domain] }

// Bases returns the platform domains in no order.
func (s *Snapshot) Bases() []*Base { return slices.Collect(maps.Values(s.bases)) }

// Len is the number of instances.
func (s *Snapshot) Len() int { return s.count }

// Instances calls f for every instance until it returns false.
func (s *Snapshot) Instances(f func(*Instance) bool) {
	for _, m := range s.instances {
		for _, i := range m {
			if !f(i) {
				return
			}
		}
	}
}

// Apps calls f for every app until it returns false.
func (s *Snapshot) Apps(f func(*App) bool) {
	for _, m := range s.apps {
		for _, a := range m {
			if !f(a) {
				return
			}
		}
	}
}

// WithBases returns a snapshot with other platform domains.
func (s *Snapshot) WithBases(bases []*Base) *Snapshot {
	n := *s
	n.Version++
	n.bases = make(map[string]*Base, len(bases))
	for _, b := range bases {
		n.bases[b.Domain] = b
	}
	return &n
}

// Record describes one instance to put into a snapshot.
type Record struct {
	ID, AppID string
	Addr      netip.Addr
	Policy    Policy
}

// With returns a snapshot in which put replaces or adds instances and remove takes
// them out. The cost is that of the touched shards, not of the whole table: 1,000
// changes a second on 10,000 instances must not be felt.
func (s *Snapshot) With(put []Record, remove []string) *Snapshot {
	n := *s
	n.Version++
	var ownI, ownA [shards]bool
	insts := func(id string) map[string]*Instance {
		k := shardOf(id)
		if !ownI[k] {
			ownI[k] = true
			if n.instances[k] = maps.Clone(n.instances[k]); n.instances[k] == nil {
				n.instances[k] = map[string]*Instance{}
			}
		}
		return n.instances[k]
	}
	apps := func(id string) map[string]*App {
		k := shardOf(id)
		if !ownA[k] {
			ownA[k] = true
			if n.apps[k] = maps.Clone(n.apps[k]); n.apps[k] == nil {
				n.apps[k] = map[string]*App{}
			}
		}
		return n.apps[k]
	}
	leave := func(i *Instance) {
		m := apps(i.AppID)
		old := m[i.AppID]
		if old == nil {
			return
		}
		list := slices.DeleteFunc(slices.Clone(old.Instances), func(x *Instance) bool { return x.ID == i.ID })
		if len(list) == 0 {
			delete(m, i.AppID)
			return
		}
		m[i.AppID] = &App{ID: old.ID, Instances: list, State: old.State}
	}
	for _, id := range remove {
		m := insts(id)
		if old := m[id]; old != nil {
			leave(old)
			delete(m, id)
			n.count--
		}
	}
	for _, r := range put {
		m := insts(r.ID)
		inst := &Instance{ID: r.ID, AppID: r.AppID, Addr: r.Addr, Policy: r.Policy}
		old := m[r.ID]
		if old != nil {
			inst.State = old.State
			if old.AppID != r.AppID {
				leave(old)
			}
		} else {
			inst.State = new(State)
			n.count++
		}
		m[r.ID] = inst
		am := apps(r.AppID)
		app := &App{ID: r.AppID}
		if prev := am[r.AppID]; prev != nil {
			app.State = prev.State
			app.Instances = slices.Clone(prev.Instances)
		} else {
			app.State = new(AppState)
		}
		at, found := slices.BinarySearchFunc(app.Instances, r.ID, func(i *Instance, id string) int {
			switch {
			case i.ID < id:
				return -1
			case i.ID > id:
				return 1
			}
			return 0
		})
		if found {
			app.Instances[at] = inst
		} else {
			app.Instances = slices.Insert(app.Instances, at, inst)
		}
		am[r.AppID] = app
	}
	return &n
}
