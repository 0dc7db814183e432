package routing

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

const (
	testUnix = 1_700_000_000
	testMono = int64(time.Hour)
)

var testSel = Selection{TopN: 3, Stale: 30 * time.Minute, Penalty: 10 * time.Second}

func testApp(n int) *App {
	a := &App{ID: "app", State: new(AppState)}
	for i := range n {
		inst := &Instance{ID: fmt.Sprintf("i%03d", i), AppID: "app", State: new(State)}
		inst.State.Handshake.Store(testUnix - 60)
		a.Instances = append(a.Instances, inst)
	}
	return a
}

func list(c *Candidates) (l []*Instance) {
	for i := range c.Len() {
		l = append(l, c.At(i))
	}
	return l
}

// Random apps: what Choose promises holds for every one.
func TestChooseProperties(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 3000 {
		a := testApp(1 + rng.IntN(40))
		sel := testSel
		sel.TopN = rng.IntN(11)
		healthy, failed := map[*Instance]bool{}, map[*Instance]bool{}
		for _, i := range a.Instances {
			switch rng.IntN(4) {
			case 0:
				i.State.Handshake.Store(0)
			case 1:
				i.State.Handshake.Store(testUnix - 1800 - int64(rng.IntN(2)))
			default:
				i.State.Handshake.Store(testUnix - int64(rng.IntN(1800)))
				healthy[i] = true
			}
			if rng.IntN(3) == 0 {
				ago := rng.Int64N(int64(20 * time.Second))
				i.State.FailedAt.Store(testMono - ago)
				failed[i] = ago < int64(sel.Penalty)
			}
			i.State.Active.Store(int64(rng.IntN(5)))
		}
		var c Candidates
		a.Choose(&c, sel, testUnix, testMono)
		got := list(&c)
		want := min(max(sel.TopN, 1), MaxCandidates, len(healthy))
		if len(got) != want {
			t.Fatalf("round %d: %d candidates of %d healthy with TopN %d, want %d", round, len(got), len(healthy), sel.TopN, want)
		}
		sound := 0
		for i := range healthy {
			if !failed[i] {
				sound++
			}
		}
		for k, i := range got {
			if !healthy[i] {
				t.Fatalf("round %d: unhealthy candidate", round)
			}
			if slices.Contains(got[:k], i) {
				t.Fatalf("round %d: the same instance twice", round)
			}
			if failed[i] && k < sound {
				t.Fatalf("round %d: candidate %d failed lately, %d others did not", round, k, sound)
			}
			if k > 0 && !failed[i] && got[k-1].State.Active.Load() > i.State.Active.Load() {
				t.Fatalf("round %d: a busier instance comes first", round)
			}
		}
		// Small apps are walked to the end: the least loaded one leads.
		if sel.TopN > 0 && sound > 0 && len(a.Instances) <= 24 {
			for i := range healthy {
				if !failed[i] && i.State.Active.Load() < got[0].State.Active.Load() {
					t.Fatalf("round %d: %d connections lead, another has %d", round, got[0].State.Active.Load(), i.State.Active.Load())
				}
			}
		}
	}
}

// Short connections end before the next begins, so the counters are always equal:
// every healthy instance must still get its share, wherever the unhealthy ones stand.
func TestChooseSpreadsShortConnections(t *testing.T) {
	for _, topN := range []int{0, 1, 3} {
		for _, down := range []string{"none", "all but two neighbours", "every other", "failed"} {
			t.Run(fmt.Sprintf("top %d, down %s", topN, down), func(t *testing.T) {
				a := testApp(10)
				for k, i := range a.Instances {
					switch down {
					case "all but two neighbours":
						if k > 1 {
							i.State.Handshake.Store(0)
						}
					case "every other":
						if k%2 == 0 {
							i.State.Handshake.Store(0)
						}
					case "failed":
						if k > 2 {
							i.State.FailedAt.Store(testMono - 1)
						}
					}
				}
				sel := testSel
				sel.TopN = topN
				lead := map[*Instance]int{}
				const n = 10000
				for range n {
					var c Candidates
					a.Choose(&c, sel, testUnix, testMono)
					lead[c.At(0)]++
				}
				may := 0
				for _, i := range a.Instances {
					if i.State.Handshake.Load() > 0 && i.State.FailedAt.Load() == 0 {
						may++
					}
				}
				for _, i := range a.Instances {
					share := float64(lead[i]) * float64(may) / n
					switch fit := i.State.Handshake.Load() > 0 && i.State.FailedAt.Load() == 0; {
					case !fit && lead[i] > 0:
						t.Errorf("%s leads %d times", i.ID, lead[i])
					case fit && (share < 0.8 || share > 1.2):
						t.Errorf("%s leads %.2f of its share", i.ID, share)
					}
				}
			})
		}
	}
}

// Long connections: no instance gets far ahead of another.
func TestChooseBalancesLongConnections(t *testing.T) {
	for _, n := range []int{2, 5, 24, 200} {
		a := testApp(n)
		var c Candidates
		for range 20 * n {
			a.Choose(&c, testSel, testUnix, testMono)
			c.At(0).State.Active.Add(1)
		}
		lo, hi := int64(1<<40), int64(0)
		for _, i := range a.Instances {
			lo, hi = min(lo, i.State.Active.Load()), max(hi, i.State.Active.Load())
		}
		limit := int64(1)
		if n > 24 {
			limit = 6 // only two dozen are looked at
		}
		if hi-lo > limit {
			t.Errorf("%d instances: between %d and %d connections", n, lo, hi)
		}
	}
}

func TestChooseWithoutHealthy(t *testing.T) {
	a := testApp(5)
	for _, i := range a.Instances {
		i.State.Handshake.Store(testUnix - 1800)
	}
	for _, topN := range []int{0, 3} {
		c := Candidates{n: 2}
		sel := testSel
		sel.TopN = topN
		if a.Choose(&c, sel, testUnix, testMono); c.Len() != 0 {
			t.Errorf("top %d: %d candidates", topN, c.Len())
		}
	}
}

// The way of a connection has no room for garbage.
func TestChooseDoesNotAllocate(t *testing.T) {
	a := testApp(50)
	var c Candidates
	if n := testing.AllocsPerRun(100, func() { a.Choose(&c, testSel, testUnix, testMono) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestFilter(t *testing.T) {
	a := testApp(12)
	var c Candidates
	for _, i := range a.Instances {
		c.Add(i)
	}
	if c.Len() != MaxCandidates {
		t.Fatalf("%d candidates", c.Len())
	}
	c.Filter(func(i *Instance) bool { return i == a.Instances[1] || i == a.Instances[7] })
	if got := list(&c); !slices.Equal(got, []*Instance{a.Instances[1], a.Instances[7]}) {
		t.Errorf("left %v", got)
	}
	c.Filter(func(*Instance) bool { return false })
	if c.Len() != 0 {
		t.Errorf("%d left", c.Len())
	}
}

func BenchmarkChoose(b *testing.B) {
	for _, n := range []int{1, 4, 24, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			a := testApp(n)
			var c Candidates
			for b.Loop() {
				a.Choose(&c, testSel, testUnix, testMono)
			}
		})
	}
}
