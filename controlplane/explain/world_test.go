package explain

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"flag"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
	"github.com/dstack-gw/dstack-gw/dataplane/terminate"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "rewrite golden files")

var now = time.Date(2026, 5, 4, 3, 0, 0, 0, time.UTC)

const (
	appA  = "aaaa000000000000000000000000000000000001"
	instA = "1111000000000000000000000000000000000001"
	instB = "2222000000000000000000000000000000000002"
	instC = "3333000000000000000000000000000000000003"
	appP  = "bbbb000000000000000000000000000000000002" // restricted to 8080 and 8443
	instP = "4444000000000000000000000000000000000004"
	appU  = "cccc000000000000000000000000000000000003" // policy unknown
	instU = "5555000000000000000000000000000000000005"
	appS  = "dddd000000000000000000000000000000000004" // stale
	instS = "6666000000000000000000000000000000000006"
)

// world is a gateway made of fakes that a test changes before it asks.
type world struct {
	t        *testing.T
	snap     *routing.Snapshot
	mono     time.Duration
	records  map[string]registry.Instance
	table    *wireguard.Table
	status   wireguard.Status
	cached   map[string]resolved
	resolved map[string]resolved
	txts     map[string]TXT
	hosts    map[string][]netip.Addr
	dials    map[string]func(ctx context.Context) (net.Conn, error)
	ca       *authority
	deps     Deps
}

type resolved struct {
	answer customdomain.Answer
	err    error
}

func (w *world) Instance(id string) (registry.Instance, bool) {
	i, ok := w.records[id]
	return i, ok
}
func (w *world) Handshakes() *wireguard.Table { return w.table }
func (w *world) Status() wireguard.Status     { return w.status }

func (w *world) Cached(name string) (customdomain.Answer, error, bool) {
	r, ok := w.cached[name]
	return r.answer, r.err, ok
}

func (w *world) Resolve(ctx context.Context, name string) (customdomain.Answer, error) {
	if r, ok := w.resolved[name]; ok {
		return r.answer, r.err
	}
	return customdomain.Answer{}, fmt.Errorf("%w: no TXT record at _dstack-app-address.%s", customdomain.ErrNotFound, name)
}

func key(n byte) wgtypes.Key { var k wgtypes.Key; k[0] = n; return k }

// add registers an instance whose handshake was `age` ago; negative: never.
func (w *world) add(app, id string, n byte, age time.Duration, policy *registry.PortPolicy) {
	addr := netip.AddrFrom4([4]byte{10, 8, 0, n})
	w.records[id] = registry.Instance{ID: id, AppID: app, IP: addr, PublicKey: key(n).String(), RegTime: 1, Policy: policy, PolicyHash: "c0ffee00deadbeef"}
	r := routing.Record{ID: id, AppID: app, Addr: addr}
	if policy != nil {
		r.Policy = routing.Policy{Known: true, Restrict: policy.Restrict, Ports: map[uint16]bool{}}
		for p, f := range policy.Ports {
			r.Policy.Ports[p] = f.PP
		}
	}
	w.snap = w.snap.With([]routing.Record{r}, nil)
	if age < 0 {
		w.table.Peers[key(n)] = wireguard.PeerState{}
		return
	}
	at := now.Add(-age)
	w.snap.Instance(id).State.Handshake.Store(at.Unix())
	w.table.Peers[key(n)] = wireguard.PeerState{LastHandshake: at, LastRx: now.Add(-min(age, 12*time.Second)), RxBytes: 5000 * uint64(n), TxBytes: 77,
		Endpoint: netip.MustParseAddrPort("198.51.100.7:40000")}
}

var open = &registry.PortPolicy{}

func restricted(ports map[uint16]bool) *registry.PortPolicy {
	p := &registry.PortPolicy{Restrict: true, Ports: map[uint16]registry.PortFlags{}}
	for n, pp := range ports {
		p.Ports[n] = registry.PortFlags{PP: pp}
	}
	return p
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, snap: routing.Empty(), mono: time.Hour, records: map[string]registry.Instance{},
		table:  &wireguard.Table{Taken: now.Add(-3 * time.Second), Peers: map[wgtypes.Key]wireguard.PeerState{}},
		status: wireguard.Status{Interface: "wg0", Mode: wireguard.Kernel, Reason: "the kernel has WireGuard", Up: true, InSync: true},
		cached: map[string]resolved{}, resolved: map[string]resolved{}, txts: map[string]TXT{},
		hosts: map[string][]netip.Addr{}, dials: map[string]func(context.Context) (net.Conn, error){}, ca: newAuthority(t)}
	w.add(appA, instA, 1, 40*time.Second, open)
	w.add(appA, instB, 2, 100*time.Second, open)
	w.add(appA, instC, 3, 2*time.Hour, open)
	w.snap.Instance(instB).State.Active.Store(4)
	w.add(appP, instP, 4, 10*time.Second, restricted(map[uint16]bool{8080: false, 8443: true}))
	w.add(appU, instU, 5, 10*time.Second, nil)
	w.add(appS, instS, 6, -1, open)
	w.table.Peers[key(3)] = wireguard.PeerState{LastHandshake: now.Add(-2 * time.Hour), LastRx: now.Add(-2 * time.Hour)}
	w.bases(w.base("gw.example", now.Add(60*24*time.Hour)), &routing.Base{Domain: "new.example", Configured: true})
	w.deps = Deps{
		Snapshot: func() *routing.Snapshot { return w.snap }, Mono: func() int64 { return int64(w.mono) },
		Registry: w, WireGuard: w, Resolver: w,
		LookupTXT: func(ctx context.Context, name string) (TXT, error) {
			x, ok := w.txts[name]
			if ok && x.Server == "broken" {
				return TXT{}, fmt.Errorf("192.0.2.53:53: SERVFAIL")
			}
			return x, nil
		},
		Compat: true,
		LookupHost: func(ctx context.Context, name string) ([]netip.Addr, error) {
			if a, ok := w.hosts[name]; ok {
				return a, nil
			}
			return []netip.Addr{netip.MustParseAddr("203.0.113.1")}, nil
		},
		PublicAddrs: []netip.Addr{netip.MustParseAddr("203.0.113.1")},
		Listeners:   []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:443")},
		Selection:   routing.Selection{TopN: 3, Stale: 30 * time.Minute, Penalty: 10 * time.Second},
		MaxPerApp:   2000, PolicyHold: 5 * time.Second, Connect: 5 * time.Second,
		Dial: w.dial, Now: func() time.Time { return now }, Roots: w.ca.pool,
		Timeout: 5 * time.Second, ProbeTimeout: 500 * time.Millisecond,
	}
	return w
}

func (w *world) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if f := w.dials[address]; f != nil {
		return f(ctx)
	}
	return accept(ctx)
}

// accept is an app that takes a connection and says nothing.
func accept(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	go func() {
		b := make([]byte, 1024)
		for {
			if _, err := far.Read(b); err != nil {
				far.Close()
				return
			}
		}
	}()
	return near, nil
}

func fails(err error) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)}
	}
}

func hangs(ctx context.Context) (net.Conn, error) {
	<-ctx.Done()
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
}

// speaksTLS is an app with a TLS server.
func speaksTLS(cert tls.Certificate, before int) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			if before > 0 {
				if _, err := far.Read(make([]byte, before)); err != nil {
					return
				}
			}
			_ = tls.Server(far, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}}).Handshake()
		}()
		return near, nil
	}
}

// answers is an app that says text to whatever comes.
func answers(text string) func(context.Context) (net.Conn, error) {
	return func(context.Context) (net.Conn, error) {
		near, far := net.Pipe()
		go func() {
			_, _ = far.Read(make([]byte, 8192)) // the whole hello
			go func() {                         // a pipe has no buffer
				b := make([]byte, 1024)
				for {
					if _, err := far.Read(b); err != nil {
						return
					}
				}
			}()
			if text != "" {
				_, _ = far.Write([]byte(text))
				_, _ = far.Read(make([]byte, 1))
			}
			far.Close()
		}()
		return near, nil
	}
}

func (w *world) explain(input string) *Report {
	w.t.Helper()
	e, err := New(w.deps)
	if err != nil {
		w.t.Fatal(err)
	}
	return e.Explain(w.t.Context(), input)
}

func (w *world) bases(list ...*routing.Base) { w.snap = w.snap.WithBases(list) }

func (w *world) base(domain string, until time.Time) *routing.Base {
	cert := w.ca.issue(w.t, until, "*."+domain)
	b := &routing.Base{Domain: domain, Configured: true}
	b.TLS, b.TLSH2 = terminate.Configs(&cert, tls.VersionTLS12, tls.VersionTLS13, nil)
	return b
}

// authority issues certificates. Keys are fresh, everything shown is fixed.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: now.Add(-1000 * time.Hour), NotAfter: now.Add(100000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{cert: c, key: k, pool: x509.NewCertPool()}
	a.pool.AddCert(c)
	return a
}

func (a *authority) issue(t *testing.T, until time.Time, names ...string) tls.Certificate {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(255), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names, NotBefore: until.Add(-90 * 24 * time.Hour), NotAfter: until,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

var refused = fails(syscall.ECONNREFUSED)
