package gateway

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// TestKill9: the process is killed ten times in a row in the middle of registrations and traffic. Every acknowledged
// registration is there afterwards with its address and its key or a later one, and traffic goes on within 3 s.
func TestKill9(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	pages(t, 8084, "app")
	type state struct {
		*guest
		mu   sync.Mutex
		ip   netip.Addr
		keys []string // of the last answer, and of all questions without one since
	}
	const writers, each, rounds = 4, 25, 10
	var all []*state
	for i := range writers * each {
		all = append(all, &state{guest: newGuest(t, fmt.Sprint("crash ", i))})
	}
	// Every registration brings a new key, as those of old guests do.
	register := func(s *state) error {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.keys = append(s.keys, key.PublicKey().String())
		s.mu.Unlock()
		a, err := ask(s.http, "POST", g.rpcURL("/prpc/RegisterCvm?json"), fmt.Sprintf(`{"client_public_key":%q%s}`, key.PublicKey(), openPolicy))
		if err != nil {
			return err // killed: not acknowledged
		}
		if a.status != 200 {
			t.Errorf("refused: %+v", a)
			return nil
		}
		var r struct {
			WG struct {
				IP netip.Addr `json:"client_ip"`
			}
		}
		if err := json.Unmarshal([]byte(a.body), &r); err != nil {
			t.Errorf("an answer was cut off but came with its length: %v", err)
			return nil
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ip.IsValid() && s.ip != r.WG.IP {
			t.Errorf("%s had %s and is told %s", s.instance, s.ip, r.WG.IP)
		}
		s.ip, s.keys = r.WG.IP, []string{key.PublicKey().String()}
		return nil
	}
	var acked atomic.Int64
	var slowest time.Duration
	for round := range rounds {
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := 0; ; i++ {
					if register(all[w*each+i%each]) != nil {
						return
					}
					acked.Add(1)
				}
			})
		}
		wg.Go(func() { // traffic
			for g.proc.alive() {
				s := all[0]
				s.mu.Lock()
				ip := s.ip
				s.mu.Unlock()
				if !ip.IsValid() {
					continue
				}
				if page, err := g.get(s.instance+"-8084", 5*time.Second); err == nil && page != ip.String()+" app" {
					t.Errorf("a wrong page: %q", page)
				}
			}
		})
		time.Sleep(time.Duration(100+rand.IntN(300)) * time.Millisecond)
		g.kill()
		wg.Wait()

		began := time.Now()
		g.launch()
		for _, s := range all {
			if !s.ip.IsValid() {
				continue
			}
			for {
				page, err := g.get(s.instance+"-8084", 5*time.Second)
				if err == nil && page == s.ip.String()+" app" {
					break
				}
				if time.Since(began) > 3*time.Second {
					t.Fatalf("round %d: no traffic to %s 3 s after the start: %v %q", round, s.ip, err, page)
				}
				time.Sleep(5 * time.Millisecond)
			}
			slowest = max(slowest, time.Since(began))
			break
		}
		var have struct {
			Instances []struct {
				ID  string     `json:"instance_id"`
				IP  netip.Addr `json:"ip"`
				Key string     `json:"public_key"`
			}
		}
		within(t, 10*time.Second, func() error {
			a, err := ask(plainClient, "GET", "http://"+g.addr(debugPort)+"/prpc/GetProxyState", "")
			if err == nil {
				err = json.Unmarshal([]byte(a.body), &have)
			}
			return err
		})
		found := map[string]int{}
		for i, h := range have.Instances {
			found[h.ID] = i
		}
		for _, s := range all {
			i, ok := found[s.instance]
			if !s.ip.IsValid() {
				continue
			}
			if !ok {
				t.Errorf("round %d: %s is lost", round, s.ip)
			} else if h := have.Instances[i]; h.IP != s.ip || !slices.Contains(s.keys, h.Key) {
				t.Errorf("round %d: %s is there with %s, not with one of %v", round, h.IP, h.Key, s.keys)
			}
		}
	}
	t.Logf("%d registrations acknowledged, %d kills, traffic %s after a start at the latest", acked.Load(), rounds, slowest.Round(time.Millisecond))
}

// TestInterruptedStarts: a gateway that is asked to end while it starts ends soon and in order, however often; that is no
// evidence against its database.
func TestInterruptedStarts(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	pages(t, 8088, "app")
	l := &ledger{t, g, 8088, map[*guest]netip.Addr{}}
	l.register("interrupted", 5)
	g.kill()
	codes := map[int]int{}
	for i := range 20 {
		g.launch()
		time.Sleep(time.Duration(10+8*i) * time.Millisecond)
		began := time.Now()
		code := g.proc.end(syscall.SIGTERM)
		codes[code]++ // -1: the signal came before anybody could be asked
		if d := time.Since(began); d > 3*time.Second || code > 0 {
			t.Errorf("a start that ends after %d ms: exit code %d after %s", 10+8*i, code, d)
		}
	}
	t.Logf("exit codes: %v", codes)
	g.start()
	l.check("after 20 interrupted starts")
	if strings.Contains(g.log(), "DAMAGED") {
		t.Errorf("the database was taken for damaged:\n%s", g.log())
	}
}
