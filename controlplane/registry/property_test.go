package registry

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// model is the specification written the slow way: a bag of records, everything else derived on demand.
type model struct {
	cfg  Config
	recs map[string]Instance
}

func (m *model) active() map[string]Instance {
	all := make([]Instance, 0, len(m.recs))
	for _, i := range m.recs {
		all = append(all, i)
	}
	slices.SortFunc(all, func(a, b Instance) int { return cmp.Or(cmp.Compare(a.RegTime, b.RegTime), cmp.Compare(a.ID, b.ID)) })
	out := map[string]Instance{}
	for _, i := range all {
		free := true
		for _, o := range out {
			free = free && o.IP != i.IP && o.PublicKey != i.PublicKey
		}
		if free {
			out[i.ID] = i
		}
	}
	return out
}

func (m *model) valid(a netip.Addr) bool {
	bad := !m.cfg.ClientRange.Contains(a) || a == m.cfg.Network.Addr() || a == netip.MustParseAddr("10.0.0.255")
	for _, p := range m.cfg.Reserved {
		bad = bad || p.Contains(a)
	}
	return !bad
}

func (m *model) register(q Request, now uint64) (Instance, error) {
	for _, i := range m.recs {
		if i.PublicKey == q.PublicKey && i.ID != q.InstanceID {
			return Instance{}, ErrKeyInUse
		}
	}
	i, known := m.recs[q.InstanceID]
	if known && i.AppID != q.AppID {
		return Instance{}, ErrOtherApp
	}
	_, routable := m.active()[q.InstanceID]
	if !known {
		i = Instance{ID: q.InstanceID, AppID: q.AppID, PublicKey: q.PublicKey, PolicyHash: q.ComposeHash}
	}
	contested := false
	if i.PublicKey != q.PublicKey {
		for _, o := range m.recs {
			contested = contested || o.ID != i.ID && o.IP == i.IP && i.RegTime != now
		}
		i.PublicKey, i.RegTime = q.PublicKey, now
	}
	if i.PolicyHash != q.ComposeHash {
		i.PolicyHash, i.Policy = q.ComposeHash, nil
	}
	if q.Policy != nil {
		i.Policy = q.Policy
	}
	if !routable || contested || !m.valid(i.IP) {
		lo, hi := span(m.cfg.ClientRange)
		found := false
		for v := lo + 1; v < hi && !found; v++ {
			a := fromU32(uint32(v))
			taken := !m.valid(a)
			for _, o := range m.recs {
				taken = taken || o.IP == a
			}
			if !taken {
				i.IP, i.RegTime, found = a, now, true
			}
		}
		if !found {
			return Instance{}, ErrPoolExhausted
		}
	}
	m.recs[i.ID] = i
	return i, nil
}

// TestRandomSequences compares random histories with the model; a third of them has conflicting records from elsewhere.
func TestRandomSequences(t *testing.T) {
	rounds, steps := 60, 300
	if testing.Short() {
		rounds = 10
	}
	policies := []*PortPolicy{nil, {}, {Restrict: true}, {Ports: map[uint16]PortFlags{443: {PP: true}}, Restrict: true}}
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(uint64(seed), 1))
		cfg := defaults()
		cfg.ClientRange = netip.MustParsePrefix("10.0.0.0/27")
		cfg.Reserved = append(cfg.Reserved, netip.MustParsePrefix("10.0.0.8/31"))
		r, c := mustNew(t, cfg)
		m := &model{cfg, map[string]Instance{}}
		foreign := seed%3 == 0
		var log []string
		fail := func(format string, args ...any) {
			t.Helper()
			for id, s := range r.shadows {
				log = append(log, fmt.Sprintf("aside: %s %s %d: %v\n", id, s.IP, s.RegTime, s.why))
			}
			t.Fatalf("seed %d: %s\nend of the history: %s", seed, fmt.Sprintf(format, args...), log[max(0, len(log)-12):])
		}
		id := func() string { return fmt.Sprintf("i%02d", rng.IntN(40)) }
		randomRecord := func() Instance {
			i := Instance{ID: id(), AppID: "aa", PublicKey: key(rng.IntN(45)), RegTime: uint64(c.t.Unix()) - uint64(rng.IntN(50)),
				Policy: policies[rng.IntN(len(policies))], AdminPolicy: policies[rng.IntN(len(policies))]}
			i.IP = fromU32(toU32(netip.MustParseAddr("10.0.0.10")) + uint32(rng.IntN(30)))
			return i
		}
		for step := range steps {
			c.t = c.t.Add(time.Duration(rng.IntN(3)) * time.Second)
			now := uint64(c.t.Unix())
			switch op := rng.IntN(20); {
			case op < 10:
				q := Request{AppID: "aa", InstanceID: id(), ComposeHash: fmt.Sprint("h", rng.IntN(2)), PublicKey: key(rng.IntN(45)), Policy: policies[rng.IntN(len(policies))]}
				if rng.IntN(20) == 0 {
					q.AppID = "bb"
				}
				log = append(log, fmt.Sprintf("register %+v\n", q))
				before := r.Version()
				_, was := m.active()[q.InstanceID]
				want, wantErr := m.register(q, now)
				res, err := r.Register(q)
				if !errors.Is(err, wantErr) || (wantErr == nil) != (err == nil) {
					fail("step %d: error %v, want %v", step, err, wantErr)
				}
				if err == nil {
					if !res.Instance.Equal(want) || res.Created == was {
						fail("step %d: got %+v, want %+v", step, res, want)
					}
					if res.Record != (res.Prev == nil || !res.Prev.Equal(want)) || res.Record != (r.Version() != before) {
						fail("step %d: Record %v", step, res.Record)
					}
					if res.Peer != (res.Prev == nil || res.Prev.IP != want.IP || res.Prev.PublicKey != want.PublicKey) {
						fail("step %d: Peer %v", step, res.Peer)
					}
					// Idempotence: the same request again changes nothing and answers the same.
					again, err := r.Register(q)
					if err != nil || again.Record || again.Peer || again.Created || !again.Instance.Equal(want) {
						fail("step %d: again %+v, %v after %+v", step, again, err, res)
					}
				} else if r.Version() != before {
					fail("step %d: a refused registration changed the version", step)
				}
			case op < 13:
				i := id()
				log = append(log, "remove "+i+"\n")
				_, known := m.recs[i]
				delete(m.recs, i)
				if _, ok := r.Remove(i); ok != known {
					fail("step %d: removed %v, want %v", step, ok, known)
				}
			case op < 16 && foreign:
				i := randomRecord()
				log = append(log, fmt.Sprintf("apply %+v\n", i))
				_, err := r.Apply(i)
				if cur, known := m.recs[i.ID]; known && cur.AppID != i.AppID {
					if !errors.Is(err, ErrOtherApp) {
						fail("step %d: %v", step, err)
					}
					break
				}
				m.recs[i.ID] = i
				if _, won := m.active()[i.ID]; won != (err == nil) || err != nil && !errors.Is(err, ErrConflict) {
					fail("step %d: apply says %v, the record won: %v", step, err, won)
				}
			case op == 16:
				// Restart: the records in any order give the same state.
				list := []Instance{}
				for _, i := range m.recs {
					list = append(list, i)
				}
				rng.Shuffle(len(list), func(a, b int) { list[a], list[b] = list[b], list[a] })
				log = append(log, "load\n")
				if rejected := r.Load(list); len(rejected) != len(m.recs)-len(m.active()) {
					fail("step %d: rejected %v", step, rejected)
				}
			case op == 17:
				log = append(log, "recycle\n")
				const timeout = 20 * time.Second
				gone := r.Recycle(func(string) time.Time { return time.Time{} }, timeout, time.Time{})
				var want []string
				for _, i := range m.recs {
					if c.t.Sub(time.Unix(int64(i.RegTime), 0)) > timeout {
						want = append(want, i.ID)
						delete(m.recs, i.ID)
					}
				}
				slices.Sort(want)
				if !slices.EqualFunc(gone, want, func(i Instance, id string) bool { return i.ID == id }) {
					fail("step %d: recycled %v, want %v", step, gone, want)
				}
			default:
				i, p := id(), policies[1+rng.IntN(len(policies)-1)]
				log = append(log, "override "+i+"\n")
				_, _, err := r.SetAdminPolicy(i, p)
				if _, ok := m.active()[i]; ok != (err == nil) {
					fail("step %d: override %v", step, err)
				} else if ok {
					rec := m.recs[i]
					rec.AdminPolicy = p
					m.recs[i] = rec
				}
			}
			check(t, r)
			want := m.active()
			got := r.List()
			if len(got) != len(want) {
				fail("step %d: %d active, want %d", step, len(got), len(want))
			}
			for _, i := range got {
				if !i.Equal(want[i.ID]) {
					fail("step %d: have %+v, want %+v", step, i, want[i.ID])
				}
			}
		}
	}
}

// TestConcurrent is for the race detector: all methods at once, then the invariants.
func TestConcurrent(t *testing.T) {
	r, _ := mustNew(t, defaults())
	changes, cancel := r.Subscribe()
	defer cancel()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for n := range 200 {
				id := fmt.Sprint(n % 20)
				switch (n + w) % 6 {
				case 0, 1:
					r.Register(Request{AppID: "aa", InstanceID: id, PublicKey: key(n%20 + 100*w)})
				case 2:
					r.Remove(id)
				case 3:
					r.SetAdminPolicy(id, &PortPolicy{Restrict: n%2 == 0})
				case 4:
					r.Apply(record(id, fmt.Sprintf("10.0.0.%d", 2+n%30), n%20, uint64(n)))
				default:
					r.Recycle(func(string) time.Time { return time.Time{} }, time.Hour, time.Time{})
				}
				for _, i := range r.List() {
					i.Effective()
				}
				r.ByApp("aa")
				r.Apps()
				r.Version()
			}
		})
	}
	wg.Wait()
	select {
	case <-changes:
	default:
		t.Error("no notice")
	}
	check(t, r)
}

// FuzzLoad feeds records of any content: whatever is accepted keeps the invariants and survives a second load.
func FuzzLoad(f *testing.F) {
	f.Add("a", "aa", []byte{10, 0, 0, 2}, key(1), uint64(1), "b", []byte{10, 0, 0, 2}, key(2))
	f.Add("a b", "", []byte{127, 0, 0, 1}, "x", uint64(1<<63), "a", []byte{}, key(1))
	f.Fuzz(func(t *testing.T, id1, app string, ip1 []byte, key1 string, reg uint64, id2 string, ip2 []byte, key2 string) {
		r, c := mustNew(t, defaults())
		a1, _ := netip.AddrFromSlice(ip1)
		a2, _ := netip.AddrFromSlice(ip2)
		list := []Instance{
			{ID: id1, AppID: app, IP: a1, PublicKey: key1, RegTime: reg},
			{ID: id2, AppID: app, IP: a2, PublicKey: key2, RegTime: reg + 1},
			record("fixed", "10.0.0.3", 7, 100),
		}
		rejected := r.Load(list)
		check(t, r)
		if r.Len()+len(rejected) != len(list) {
			t.Fatalf("%d active and %d rejected of %d", r.Len(), len(rejected), len(list))
		}
		for _, i := range r.List() {
			if i.RegTime > uint64(c.t.Unix())+300 || !i.IP.Is4() || i.IP.IsLoopback() || i.IP.IsMulticast() || len(i.PublicKey) != 44 {
				t.Fatalf("accepted %+v", i)
			}
		}
		again, _ := mustNew(t, defaults())
		slices.Reverse(list)
		again.Load(list)
		if !slices.EqualFunc(r.List(), again.List(), Instance.Equal) {
			t.Fatalf("order matters: %v, %v", r.List(), again.List())
		}
		for _, i := range list {
			r.Apply(i)
			check(t, r)
		}
	})
}

func bigPool(b testing.TB) (*Registry, *clock) {
	return mustNew(b, Config{
		Network:     netip.MustParsePrefix("10.8.0.1/16"),
		Reserved:    []netip.Prefix{netip.MustParsePrefix("10.8.0.1/32")},
		ClientRange: netip.MustParsePrefix("10.8.0.0/16"),
	})
}

// BenchmarkChurn: one departure and one arrival with 10,000 instances present.
func BenchmarkChurn(b *testing.B) {
	r, _ := bigPool(b)
	ids := make([]string, 20_000)
	for n := range ids {
		ids[n] = fmt.Sprintf("%040x", uint32(n)*2654435761)
	}
	for n := range 10_000 {
		if _, err := r.Register(Request{AppID: fmt.Sprint(n % 500), InstanceID: ids[n], PublicKey: key(n)}); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for n := range b.N {
		in, out := (n+10_000)%len(ids), n%len(ids)
		r.Remove(ids[out])
		if _, err := r.Register(Request{AppID: fmt.Sprint(in % 500), InstanceID: ids[in], PublicKey: key(in)}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRefresh: a registration that changes nothing, 10,000 instances present.
func BenchmarkRefresh(b *testing.B) {
	r, _ := bigPool(b)
	reqs := make([]Request, 10_000)
	for n := range reqs {
		reqs[n] = Request{AppID: "aa", InstanceID: fmt.Sprintf("%040x", n), PublicKey: key(n), Policy: &PortPolicy{Restrict: true, Ports: map[uint16]PortFlags{443: {}}}}
		if _, err := r.Register(reqs[n]); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for n := range b.N {
		if res, _ := r.Register(reqs[n%len(reqs)]); res.Record {
			b.Fatal("changed")
		}
	}
}

func BenchmarkSnapshot10k(b *testing.B) {
	r, _ := bigPool(b)
	for n := range 10_000 {
		r.Register(Request{AppID: "aa", InstanceID: fmt.Sprintf("%040x", n), PublicKey: key(n)})
	}
	b.ResetTimer()
	for range b.N {
		r.Snapshot()
	}
}
