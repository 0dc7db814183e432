package registry

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// A consumer that applies what Take says must end with the registry's own list,
// whatever happened in between.
func TestFeedMirrorsRegistry(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		now := time.Unix(1_700_000_000, 0)
		r, err := New(defaults(), func() time.Time { return now })
		if err != nil {
			t.Fatal(err)
		}
		f := r.Follow()
		mirror := map[string]Instance{}
		take := func() {
			changed, removed, all := f.Take()
			if all {
				clear(mirror)
			}
			for _, i := range changed {
				mirror[i.ID] = i
			}
			for _, id := range removed {
				delete(mirror, id)
			}
		}
		for step := range 300 {
			id := fmt.Sprintf("i%d", rng.IntN(20))
			switch rng.IntN(10) {
			case 0:
				r.Remove(id)
			case 1:
				r.Load(r.List())
			case 2:
				_, _, _ = r.SetAdminPolicy(id, &PortPolicy{Restrict: step%2 == 0})
			default:
				_, _ = r.Register(Request{AppID: "app", InstanceID: id, PublicKey: key(rng.IntN(40))})
			}
			if rng.IntN(3) == 0 {
				take()
			}
		}
		take()
		list := r.List()
		if len(list) != len(mirror) {
			t.Fatalf("seed %d: registry has %d instances, mirror %d", seed, len(list), len(mirror))
		}
		for _, i := range list {
			if !mirror[i.ID].Equal(i) {
				t.Fatalf("seed %d: mirror has %+v, registry %+v", seed, mirror[i.ID], i)
			}
		}
		f.Close()
		if len(r.feeds) != 0 {
			t.Fatal("a closed feed is still fed")
		}
	}
}
