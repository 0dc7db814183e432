package wireguard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

func TestMain(m *testing.M) {
	if os.Getenv(guestEnv) != "" {
		runGuest()
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeDevice behaves as WireGuard does: an address given to one peer leaves the
// other. It counts requests and fails on demand.
type fakeDevice struct {
	mu      sync.Mutex
	own     devState
	peers   map[wgtypes.Key]devPeer
	applies []change
	dumps   int
	fail    error         // of apply and dump
	links   *fakeLinks    // if set, the device is there only while its link is
	hang    chan struct{} // if set, requests wait for it
	closed  bool
}

func newFakeDevice() *fakeDevice { return &fakeDevice{peers: map[wgtypes.Key]devPeer{}} }

// wait hangs if the test says so.
func (f *fakeDevice) wait() {
	f.mu.Lock()
	hang := f.hang
	f.mu.Unlock()
	if hang != nil {
		<-hang
	}
}

func (f *fakeDevice) dump() (*devState, error) {
	f.wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dumps++
	if err := f.trouble(); err != nil {
		return nil, err
	}
	st := f.own
	for _, p := range f.peers {
		st.peers = append(st.peers, p)
	}
	return &st, nil
}

func (f *fakeDevice) trouble() error {
	if f.links != nil {
		if _, err := f.links.get(""); err != nil {
			return ErrNotWireGuard
		}
	}
	return f.fail
}

func (f *fakeDevice) apply(c change) error {
	f.wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applies = append(f.applies, c)
	if err := f.trouble(); err != nil {
		return err
	}
	if c.privateKey != nil {
		f.own.privateKey = *c.privateKey
	}
	if c.listenPort != nil {
		f.own.listenPort = *c.listenPort
	}
	seen := map[wgtypes.Key]bool{}
	for _, pc := range c.peers {
		if seen[pc.key] {
			panic("a key twice in one change")
		}
		seen[pc.key] = true
		f.put(pc)
	}
	return nil
}

func (f *fakeDevice) put(pc peerChange) {
	if pc.remove {
		delete(f.peers, pc.key)
		return
	}
	prefix := netip.PrefixFrom(pc.ip, pc.ip.BitLen())
	for k, p := range f.peers {
		if k != pc.key && p.nAllowed == 1 && p.allowed == prefix {
			p.nAllowed = 0
			f.peers[k] = p
		}
	}
	p := f.peers[pc.key]
	p.key, p.allowed, p.nAllowed = pc.key, prefix, 1
	if pc.keepalive {
		p.keepalive = keepalive
	}
	if pc.endpoint.IsValid() {
		p.endpoint = pc.endpoint
	}
	f.peers[pc.key] = p
}

func (f *fakeDevice) close() error { f.closed = true; return nil }

// edit changes what the device says of a peer.
func (f *fakeDevice) edit(k wgtypes.Key, fn func(*devPeer)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.peers[k]
	p.key = k
	fn(&p)
	f.peers[k] = p
}

func (f *fakeDevice) peer(k wgtypes.Key) devPeer {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.peers[k]
}

func (f *fakeDevice) set(fn func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn()
}

// holds returns key -> address of peers with exactly one address.
func (f *fakeDevice) holds() map[wgtypes.Key]netip.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := map[wgtypes.Key]netip.Addr{}
	for k, p := range f.peers {
		if p.nAllowed == 1 {
			m[k] = p.allowed.Addr()
		} else {
			m[k] = netip.Addr{}
		}
	}
	return m
}

func (f *fakeDevice) requests() (applies, dumps int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.applies), f.dumps
}

// fakeLinks is a network stack with at most one interface.
type fakeLinks struct {
	mu       sync.Mutex
	link     *linkInfo
	addErr   error
	upErr    error
	removed  int
	lastAddr netip.Prefix
}

func (l *fakeLinks) get(string) (linkInfo, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.link == nil {
		return linkInfo{}, errNoLink
	}
	return *l.link, nil
}

func (l *fakeLinks) addWireGuard(string, int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.addErr != nil {
		return l.addErr
	}
	l.link = &linkInfo{kind: "wireguard"}
	return nil
}

func (l *fakeLinks) bringUp(_ string, a netip.Prefix) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.upErr != nil {
		return l.upErr
	}
	l.link.up, l.lastAddr = true, a
	return nil
}

func (l *fakeLinks) remove(string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.link = nil
	l.removed++
	return nil
}

func (l *fakeLinks) set(info *linkInfo) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.link = info
}

// testKey is a valid-looking key that tells its number.
func testKey(n int) (k wgtypes.Key) {
	k[0], k[1], k[2], k[31] = byte(n), byte(n>>8), byte(n>>16), 1
	return k
}

func testIP(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(8 + n>>16), byte(n >> 8), byte(n)})
}

func testPeer(n int) Peer {
	return Peer{ID: fmt.Sprintf("inst-%05d", n), PublicKey: testKey(n), IP: testIP(n)}
}

func testPeers(from, to int) (ps []Peer) {
	for n := from; n < to; n++ {
		ps = append(ps, testPeer(n))
	}
	return ps
}

// testPrivate is fixed so that failures repeat.
var testPrivate = wgtypes.Key{0: 0x40, 1: 7, 31: 0x41}

func testOptions() Options {
	return Options{
		Interface:  "wg-test",
		Address:    netip.MustParsePrefix("10.8.255.254/16"),
		PrivateKey: testPrivate,
		ListenPort: 51820,
		Logger:     slog.New(slog.DiscardHandler),
	}
}

// logTo collects log lines.
type logTo struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logTo) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logTo) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// openFake opens a device on fakes: adopted if links has an interface.
func openFake(t *testing.T, opt Options, dev *fakeDevice, l *fakeLinks) *Device {
	t.Helper()
	d, err := open(context.Background(), opt, fakeSystem(dev, l))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func fakeSystem(dev *fakeDevice, l *fakeLinks) system {
	return system{
		links:   l,
		control: func(string) backend { return dev },
		user:    func(*Device) (backend, error) { return nil, errors.New("no userspace in this test") },
	}
}

func wantHolds(t *testing.T, dev *fakeDevice, peers ...Peer) {
	t.Helper()
	got := dev.holds()
	if len(got) != len(peers) {
		t.Errorf("the device has %d peers, want %d", len(got), len(peers))
	}
	for _, p := range peers {
		if got[p.PublicKey] != p.IP {
			t.Errorf("peer of %s has address %v, want %v", p.ID, got[p.PublicKey], p.IP)
		}
	}
}

// settle waits, in a synctest bubble, until every batch is through.
func settle() { time.Sleep(5 * time.Second) }
