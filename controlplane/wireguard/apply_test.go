package wireguard

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestCheckPeer(t *testing.T) {
	own := testPrivate.PublicKey()
	d := openFake(t, testOptions(), newFakeDevice(), &fakeLinks{})
	ok := testPeer(1)
	for _, tc := range []struct {
		name string
		edit func(*Peer)
		want string // part of the error, empty: accepted
	}{
		{"plain", func(*Peer) {}, ""},
		{"longest id", func(p *Peer) { p.ID = strings.Repeat("x", 128) }, ""},
		{"IPv4 in IPv6", func(p *Peer) { p.IP = netip.MustParseAddr("::ffff:10.8.0.1") }, ""},
		{"address outside the own network", func(p *Peer) { p.IP = netip.MustParseAddr("172.16.3.4") }, ""},
		{"empty id", func(p *Peer) { p.ID = "" }, "id is empty"},
		{"long id", func(p *Peer) { p.ID = strings.Repeat("x", 129) }, "129 bytes"},
		{"blank in id", func(p *Peer) { p.ID = "a b" }, "white space"},
		{"newline in id", func(p *Peer) { p.ID = "a\nPrivateKey = x" }, "white space"},
		{"no-break space in id", func(p *Peer) { p.ID = "a\u00a0b" }, "white space"},
		{"control character in id", func(p *Peer) { p.ID = "a\x00" }, "control"},
		{"id not UTF-8", func(p *Peer) { p.ID = "a\xff" }, "UTF-8"},
		{"zero key", func(p *Peer) { p.PublicKey = wgtypes.Key{} }, "all zero"},
		{"own key", func(p *Peer) { p.PublicKey = own }, "gateway's own"},
		{"no address", func(p *Peer) { p.IP = netip.Addr{} }, "unicast"},
		{"IPv6", func(p *Peer) { p.IP = netip.MustParseAddr("fd00::1") }, "unicast"},
		{"unspecified", func(p *Peer) { p.IP = netip.MustParseAddr("0.0.0.0") }, "unicast"},
		{"loopback", func(p *Peer) { p.IP = netip.MustParseAddr("127.0.0.1") }, "unicast"},
		{"multicast", func(p *Peer) { p.IP = netip.MustParseAddr("224.0.0.1") }, "unicast"},
		{"broadcast", func(p *Peer) { p.IP = netip.MustParseAddr("255.255.255.255") }, "unicast"},
		{"link-local", func(p *Peer) { p.IP = netip.MustParseAddr("169.254.0.1") }, "unicast"},
		{"own address", func(p *Peer) { p.IP = netip.MustParseAddr("10.8.255.254") }, "own address"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := ok
			tc.edit(&p)
			_, err := d.checkPeer(p)
			if tc.want == "" {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				return
			}
			if !errors.Is(err, ErrInvalidPeer) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want ErrInvalidPeer with %q", err, tc.want)
			}
		})
	}
}

// A start on an interface of an earlier life: strangers go, peers that are
// right are left alone, wrong ones are corrected, missing ones come.
func TestSyncCorrectsWhatItFinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		right, wrong, stranger := testPeer(1), testPeer(2), testPeer(9)
		dev.put(peerChange{key: right.PublicKey, ip: right.IP})
		dev.put(peerChange{key: wrong.PublicKey, ip: testIP(77)})
		dev.put(peerChange{key: stranger.PublicKey, ip: testIP(3)})
		d := openFake(t, testOptions(), dev, &fakeLinks{link: &linkInfo{kind: "wireguard", up: true}})

		settle()
		if n, _ := dev.requests(); n != 0 {
			t.Fatal("an adopted interface was changed before Sync")
		}
		want := testPeers(1, 4)
		if err := d.Sync(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		wantHolds(t, dev, want...)
		c := dev.applies[0]
		if c.privateKey == nil || *c.privateKey != testPrivate || c.listenPort == nil || *c.listenPort != 51820 {
			t.Error("Sync did not set private key and port")
		}
		if !c.peers[0].remove || c.peers[0].key != stranger.PublicKey {
			t.Errorf("the removal does not come first: %+v", c.peers)
		}
		for _, pc := range c.peers {
			if pc.key == right.PublicKey {
				t.Error("a peer that was right was touched")
			}
		}
		if st := d.Status(); st.Mode != Kernel || !st.Adopted || !st.Up || !st.InSync || st.Peers != 3 || st.Applied != 3 {
			t.Errorf("status %+v", st)
		}
		// Doing it again changes nothing.
		before, _ := dev.requests()
		if err := d.Sync(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		if after, _ := dev.requests(); after != before {
			t.Error("an unchanged Sync changed the device")
		}
	})
}

func TestAnyPortStaysWhatItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		opt := testOptions()
		opt.ListenPort = 0
		d := openFake(t, opt, dev, &fakeLinks{})
		dev.set(func() { dev.own.listenPort = 40001 }) // the kernel's choice
		for range 2 {
			if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
				t.Fatal(err)
			}
			settle()
		}
		if got := dev.own.listenPort; got != 40001 {
			t.Errorf("port %d, want it left at 40001", got)
		}
	})
}

func TestSyncLeavesOutBadRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		d := openFake(t, testOptions(), dev, &fakeLinks{})
		sameIP, sameKey, twice := testPeer(11), testPeer(12), testPeer(1)
		sameIP.IP = testIP(1)
		sameKey.PublicKey = testKey(2)
		twice.IP = testIP(99)
		err := d.Sync(t.Context(), []Peer{sameIP, sameKey, testPeer(1), testPeer(2), {ID: "bad id"}, twice})
		if !errors.Is(err, ErrInvalidPeer) {
			t.Fatalf("got %v", err)
		}
		for _, part := range []string{"inst-00011", "inst-00012", "bad id", "twice"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("the error does not name %q: %v", part, err)
			}
		}
		wantHolds(t, dev, testPeer(1), testPeer(2))
	})
}

func TestApplyIsImmediateWhenIdleAndBatchedWhenBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		d := openFake(t, testOptions(), dev, &fakeLinks{})
		if err := d.Sync(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		start := time.Now()
		if err := d.Apply(t.Context(), testPeer(1)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("a lone registration waited %v", took)
		}
		wantHolds(t, dev, testPeer(1))

		// 1,000 in one second, each waiting for its own.
		before, dumps := dev.requests()
		var wg sync.WaitGroup
		var worst time.Duration
		var mu sync.Mutex
		for n := 2; n < 1002; n++ {
			wg.Go(func() {
				time.Sleep(time.Duration(n) * time.Millisecond)
				start := time.Now()
				if err := d.Apply(t.Context(), testPeer(n)); err != nil {
					t.Error(err)
				}
				mu.Lock()
				worst = max(worst, time.Since(start))
				mu.Unlock()
			})
		}
		wg.Wait()
		applies, dumpsAfter := dev.requests()
		if got := applies - before; got > 41 {
			t.Errorf("%d reconfigurations a second, want at most 40", got)
		}
		if worst > 25*time.Millisecond {
			t.Errorf("a registration waited %v, want at most the batch window", worst)
		}
		if dumpsAfter-dumps > 3 {
			t.Errorf("%d full reads for 1,000 registrations", dumpsAfter-dumps)
		}
		total := 0
		for _, c := range dev.applies[before:] {
			total += len(c.peers)
		}
		if total != 1000 {
			t.Errorf("%d peer changes were sent for 1,000 registrations", total)
		}
		wantHolds(t, dev, testPeers(1, 1002)...)

		// A refresh that changes nothing costs nothing.
		before, _ = dev.requests()
		if err := d.Apply(t.Context(), testPeer(500)); err != nil {
			t.Fatal(err)
		}
		settle()
		if after, _ := dev.requests(); after != before {
			t.Error("an unchanged registration reached the device")
		}
	})
}

func TestChangesOfKeyAndAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		d := openFake(t, testOptions(), dev, &fakeLinks{})
		a, b := testPeer(1), testPeer(2)
		if err := d.Sync(t.Context(), []Peer{a, b}); err != nil {
			t.Fatal(err)
		}

		// A new key: the old peer goes in the same request.
		a.PublicKey = testKey(101)
		if err := d.Apply(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		wantHolds(t, dev, a, b)
		last := dev.applies[len(dev.applies)-1]
		if len(last.peers) != 2 || !last.peers[0].remove || last.peers[0].key != testKey(1) {
			t.Errorf("re-key sent %+v", last.peers)
		}

		// Two instances swap addresses in one batch.
		a.IP, b.IP = b.IP, a.IP
		if err := d.Upsert(a, b); err != nil {
			t.Fatal(err)
		}
		settle()
		wantHolds(t, dev, a, b)
		if n := counterValue(t, d.met.evicted); n != 0 {
			t.Errorf("a swap within one call evicted %v peers", n)
		}

		// A newcomer takes an address before the removal of its holder arrives.
		c := testPeer(3)
		c.IP = b.IP
		if err := d.Apply(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		wantHolds(t, dev, a, c)
		d.Remove(b.PublicKey)
		settle()
		wantHolds(t, dev, a, c)

		// A newcomer takes a key.
		e := testPeer(4)
		e.PublicKey = a.PublicKey
		if err := d.Apply(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		wantHolds(t, dev, c, e)

		d.Remove(c.PublicKey, e.PublicKey, testKey(12345))
		settle()
		wantHolds(t, dev)
	})
}

// Keepalives start when a peer calls in, or with the endpoint it is given back,
// and survive what else happens to it.
func TestKeepaliveWaitsForTheEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		opt := testOptions()
		ep := netip.MustParseAddrPort("192.0.2.1:1")
		opt.Endpoints = &memStore{m: map[wgtypes.Key]EndpointRec{testKey(2): {ep, time.Now()}, testKey(3): {ep, time.Now()}}}
		d := openFake(t, opt, dev, &fakeLinks{})
		check := func(n int, want time.Duration) {
			t.Helper()
			if got := dev.peer(testKey(n)).keepalive; got != want {
				t.Errorf("peer %d has keepalive %v, want %v", n, got, want)
			}
		}
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		if err := d.Apply(t.Context(), testPeer(3)); err != nil {
			t.Fatal(err)
		}
		check(1, 0)
		check(2, keepalive)
		check(3, keepalive)
		dev.edit(testKey(1), func(p *devPeer) { p.handshake, p.endpoint = time.Now(), ep })
		settle()
		check(1, keepalive)
		p := testPeer(1)
		p.IP = testIP(99)
		if err := d.Apply(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		check(1, keepalive)
		time.Sleep(time.Minute)
		if m := d.met.repaired; counterValue(t, m) != 0 {
			t.Error("starting keepalives was taken for somebody else's change")
		}
	})
}

func TestFailureIsRetriedFromADump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		var log logTo
		opt := testOptions()
		opt.Logger = slog.New(slog.NewTextHandler(&log, nil))
		opt.RefreshInterval, opt.FastRefresh = time.Hour, time.Hour
		d := openFake(t, opt, dev, &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		broken := errors.New("netlink says no")
		dev.set(func() { dev.fail = broken })
		if err := d.Apply(t.Context(), testPeer(3)); !errors.Is(err, broken) {
			t.Fatalf("got %v, want the device's error", err)
		}
		if st := d.Status(); st.InSync || st.LastError != "netlink says no" {
			t.Errorf("status %+v", st)
		}
		// Meanwhile the device lost a peer that was not in the batch.
		dev.set(func() { delete(dev.peers, testKey(1)) })
		_, dumps := dev.requests()
		time.Sleep(10 * time.Second)
		if _, after := dev.requests(); after-dumps < 9 || after-dumps > 13 {
			t.Errorf("%d reads in 10 s of failure, want one a second", after-dumps)
		}
		dev.set(func() { dev.fail = nil })
		start := time.Now()
		if err := d.Apply(t.Context(), testPeer(4)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("the retry came after %v", took)
		}
		wantHolds(t, dev, testPeers(1, 5)...)
		if st := d.Status(); !st.InSync || st.LastError != "" {
			t.Errorf("status %+v", st)
		}
		if n := strings.Count(log.String(), "configuring WireGuard failed"); n != 1 {
			t.Errorf("a failure of 10 s was logged %d times, want once", n)
		}
		if !strings.Contains(log.String(), "configuring WireGuard works again") {
			t.Error("recovery was not logged")
		}
	})
}

func TestApplyHonoursItsContextAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		d := openFake(t, testOptions(), dev, &fakeLinks{})
		if err := d.Sync(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		dev.set(func() { dev.fail = errors.New("broken") })
		if err := d.Apply(t.Context(), testPeer(1)); err == nil {
			t.Fatal("no error from a broken device")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := d.Apply(ctx, testPeer(2)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
		got := make(chan error)
		go func() { got <- d.Apply(context.Background(), testPeer(3)) }()
		synctest.Wait()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-got; !errors.Is(err, ErrClosed) {
			t.Errorf("a waiter got %v at Close", err)
		}
		if !dev.closed {
			t.Error("the backend was not closed")
		}
		if err := d.Apply(context.Background(), testPeer(4)); !errors.Is(err, ErrClosed) {
			t.Errorf("Apply after Close: %v", err)
		}
		if err := d.Sync(context.Background(), nil); !errors.Is(err, ErrClosed) {
			t.Errorf("Sync after Close: %v", err)
		}
		if err := d.Refresh(context.Background()); !errors.Is(err, ErrClosed) {
			t.Errorf("Refresh after Close: %v", err)
		}
		d.Remove(testKey(1))
	})
}

// A device that hangs does not hang the gateway's shutdown.
func TestCloseOfAHangingDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		d, err := open(t.Context(), testOptions(), fakeSystem(dev, &fakeLinks{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Sync(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		hang := make(chan struct{})
		dev.set(func() { dev.hang = hang })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := d.Apply(ctx, testPeer(1)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Apply: %v", err)
		}
		if d.Handshakes() == nil || d.Status().InSync {
			t.Error("readers are not served, or told that all is well")
		}
		start := time.Now()
		if err := d.Close(); err == nil || !strings.Contains(err.Error(), "not answered") {
			t.Errorf("Close: %v", err)
		}
		if took := time.Since(start); took > closeTimeout {
			t.Errorf("Close took %v", took)
		}
		close(hang)
	})
}

// An adopted interface that is not WireGuard must not slow registrations down,
// and is used as soon as it becomes one.
func TestUnmanagedInterface(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		dev.fail = ErrNotWireGuard
		links := &fakeLinks{link: &linkInfo{kind: "dummy", up: true}}
		d := openFake(t, testOptions(), dev, links)
		if st := d.Status(); st.Mode != Unmanaged || !strings.Contains(st.Reason, `"dummy"`) {
			t.Errorf("status %+v", st)
		}
		if err := d.Sync(t.Context(), testPeers(1, 3)); !errors.Is(err, ErrNotWireGuard) {
			t.Fatalf("Sync: %v", err)
		}
		start := time.Now()
		if err := d.Apply(t.Context(), testPeer(3)); !errors.Is(err, ErrNotWireGuard) {
			t.Fatalf("Apply: %v", err)
		}
		if took := time.Since(start); took != 0 {
			t.Errorf("Apply waited %v", took)
		}
		if links.removed != 0 {
			t.Error("the adopted interface was removed")
		}
		// An operator replaces it.
		dev.set(func() { dev.fail = nil })
		links.set(&linkInfo{kind: "wireguard", up: true})
		settle()
		wantHolds(t, dev, testPeers(1, 4)...)
		if st := d.Status(); st.Mode != Kernel || !st.InSync {
			t.Errorf("status %+v", st)
		}
	})
}

func TestDriftIsRepaired(t *testing.T) {
	for _, tc := range []struct {
		name string
		edit func(*fakeDevice)
	}{
		{"a peer was added", func(f *fakeDevice) { f.put(peerChange{key: testKey(66), ip: testIP(66)}) }},
		{"a peer was removed", func(f *fakeDevice) { delete(f.peers, testKey(2)) }},
		{"all peers were removed", func(f *fakeDevice) { clear(f.peers) }},
		{"an address was stolen", func(f *fakeDevice) { f.put(peerChange{key: testKey(1), ip: testIP(2)}) }},
		{"keepalive was switched off", func(f *fakeDevice) {
			p := f.peers[testKey(1)]
			p.keepalive = 0
			f.peers[testKey(1)] = p
		}},
		{"the private key was changed", func(f *fakeDevice) { f.own.privateKey = testKey(5) }},
		{"the port was changed", func(f *fakeDevice) { f.own.listenPort = 1 }},
		{"the interface was made anew", func(f *fakeDevice) { f.own = devState{}; clear(f.peers) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dev := newFakeDevice()
				d := openFake(t, testOptions(), dev, &fakeLinks{})
				if err := d.Sync(t.Context(), testPeers(1, 4)); err != nil {
					t.Fatal(err)
				}
				dev.edit(testKey(1), func(p *devPeer) { p.handshake, p.endpoint = time.Now(), netip.MustParseAddrPort("192.0.2.1:1") })
				time.Sleep(11 * time.Second)
				dev.set(func() { tc.edit(dev) })
				time.Sleep(11 * time.Second)
				wantHolds(t, dev, testPeers(1, 4)...)
				if p := dev.peer(testKey(1)); p.endpoint.IsValid() && p.keepalive != keepalive {
					t.Errorf("a live peer has keepalive %v", p.keepalive)
				}
				if dev.own.privateKey != testPrivate || dev.own.listenPort != 51820 {
					t.Error("key or port was not restored")
				}
				// And then there is peace.
				n, _ := dev.requests()
				time.Sleep(time.Minute)
				if after, _ := dev.requests(); after != n {
					t.Errorf("%d more reconfigurations without a cause", after-n)
				}
			})
		})
	}
}

// An interface of ours that somebody deletes is made again; an adopted one is
// left to whoever owns it.
func TestDeletedInterface(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		links := &fakeLinks{}
		dev := newFakeDevice()
		dev.links = links
		d := openFake(t, testOptions(), dev, links)
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		links.set(nil)
		dev.set(func() { dev.own = devState{}; clear(dev.peers) })
		time.Sleep(15 * time.Second)
		wantHolds(t, dev, testPeers(1, 3)...)
		if st := d.Status(); st.Mode != Kernel || st.Adopted || !st.Up || !st.InSync {
			t.Errorf("status %+v", st)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		dev := newFakeDevice()
		links := &fakeLinks{link: &linkInfo{kind: "wireguard", up: true}}
		d := openFake(t, testOptions(), dev, links)
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatal(err)
		}
		links.set(nil)
		dev.set(func() { dev.fail = ErrNotWireGuard; clear(dev.peers) })
		time.Sleep(15 * time.Second)
		if _, err := links.get(""); err == nil {
			t.Fatal("an adopted interface was created")
		}
		if st := d.Status(); st.Up || !strings.Contains(st.LastError, "gone") {
			t.Errorf("status %+v", st)
		}
		links.set(&linkInfo{kind: "wireguard", up: true})
		dev.set(func() { dev.fail = nil })
		settle()
		wantHolds(t, dev, testPeers(1, 3)...)
	})
}

// Random changes against a model, with failures in between: whatever happens,
// the device ends up with exactly the wanted peers.
func TestRandomChangesConverge(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			dev := newFakeDevice()
			d := openFake(t, testOptions(), dev, &fakeLinks{})
			model := map[string]Peer{}
			if err := d.Sync(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			for range 400 {
				switch r.IntN(12) {
				case 0:
					dev.set(func() { dev.fail = errors.New("broken") })
				case 1, 2:
					dev.set(func() { dev.fail = nil })
				case 3:
					dev.set(func() { delete(dev.peers, testKey(1+r.IntN(30))) })
				case 4:
					dev.set(func() { n := 1 + r.IntN(60); dev.put(peerChange{key: testKey(n), ip: testIP(n)}) })
				case 5, 6:
					k := testKey(1 + r.IntN(30))
					d.Remove(k)
					maps.DeleteFunc(model, func(_ string, p Peer) bool { return p.PublicKey == k })
				default:
					p := testPeer(1 + r.IntN(10))
					p.PublicKey = testKey(1 + r.IntN(30))
					p.IP = testIP(1 + r.IntN(15))
					maps.DeleteFunc(model, func(_ string, q Peer) bool { return q.PublicKey == p.PublicKey || q.IP == p.IP })
					model[p.ID] = p
					if err := d.Upsert(p); err != nil {
						t.Fatal(err)
					}
				}
				time.Sleep(time.Duration(r.IntN(40)) * time.Millisecond)
			}
			dev.set(func() { dev.fail = nil })
			time.Sleep(15 * time.Second)
			var want []Peer
			for _, p := range model {
				want = append(want, p)
			}
			wantHolds(t, dev, want...)
			if t.Failed() {
				t.Logf("seed %d", seed)
			}
		})
	}
}
