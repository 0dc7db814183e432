package wireguard

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestTableAge(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	if _, ok := new(Table).Age(testKey(1), now); ok {
		t.Error("an empty table knows an age")
	}
	for _, tc := range []struct {
		name string
		last time.Time
		want time.Duration
		ok   bool
	}{
		{"never", time.Time{}, 0, false},
		{"a minute ago", now.Add(-time.Minute), time.Minute, true},
		{"in the future", now.Add(time.Hour), 0, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tb := &Table{Peers: map[wgtypes.Key]PeerState{testKey(1): {LastHandshake: tc.last}}}
			got, ok := tb.Age(testKey(1), now)
			if got != tc.want || ok != tc.ok {
				t.Errorf("got %v %v, want %v %v", got, ok, tc.want, tc.ok)
			}
		})
	}
}

func TestRefreshPublishesTables(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		opt := testOptions()
		var mu sync.Mutex
		var tables []*Table
		opt.OnRefresh = func(tb *Table) {
			mu.Lock()
			defer mu.Unlock()
			tables = append(tables, tb)
		}
		d := openFake(t, opt, dev, &fakeLinks{})
		if tb := d.Handshakes(); tb == nil || !tb.Taken.IsZero() {
			t.Fatalf("before the first reading: %+v", tb)
		}
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		hs := time.Now().Add(-time.Second)
		for n := 1; n < 3; n++ {
			dev.edit(testKey(n), func(p *devPeer) {
				p.handshake, p.rx, p.tx, p.endpoint = hs, 100, 200, netip.MustParseAddrPort("192.0.2.1:9182")
			})
		}
		if err := d.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		first := d.Handshakes()
		p := first.Peers[testKey(1)]
		if p.LastHandshake != hs || p.RxBytes != 100 || p.TxBytes != 200 || p.Endpoint.String() != "192.0.2.1:9182" {
			t.Errorf("got %+v", p)
		}
		if p.LastRx != hs {
			t.Errorf("first reading: LastRx %v, want the handshake %v", p.LastRx, hs)
		}

		// Peer 1 goes on receiving, peer 2 falls silent.
		time.Sleep(5 * time.Second)
		dev.edit(testKey(1), func(p *devPeer) { p.rx += 32 })
		time.Sleep(9 * time.Second) // at least one reading
		second := d.Handshakes()
		if second == first {
			t.Fatal("no refresh within 11 s")
		}
		if got := second.Peers[testKey(1)].LastRx; got != second.Taken {
			t.Errorf("LastRx of a live peer is %v, want %v", got, second.Taken)
		}
		if got := second.Peers[testKey(2)].LastRx; got != hs {
			t.Errorf("LastRx of a silent peer is %v, want %v", got, hs)
		}
		if first.Peers[testKey(1)].RxBytes != 100 {
			t.Error("a published table was changed")
		}

		// A device that does not answer leaves the table as it is.
		dev.set(func() { dev.fail = errors.New("no answer") })
		time.Sleep(time.Minute)
		if d.Handshakes() != second {
			t.Error("a failed refresh replaced the table")
		}
		dev.set(func() { dev.fail = nil })
		time.Sleep(11 * time.Second)
		if d.Handshakes() == second {
			t.Error("the table stayed old after the device came back")
		}
		mu.Lock()
		defer mu.Unlock()
		if len(tables) < 3 || tables[0] != first {
			t.Errorf("OnRefresh saw %d tables", len(tables))
		}
	})
}

// A new instance becomes visible within about a second of its handshake; once
// nobody is awaited, reading goes back to every 10 s, and so it does when an
// instance never calls in.
func TestFastRefreshForNewInstances(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		d := openFake(t, testOptions(), dev, &fakeLinks{})
		if err := d.Sync(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		dumpsIn := func(span time.Duration) int {
			_, before := dev.requests()
			time.Sleep(span)
			_, after := dev.requests()
			return after - before
		}
		if n := dumpsIn(time.Minute); n < 5 || n > 7 {
			t.Errorf("%d readings in a quiet minute, want 6", n)
		}
		time.Sleep(4 * time.Second)
		if err := d.Apply(t.Context(), testPeer(1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		dev.edit(testKey(1), func(p *devPeer) { p.handshake = time.Now() })
		time.Sleep(1100 * time.Millisecond)
		if _, ok := d.Handshakes().Age(testKey(1), time.Now()); !ok {
			t.Error("the handshake was not seen within 1.1 s")
		}
		if n := dumpsIn(time.Minute); n > 7 {
			t.Errorf("%d readings in the minute after, want 6", n)
		}
		if err := d.Apply(t.Context(), testPeer(2)); err != nil {
			t.Fatal(err)
		}
		if n := dumpsIn(time.Minute); n < 50 {
			t.Errorf("%d readings in the minute an instance is awaited, want about 60", n)
		}
		if n := dumpsIn(time.Minute); n > 8 {
			t.Errorf("%d readings in the minute after that, want 6", n)
		}
		// Removed while awaited.
		if err := d.Apply(t.Context(), testPeer(3)); err != nil {
			t.Fatal(err)
		}
		d.Remove(testKey(3))
		time.Sleep(2 * time.Second)
		if n := dumpsIn(time.Minute); n > 8 {
			t.Errorf("%d readings a minute for an instance that is gone", n)
		}
	})
}

// Counters never fall, whatever happens to peers.
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		reg := prometheus.NewPedanticRegistry()
		opt := testOptions()
		opt.Registerer = reg
		d := openFake(t, opt, dev, &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		count := func(n int, rx, tx uint64) {
			dev.edit(testKey(n), func(p *devPeer) { p.rx, p.tx = rx, tx })
		}
		step := func(rx, tx, peers float64) {
			t.Helper()
			if err := d.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			m := gather(t, reg)
			if m["dstack_gateway_wg_rx_bytes_total"] != rx || m["dstack_gateway_wg_tx_bytes_total"] != tx || m["dstack_gateway_wg_peers"] != peers {
				t.Errorf("rx %v tx %v peers %v, want %v %v %v", m["dstack_gateway_wg_rx_bytes_total"],
					m["dstack_gateway_wg_tx_bytes_total"], m["dstack_gateway_wg_peers"], rx, tx, peers)
			}
		}
		count(1, 1000, 500)
		count(2, 10, 5)
		step(1010, 505, 2)
		count(1, 1500, 600)
		step(1510, 605, 2)
		d.Remove(testKey(1))
		settle()
		step(1510, 605, 1)
		if err := d.Apply(t.Context(), testPeer(1)); err != nil {
			t.Fatal(err)
		}
		count(1, 7, 3) // from zero again
		step(1517, 608, 2)
		count(2, 4, 9) // reset by somebody between two readings
		step(1521, 617, 2)

		d.Upsert(Peer{ID: "no key", IP: testIP(1)})
		other := testPeer(50)
		other.IP = testIP(2)
		if err := d.Apply(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		dev.set(func() { dev.fail = errors.New("broken") })
		if err := d.Apply(t.Context(), testPeer(51)); err == nil {
			t.Fatal("no error")
		}
		dev.set(func() { dev.fail = nil })
		m := gather(t, reg)
		for name, want := range map[string]float64{
			"wg_reconfigure_failures_total": 1,
			"wg_invalid_peers_total":        1,
			"wg_evicted_peers_total":        1,
			"wg_repairs_total":              0,
			"wg_refresh_failures_total":     0,
			"wg_peer_file_failures_total":   0,
			"wg_device_dropped_total/rx":    0,
			"wg_device_dropped_total/tx":    0,
		} {
			got, ok := m["dstack_gateway_"+name]
			if !ok || got != want {
				t.Errorf("%s is %v (present: %v), want %v", name, got, ok, want)
			}
		}
		if m["dstack_gateway_wg_reconfigure_total"] < 4 {
			t.Errorf("wg_reconfigure_total is %v", m["dstack_gateway_wg_reconfigure_total"])
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if m := gather(t, reg); len(m) != 0 {
			t.Errorf("after Close metrics are left: %v", m)
		}
	})
}

// gather returns name[/direction] -> value.
func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range fams {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "/" + l.GetValue()
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

func counterValue(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}
