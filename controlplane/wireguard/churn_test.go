package wireguard

import (
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun/tuntest"
)

// openChurn is a userspace device with n peers and no network: a TUN interface
// that is a channel, and a UDP port nobody knows.
func openChurn(tb testing.TB, n int) *Device {
	opt := testOptions()
	opt.ListenPort = 0
	opt.ConfigPath = filepath.Join(tb.TempDir(), "wg.conf")
	opt.Mode = Userspace
	links := &fakeLinks{}
	d, err := open(tb.Context(), opt, system{
		links: links,
		user: func(d *Device) (backend, error) {
			u := newUserspace(tuntest.NewChannelTUN().TUN(), conn.NewDefaultBind(), "", d.log)
			if err := u.apply(d.ownConfig()); err != nil {
				return nil, err
			}
			links.set(&linkInfo{kind: "tuntap", up: true})
			return u, u.up()
		},
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { d.Close() })
	if err := d.Sync(tb.Context(), testPeers(0, n)); err != nil {
		tb.Fatal(err)
	}
	return d
}

// 10,000 peers, 1,000 registrations a second: what one registration waits and
// costs, with handshake tables and peer files made beside it as in production.
//
//	go test -run - -bench Churn -benchtime 5000x
func BenchmarkChurn(b *testing.B) {
	const n, perSecond = 10_000, 1000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start := time.Now()
	d := openChurn(b, n)
	b.Logf("Sync of %d peers: %v", n, time.Since(start))
	runtime.GC()
	runtime.ReadMemStats(&after)
	perPeer := float64(after.HeapInuse+after.StackInuse-before.HeapInuse-before.StackInuse) / n
	start = time.Now()
	if err := d.Refresh(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.Logf("reading %d peers: %v", n, time.Since(start))

	waits := make([]time.Duration, b.N)
	var wg sync.WaitGroup
	cpu := cpuTime()
	b.ResetTimer()
	begin := time.Now()
	for i := range b.N {
		time.Sleep(time.Until(begin.Add(time.Duration(i) * time.Second / perSecond)))
		p := testPeer(n + i)
		old := testKey(i) // the population stays at 10,000
		if i%2 == 0 {     // half of them are re-keys of known instances
			p = testPeer(i)
			p.PublicKey = testKey(1_000_000 + i)
		}
		wg.Go(func() {
			start := time.Now()
			if err := d.Apply(b.Context(), p); err != nil {
				b.Error(err)
			}
			waits[i] = time.Since(start)
		})
		if i%2 == 1 {
			d.Remove(old)
		}
	}
	wg.Wait()
	b.StopTimer()
	cpu = cpuTime() - cpu
	slices.Sort(waits)
	b.ReportMetric(float64(waits[len(waits)/2].Microseconds())/1000, "ms-p50")
	b.ReportMetric(float64(waits[len(waits)*99/100].Microseconds())/1000, "ms-p99")
	b.ReportMetric(float64(cpu.Microseconds())/float64(b.N), "cpu-us/op")
	b.ReportMetric(perPeer/1024, "KiB/peer")
}

// The cost of a registration must not grow with the number of peers. Counting
// what reaches the device is exact where timing on a shared machine is not.
func TestRegistrationCostDoesNotGrow(t *testing.T) {
	sent := func(n int) int {
		dev := newFakeDevice()
		opt := testOptions()
		opt.RefreshInterval, opt.FastRefresh = time.Hour, time.Hour
		d := openFake(t, opt, dev, &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(0, n)); err != nil {
			t.Fatal(err)
		}
		before, dumps := dev.requests()
		for i := range 20 {
			p := testPeer(i)
			p.PublicKey = testKey(1_000_000 + i)
			p.IP = netip.AddrFrom4([4]byte{10, 200, 0, byte(i + 1)})
			if err := d.Apply(t.Context(), p); err != nil {
				t.Fatal(err)
			}
		}
		_, after := dev.requests()
		if after != dumps {
			t.Errorf("%d full reads during registrations", after-dumps)
		}
		total := 0
		for _, c := range dev.applies[before:] {
			total += len(c.peers)
		}
		return total
	}
	few, many := sent(30), sent(3000)
	if few != 40 || many != 40 {
		t.Errorf("20 re-keys sent %d and %d peer changes, want 40 (one removal, one addition each)", few, many)
	}
}
