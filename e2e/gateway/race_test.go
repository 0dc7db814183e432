package gateway

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestRaces: a short life of everything at once in a binary with the race detector. Its reports fail the test that owns
// the log, this one.
func TestRaces(t *testing.T) {
	t.Parallel()
	g := newGateway(t, settings{"core.auth.enabled": false})
	need(t, "gcc")
	g.bin = filepath.Join(g.dir, "dstack-gw-race")
	if err := buildAs(g.bin, true); err != nil {
		t.Fatal(err)
	}
	pages(t, 8087, "app")
	g.start()
	var guests []*guest
	for i := range 8 {
		guests = append(guests, newGuest(t, fmt.Sprint("race ", i)))
		guests[i].register(t, g)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	forever := func(f func(i int)) {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					f(i)
				}
			}
		})
	}
	forever(func(i int) { guests[i%8].register(t, g) })
	forever(func(i int) { // changes
		g.debug("RegisterCvm", fmt.Sprintf(`{"client_public_key":%q,"app_id":"app","instance_id":"i%d"}`, newKey(t).PublicKey(), i%4))
	})
	for range 2 {
		forever(func(i int) {
			if page, err := g.get(guests[i%8].instance+"-8087", 10*time.Second); err != nil {
				t.Errorf("%v %q", err, page)
			}
		})
	}
	forever(func(int) { g.get("gateway", 10*time.Second) }) // 404
	forever(func(i int) { g.tlsTo(fmt.Sprintf("n%d.nowhere.example", i), 10*time.Second) })
	forever(func(i int) {
		g.admin("Status", "")
		g.admin("GetMeta", "")
		g.admin("SetInstancePortPolicy", fmt.Sprintf(`{"instance_id":%q,"policy":{"ports":[{"port":%d,"pp":false}],"restrict_mode":false}}`, guests[i%8].instance, 1+i%100))
		g.admin("ReloadCert", "")
		if a, err := g.tryAdmin("GET", "/metrics", ""); err != nil || a.status != 200 {
			t.Errorf("/metrics: %v %d", err, a.status)
		}
		if a, err := g.tryAdmin("GET", "/", ""); err != nil || a.status != 200 {
			t.Errorf("dashboard: %v %d", err, a.status)
		}
	})
	time.Sleep(time.Second)
	web(t).issue(t, "*."+base).write(t, g.path("proxy.crt"), g.path("proxy.key"))
	time.Sleep(3 * time.Second)
	close(stop)
	wg.Wait()
	if code := g.stop(); code != 0 {
		t.Errorf("exit code %d", code) // 66: the detector's
	}
	g.start()
	if err := os.Remove(g.path("proxy.crt")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2500 * time.Millisecond)
	g.logged("reloading the static certificate failed")
	g.stop()
}
