package gateway

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// TestChurn: with 10,000 instances, 1,000 of them change their key every second for 5 s. Traffic does not notice, every
// change is durable, and a new instance is reached as soon as it has its answer.
func TestChurn(t *testing.T) {
	const (
		instances = 10_000
		rate      = 1_000
		seconds   = 5
		callers   = 64 // a registration waits up to 25 ms for its turn at the tunnels
	)
	g := startGateway(t, settings{"core.proxy.port_policy_fetch.max_retries": 0})
	pages(t, 8086, "app")
	v := newGuest(t, "page")
	ip, _ := v.register(t, g)

	register := func(i int) (time.Duration, error) {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return 0, err
		}
		began := time.Now()
		a, err := ask(plainClient, "POST", "http://"+g.addr(debugPort)+"/prpc/RegisterCvm?json", fmt.Sprintf(`{"client_public_key":%q,"app_id":"app%d","instance_id":"inst%d"}`, key.PublicKey(), i/10, i))
		if err == nil && a.status != 200 {
			err = fmt.Errorf("%+v", a)
		}
		return time.Since(began), err
	}
	// each calls f(0..n-1) from callers goroutines, at most pace a second.
	each := func(n, pace int, f func(i int)) {
		next := make(chan int)
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				for i := range next {
					f(i)
				}
			})
		}
		began := time.Now()
		for i := range n {
			if pace > 0 {
				time.Sleep(time.Until(began.Add(time.Duration(i) * time.Second / time.Duration(pace))))
			}
			next <- i
		}
		close(next)
		wg.Wait()
	}
	pid := g.proc.cmd.Process.Pid
	began, used := time.Now(), cpu(t, pid)
	each(instances, 0, func(i int) {
		if _, err := register(i); err != nil {
			t.Error(err)
		}
	})
	t.Logf("%d registrations in %s, %s of processor time each", instances, time.Since(began).Round(time.Millisecond), (cpu(t, pid)-used)/instances)

	// traffic makes requests one after the other until stop.
	traffic := func(stop <-chan struct{}) (took []time.Duration) {
		for {
			select {
			case <-stop:
				return took
			default:
			}
			began := time.Now()
			if page, err := g.get(v.instance+"-8086", 5*time.Second); err != nil || page != ip.String()+" app" {
				t.Errorf("traffic: %v %q", err, page)
			}
			took = append(took, time.Since(began))
			time.Sleep(2 * time.Millisecond)
		}
	}
	measure := func(during func()) []time.Duration {
		stop := make(chan struct{})
		done := make(chan []time.Duration)
		go func() { done <- traffic(stop) }()
		during()
		close(stop)
		return <-done
	}
	quiet := measure(func() { time.Sleep(2 * time.Second) })
	var mu sync.Mutex
	var took []time.Duration
	began, used = time.Now(), cpu(t, pid)
	busy := measure(func() {
		each(rate*seconds, rate, func(i int) {
			d, err := register(i)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			took = append(took, d)
			mu.Unlock()
		})
	})
	spent, used := time.Since(began), cpu(t, pid)-used

	// From a guest's answer to its page, while others churn.
	var guests []*guest
	for i := range 20 {
		guests = append(guests, newGuest(t, fmt.Sprint("new ", i)))
	}
	var routable []time.Duration
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				register(i)
			}
		}
	})
	for _, n := range guests {
		ip, _ := n.register(t, g)
		began := time.Now()
		for {
			page, err := g.get(n.instance+"-8086", 5*time.Second)
			if err == nil && page == ip.String()+" app" {
				break
			}
			if time.Since(began) > 5*time.Second {
				t.Fatalf("%s is not reached: %v %q", ip, err, page)
			}
		}
		routable = append(routable, time.Since(began))
	}
	close(stop)
	wg.Wait()

	t.Logf("%d changes in %s: p50 %s p99 %s, %s of processor time each, traffic included", len(took), spent.Round(time.Millisecond), percentile(took, 50), percentile(took, 99), used/time.Duration(len(took)))
	t.Logf("a request: p50 %s p99 %s without changes, p50 %s p99 %s with", percentile(quiet, 50), percentile(quiet, 99), percentile(busy, 50), percentile(busy, 99))
	t.Logf("from answer to page: p50 %s, at most %s", percentile(routable, 50), percentile(routable, 100))
	// Generous: client, server and gateway share two processors with whatever else runs.
	if spent > 2*seconds*time.Second && !raced() {
		t.Errorf("%d changes took %s: not %d a second", rate*seconds, spent, rate)
	}
	if p := percentile(took, 99); p > time.Second {
		t.Errorf("p99 of a registration: %s", p)
	}
	if q, b := percentile(quiet, 99), percentile(busy, 99); b > max(20*q, 400*time.Millisecond) {
		t.Errorf("p99 of a request went from %s to %s", q, b)
	}
	if p := percentile(routable, 75); p > 100*time.Millisecond {
		t.Errorf("from answer to page: p75 %s", p)
	}
	within(t, 10*time.Second, func() error {
		if n := strings.Count(string(read(t, g.path("wg.conf"))), "[Peer]"); n != instances+1+len(guests) {
			return fmt.Errorf("%d peers in the peer file", n)
		}
		return nil
	})
	before := g.debug("GetProxyState", "")
	g.kill()
	began = time.Now()
	g.start()
	t.Logf("started with %d instances in %s", instances, time.Since(began).Round(time.Millisecond))
	if after := g.debug("GetProxyState", ""); after != before {
		t.Errorf("kill -9 changed the state: %d bytes before, %d after", len(before), len(after))
	}
}

func percentile(d []time.Duration, p int) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[min(len(s)*p/100, len(s)-1)].Round(10 * time.Microsecond)
}
