package rpc

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/certs"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a wall clock that tests move.
type clock struct{ unix atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(c.unix.Load(), 0) }
func (c *clock) advance(d time.Duration) { c.unix.Add(int64(d / time.Second)) }

// tunnels is a WireGuard device in memory.
type tunnels struct {
	mu        sync.Mutex
	applied   []wireguard.Peer
	fail      error
	hold      chan struct{} // if set, Apply waits for it
	table     *wireguard.Table
	refreshed int
}

func (d *tunnels) Apply(ctx context.Context, p wireguard.Peer) error {
	d.mu.Lock()
	hold := d.hold
	d.mu.Unlock()
	if hold != nil {
		<-hold
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.applied = append(d.applied, p)
	return d.fail
}

func (d *tunnels) Handshakes() *wireguard.Table {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.table
}

func (d *tunnels) Refresh(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refreshed++
	return d.fail
}

func (d *tunnels) peers() []wireguard.Peer {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]wireguard.Peer(nil), d.applied...)
}

type proxy struct{ open, spliced int64 }

func (p *proxy) Connections() int64    { return p.open }
func (p *proxy) SpliceEngaged() uint64 { return uint64(p.spliced) }

// recorder counts writes and may delay or refuse them.
type recorder struct {
	next recordWriter
	mu   sync.Mutex
	puts []registry.Instance
	// hook, if set, runs before the write; with an error the write does not happen.
	hook func(registry.Instance) (store.Durability, error)
}

func (r *recorder) PutInstance(ctx context.Context, i registry.Instance) (store.Durability, error) {
	r.mu.Lock()
	r.puts = append(r.puts, i)
	hook := r.hook
	r.mu.Unlock()
	if hook != nil {
		if d, err := hook(i); err != nil || d != 0 {
			return d, err
		}
	}
	return r.next.PutInstance(ctx, i)
}

func (r *recorder) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.puts)
}

type fixture struct {
	t       testing.TB
	s       *Server
	reg     *registry.Registry
	store   *store.Store
	certs   *certs.Store
	wg      *tunnels
	proxy   *proxy
	writes  *recorder
	clock   *clock
	log     *lockedBuffer
	missing chan string
	domains atomic.Int32
	exits   []bool
	conns   map[string]int64
	// caller is who the next call to the main server comes from.
	caller *ratls.Identity

	main, admin, debug http.Handler
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var testUUID = store.UUID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

const ownKey = "CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk="

func newFixture(t testing.TB, change func(*Deps)) *fixture {
	t.Helper()
	f := &fixture{
		t: t, wg: &tunnels{table: &wireguard.Table{}}, proxy: &proxy{open: 12, spliced: 3}, clock: new(clock),
		log: new(lockedBuffer), missing: make(chan string, 1000), conns: map[string]int64{},
	}
	f.clock.unix.Store(1700000000)
	log := slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	f.store, err = store.Open(t.Context(), store.Options{Dir: t.TempDir(), NodeID: 1, Logger: slog.New(slog.DiscardHandler), Now: f.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.store.Close() })
	f.reg, err = registry.New(registry.Config{
		Network: netip.MustParsePrefix("10.8.0.1/16"), Reserved: []netip.Prefix{netip.MustParsePrefix("10.8.0.1/32")},
		ClientRange: netip.MustParsePrefix("10.8.0.0/18"), OwnKey: ownKey,
	}, f.clock.now)
	if err != nil {
		t.Fatal(err)
	}
	if f.certs, err = certs.New(certs.Options{Logger: slog.New(slog.DiscardHandler), Now: f.clock.now}); err != nil {
		t.Fatal(err)
	}
	d := Deps{
		Self: Self{NodeID: 1, UUID: testUUID, AppID: []byte{0xaa, 0xbb}, URL: "https://gw1.example.com:9202", BootnodeURL: "https://boot.example.com",
			WGPublicKey: ownKey, WGIP: netip.MustParsePrefix("10.8.0.1/16"), WGEndpoint: "203.0.113.5:51820"},
		Registry: f.reg, Store: f.store, Tunnels: f.wg, Proxy: f.proxy, Certs: f.certs,
		AgentPort: 8090, AppAddressNSPrefix: "_dstack-app-address", Splice: relay.Gate{Auto: true},
		Version: "0.6.0", Revision: "0123456789abcdef0123456789abcdef01234567",
		InstanceConnections: func(id string) int64 { return f.conns[id] },
		PolicyMissing:       func(id string) { f.missing <- id },
		DomainsChanged:      func() { f.domains.Add(1) },
		Exit:                func(force bool) { f.exits = append(f.exits, force) },
		Now:                 f.clock.now, Logger: log,
	}
	if change != nil {
		change(&d)
	}
	if f.s, err = New(d); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.s.Close)
	f.writes = &recorder{next: f.store}
	f.s.records = f.writes
	identify := func(r *http.Request) (context.Context, error) {
		if f.caller == nil {
			return r.Context(), nil
		}
		return ratls.WithIdentity(r.Context(), f.caller), nil
	}
	f.main = f.s.MainHandler(prpc.Options{Identify: identify})
	f.admin = f.s.AdminHandler(prpc.Options{}, nil)
	f.debug = f.s.DebugHandler(prpc.Options{})
	return f
}

// ask sends a JSON request and returns status and body.
func (f *fixture) ask(h http.Handler, method, body string) (int, string) {
	f.t.Helper()
	r := httptest.NewRequest("POST", "/prpc/"+method+"?json", strings.NewReader(body))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	out, err := io.ReadAll(w.Result().Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return w.Code, string(out)
}

// ok demands success and returns the body.
func (f *fixture) ok(h http.Handler, method, body string) string {
	f.t.Helper()
	code, out := f.ask(h, method, body)
	if code != 200 {
		f.t.Fatalf("%s %s: status %d: %s", method, body, code, out)
	}
	return out
}

// refused demands an RPC error of exactly this text.
func (f *fixture) refused(h http.Handler, method, body, want string) {
	f.t.Helper()
	code, out := f.ask(h, method, body)
	if full := "{\n  \"error\": " + quote(want) + "\n}"; code != 400 || out != full {
		f.t.Errorf("%s %s: status %d\n got %s\nwant %s", method, body, code, out, full)
	}
}

func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// equal demands success with exactly this JSON.
func (f *fixture) equal(h http.Handler, method, body, want string) {
	f.t.Helper()
	if got := f.ok(h, method, body); got != want {
		f.t.Errorf("%s %s:\n got %s\nwant %s", method, body, got, want)
	}
}

func wgKey(n int) string {
	raw := make([]byte, 32)
	raw[0], raw[1], raw[2] = 1, byte(n), byte(n>>8)
	return base64.StdEncoding.EncodeToString(raw)
}

// appInfo makes a caller; app and instance are hex.
func appInfo(t testing.TB, app, instance, compose string) *ratls.AppInfo {
	t.Helper()
	dec := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return &ratls.AppInfo{AppID: dec(app), InstanceID: dec(instance), ComposeHash: dec(compose), DeviceID: []byte{2}, OSImageHash: []byte{5}, KeyProviderInfo: []byte("{}")}
}

func guest(t testing.TB, app, instance, compose string) *ratls.Identity {
	return &ratls.Identity{Info: appInfo(t, app, instance, compose)}
}

const (
	appA, appB   = "8f2a7c1d3e4b5a69788796a5b4c3d2e1f0011223", "00112233445566778899aabbccddeeff00112233"
	inst1, inst2 = "0101010101010101010101010101010101010101", "0202020202020202020202020202020202020202"
	compose1     = "abababababababababababababababababababababababababababababababab"
	compose2     = "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"
)

func (f *fixture) setHandshake(key string, at int64) {
	f.t.Helper()
	k, err := wgtypes.ParseKey(key)
	if err != nil {
		f.t.Fatal(err)
	}
	f.wg.mu.Lock()
	defer f.wg.mu.Unlock()
	peers := map[wgtypes.Key]wireguard.PeerState{}
	for have, state := range f.wg.table.Peers {
		peers[have] = state
	}
	peers[k] = wireguard.PeerState{LastHandshake: time.Unix(at, 0)}
	f.wg.table = &wireguard.Table{Taken: f.clock.now(), Peers: peers}
}

var errDisk = errors.New("disk on fire")
