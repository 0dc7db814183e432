package routing

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// model is the naive snapshot: two maps, rebuilt by hand.
type model struct {
	instances map[string]Record
	state     map[string]*State
	appState  map[string]*AppState
}

func (m *model) apply(put []Record, remove []string) {
	for _, id := range remove {
		delete(m.instances, id)
		delete(m.state, id)
	}
	m.prune()
	for _, r := range put {
		m.instances[r.ID] = r
		m.prune()
	}
}

// prune forgets the state of apps that have no instance left.
func (m *model) prune() {
	for app := range m.appState {
		if !slices.ContainsFunc(slices.Collect(maps.Values(m.instances)), func(r Record) bool { return r.AppID == app }) {
			delete(m.appState, app)
		}
	}
}

func (m *model) clone() *model {
	return &model{instances: maps.Clone(m.instances), state: maps.Clone(m.state), appState: maps.Clone(m.appState)}
}

// check compares s with the model and learns the identity of new states.
func (m *model) check(s *Snapshot, learn bool) error {
	if s.Len() != len(m.instances) {
		return fmt.Errorf("%d instances, want %d", s.Len(), len(m.instances))
	}
	apps := map[string][]string{}
	for id, r := range m.instances {
		i := s.Instance(id)
		if i == nil || i.ID != id || i.AppID != r.AppID || i.Addr != r.Addr || i.Policy.Known != r.Policy.Known {
			return fmt.Errorf("instance %s is %+v, want %+v", id, i, r)
		}
		if old, ok := m.state[id]; ok && old != i.State {
			return fmt.Errorf("instance %s lost its state", id)
		} else if !ok && learn {
			m.state[id] = i.State
		}
		apps[r.AppID] = append(apps[r.AppID], id)
	}
	for id, want := range apps {
		slices.Sort(want)
		a := s.App(id)
		if a == nil || a.ID != id {
			return fmt.Errorf("app %s is %+v", id, a)
		}
		var got []string
		for _, i := range a.Instances {
			if s.Instance(i.ID) != i {
				return fmt.Errorf("app %s holds another object for %s than the instance table", id, i.ID)
			}
			got = append(got, i.ID)
		}
		if !slices.Equal(got, want) || !slices.Equal(a.Sorted(), want) {
			return fmt.Errorf("app %s has %v, want %v", id, got, want)
		}
		if old, ok := m.appState[id]; ok && old != a.State {
			return fmt.Errorf("app %s lost its state", id)
		} else if !ok && learn {
			m.appState[id] = a.State
		}
	}
	n := 0
	s.Apps(func(a *App) bool {
		n++
		if apps[a.ID] == nil {
			n = -1 << 30
		}
		return true
	})
	if n != len(apps) {
		return fmt.Errorf("%d apps, want %d", n, len(apps))
	}
	n = 0
	s.Instances(func(*Instance) bool { n++; return true })
	if n != len(m.instances) {
		return fmt.Errorf("Instances calls back %d times, want %d", n, len(m.instances))
	}
	return nil
}

// Random changes: With agrees with the naive model, and no snapshot that was handed
// out before ever changes.
func TestWithAgainstModel(t *testing.T) {
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 1))
		id := func() string { return fmt.Sprintf("i%d", rng.IntN(60)) }
		s := Empty()
		m := &model{instances: map[string]Record{}, state: map[string]*State{}, appState: map[string]*AppState{}}
		type old struct {
			s *Snapshot
			m *model
		}
		var kept []old
		for step := range 300 {
			var put []Record
			var remove []string
			for range rng.IntN(4) {
				put = append(put, Record{ID: id(), AppID: fmt.Sprintf("a%d", rng.IntN(8)), Addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(rng.IntN(250))}), Policy: Policy{Known: rng.IntN(2) == 0}})
			}
			for range rng.IntN(3) {
				remove = append(remove, id()) // often unknown, sometimes twice, sometimes also in put
			}
			next := s.With(put, remove)
			m.apply(put, remove)
			if next.Version != s.Version+1 {
				t.Fatalf("seed %d step %d: version %d after %d", seed, step, next.Version, s.Version)
			}
			if err := m.check(next, true); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
			s = next
			if rng.IntN(10) == 0 {
				s = s.WithBases([]*Base{{Domain: fmt.Sprint(step)}})
				if s.Base(fmt.Sprint(step)) == nil || s.Base("other") != nil {
					t.Fatalf("seed %d step %d: base lookup", seed, step)
				}
			}
			if rng.IntN(20) == 0 {
				kept = append(kept, old{s, m.clone()})
			}
		}
		for i, o := range kept {
			if err := o.m.check(o.s, false); err != nil {
				t.Fatalf("seed %d: snapshot %d changed after it was published: %v", seed, i, err)
			}
		}
	}
}

func TestPolicyCheck(t *testing.T) {
	ports := map[uint16]bool{80: false, 443: true}
	for _, tc := range []struct {
		p    Policy
		port uint16
		want Verdict
		pp   bool
	}{
		{Policy{}, 80, Unknown, false},
		{Policy{Ports: ports}, 443, Unknown, false},
		{Policy{Known: true}, 80, Allow, false},
		{Policy{Known: true, Ports: ports}, 443, Allow, true}, // PROXY also without restrict_mode
		{Policy{Known: true, Ports: ports}, 81, Allow, false},
		{Policy{Known: true, Restrict: true, Ports: ports}, 80, Allow, false},
		{Policy{Known: true, Restrict: true, Ports: ports}, 443, Allow, true},
		{Policy{Known: true, Restrict: true, Ports: ports}, 81, Deny, false},
		{Policy{Known: true, Restrict: true}, 80, Deny, false},
	} {
		if v, pp := tc.p.Check(tc.port); v != tc.want || pp != tc.pp {
			t.Errorf("%+v port %d: %v %v, want %v %v", tc.p, tc.port, v, pp, tc.want, tc.pp)
		}
	}
}

func BenchmarkWith(b *testing.B) {
	s := Empty()
	var put []Record
	for i := range 10000 {
		put = append(put, Record{ID: fmt.Sprintf("instance-%d", i), AppID: fmt.Sprintf("app-%d", i/4)})
	}
	s = s.With(put, nil)
	b.ResetTimer()
	for i := range b.N {
		s = s.With(put[i%10000:i%10000+1], nil)
	}
}
