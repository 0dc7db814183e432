package wireguard

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestEndpointFileRoundTrip(t *testing.T) {
	f := EndpointFile(filepath.Join(t.TempDir(), "deep", "endpoints.json"))
	if m, err := f.LoadEndpoints(); err != nil || len(m) != 0 {
		t.Fatalf("a missing file gives %v, %v", m, err)
	}
	want := map[wgtypes.Key]EndpointRec{
		testKey(1): {netip.MustParseAddrPort("192.0.2.7:9182"), time.Unix(1_700_000_000, 0)},
		testKey(2): {netip.MustParseAddrPort("[2001:db8::7]:51820"), time.Unix(1_700_000_001, 0)},
	}
	if err := f.SaveEndpoints(want); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(string(f)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v, want 0600", fi.Mode(), err)
	}
	got, err := f.LoadEndpoints()
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestParseEndpoints(t *testing.T) {
	key := testKey(1).String()
	entry := func(key, ep string) string {
		return `{"version":1,"peers":[{"public_key":"` + key + `","endpoint":"` + ep + `","last_handshake":1700000000}]}`
	}
	for _, tc := range []struct {
		name, text string
		n          int
		bad        bool
	}{
		{"one", entry(key, "192.0.2.1:1"), 1, false},
		{"empty", `{"version":1}`, 0, false},
		{"bad key", entry("AAAA", "192.0.2.1:1"), 0, false},
		{"bad endpoint", entry(key, "192.0.2.1"), 0, false},
		{"port 0", entry(key, "192.0.2.1:0"), 0, false},
		{"multicast", entry(key, "224.0.0.1:1"), 0, false},
		{"unspecified", entry(key, "0.0.0.0:1"), 0, false},
		{"half a file", entry(key, "192.0.2.1:1")[:40], 0, true},
		{"another version", `{"version":2}`, 0, true},
		{"not JSON", "\x00", 0, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, err := parseEndpoints([]byte(tc.text))
			if len(m) != tc.n || (err != nil) != tc.bad {
				t.Errorf("got %v, %v", m, err)
			}
		})
	}
}

func FuzzParseEndpoints(f *testing.F) {
	f.Add([]byte(`{"version":1,"peers":[{"public_key":"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=","endpoint":"192.0.2.1:1","last_handshake":1700000000}]}`))
	f.Add([]byte(`{"version":1,"peers":[{"endpoint":"[fe80::1%eth0]:1"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := parseEndpoints(text)
		if err != nil && m != nil {
			t.Fatal("an error and a result")
		}
		for _, e := range m {
			if !e.Endpoint.IsValid() || e.Endpoint.Port() == 0 {
				t.Fatalf("endpoint %v came through", e.Endpoint)
			}
		}
	})
}

// memStore is an EndpointStore that counts.
type memStore struct {
	mu    sync.Mutex
	m     map[wgtypes.Key]EndpointRec
	saves int
	fail  error
}

func (s *memStore) LoadEndpoints() (map[wgtypes.Key]EndpointRec, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m, s.fail
}

func (s *memStore) SaveEndpoints(m map[wgtypes.Key]EndpointRec) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.saves++
	if s.fail != nil {
		return s.fail
	}
	s.m = m
	return nil
}

func (s *memStore) saved() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.saves
}

// One life ends, the next gives each peer its endpoint back, the most recently
// heard first, but not one that has been silent for an hour.
func TestEndpointsSurviveARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		opt := testOptions()
		opt.Endpoints = store
		ep := func(n int) netip.AddrPort {
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 9182)
		}

		dev := newFakeDevice()
		d := openFake(t, opt, dev, &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(1, 6)); err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		for n, age := range map[int]time.Duration{1: time.Minute, 2: time.Second, 3: 2 * time.Hour, 4: time.Hour / 2} {
			dev.edit(testKey(n), func(p *devPeer) { p.endpoint, p.handshake = ep(n), now.Add(-age) })
		}
		time.Sleep(31 * time.Second) // saved without Close: the process may die
		if store.saved() == 0 {
			t.Fatal("nothing was saved within 31 s")
		}

		second := newFakeDevice()
		d2 := openFake(t, opt, second, &fakeLinks{})
		if err := d2.Sync(t.Context(), testPeers(1, 6)); err != nil {
			t.Fatal(err)
		}
		for n, want := range map[int]netip.AddrPort{1: ep(1), 2: ep(2), 3: {}, 4: ep(4), 5: {}} {
			if got := second.peer(testKey(n)).endpoint; got != want {
				t.Errorf("peer %d got endpoint %v, want %v", n, got, want)
			}
		}
		var order []wgtypes.Key
		for _, pc := range second.applies[len(second.applies)-1].peers[:3] {
			order = append(order, pc.key)
		}
		if order[0] != testKey(2) || order[1] != testKey(1) || order[2] != testKey(4) {
			t.Errorf("the order is %v, want the most recently heard first", order)
		}

		// A peer that registers after Sync gets its endpoint too.
		third := newFakeDevice()
		d3 := openFake(t, opt, third, &fakeLinks{})
		if err := d3.Sync(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if err := d3.Apply(t.Context(), testPeer(2)); err != nil {
			t.Fatal(err)
		}
		if got := third.peer(testKey(2)).endpoint; got != ep(2) {
			t.Errorf("endpoint %v, want %v", got, ep(2))
		}

		// A peer that is there without endpoint gets it, one that roamed keeps its own.
		fourth := newFakeDevice()
		fourth.put(peerChange{key: testKey(1), ip: testIP(1)})
		fourth.put(peerChange{key: testKey(2), ip: testIP(2), endpoint: ep(200)})
		d4 := openFake(t, opt, fourth, &fakeLinks{link: &linkInfo{kind: "wireguard"}})
		if err := d4.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		if got := fourth.peer(testKey(1)).endpoint; got != ep(1) {
			t.Errorf("endpoint %v, want %v", got, ep(1))
		}
		if got := fourth.peer(testKey(2)).endpoint; got != ep(200) {
			t.Errorf("a current endpoint was overwritten with %v", got)
		}
	})
}

func TestEndpointsAreSavedSparingly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memStore{}
		opt := testOptions()
		opt.Endpoints = store
		dev := newFakeDevice()
		d := openFake(t, opt, dev, &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(1, 2)); err != nil {
			t.Fatal(err)
		}
		shake := func(ep string) {
			dev.edit(testKey(1), func(p *devPeer) { p.endpoint, p.handshake = netip.MustParseAddrPort(ep), time.Now() })
		}
		for range 120 { // an hour of a steady tunnel
			shake("192.0.2.1:1")
			time.Sleep(30 * time.Second)
		}
		if n := store.saved(); n < 2 || n > 6 {
			t.Errorf("saved %d times in a steady hour, want about 4", n)
		}
		before := store.saved()
		for n := range 60 { // a minute of roaming
			shake(netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(n+1)).String())
			time.Sleep(time.Second)
		}
		if n := store.saved() - before; n > 3 {
			t.Errorf("saved %d times in a minute", n)
		}
		// Roaming just before the end is not lost.
		shake("192.0.2.99:9")
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if got := store.m[testKey(1)].Endpoint.String(); got != "192.0.2.99:9" {
			t.Errorf("Close saved %s", got)
		}
	})
}

func TestUnreadableEndpointsAreSurvivable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opt := testOptions()
		opt.Endpoints = &memStore{fail: errors.New("disk on fire")}
		dev := newFakeDevice()
		d := openFake(t, opt, dev, &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(1, 2)); err != nil {
			t.Fatal(err)
		}
		dev.edit(testKey(1), func(p *devPeer) { p.endpoint, p.handshake = netip.MustParseAddrPort("192.0.2.1:1"), time.Now() })
		time.Sleep(2 * time.Minute)
		wantHolds(t, dev, testPeer(1))
	})
}
