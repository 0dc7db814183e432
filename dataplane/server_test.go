package dataplane

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
	"github.com/dstack-gw/dstack-gw/dataplane/terminate"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.fuzz").Value.String() == "" {
		_ = flag.Set("test.parallel", "24") // parallel tests wait here more than they work
	}
	goleak.VerifyTestMain(m)
}

type testHooks struct {
	mu      sync.Mutex
	records []Record
	custom  map[string]string
	port    uint16
	policy  func(id string)
	ended   chan Record
}

func (h *testHooks) CachedCustom(string) (string, uint16, error, bool) { return "", 0, nil, false }
func (h *testHooks) ResolveCustom(_ context.Context, name string) (string, uint16, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if id, ok := h.custom[name]; ok {
		return id, h.port, nil
	}
	return "", 0, errors.New("no TXT record")
}
func (h *testHooks) NeedPolicy(id string) {
	h.mu.Lock()
	f := h.policy
	h.mu.Unlock()
	if f != nil {
		f(id)
	}
}
func (h *testHooks) ServeBuiltin(_ hostname.Service, _ hostname.Mode, base *routing.Base, c net.Conn) {
	defer c.Close()
	t := tls.Server(c, base.TLS)
	if t.Handshake() == nil {
		_, _ = io.WriteString(t, "builtin")
		t.Close()
	}
}
func (h *testHooks) Closed(r *Record) {
	h.mu.Lock()
	h.records = append(h.records, *r)
	h.mu.Unlock()
	select {
	case h.ended <- *r:
	default:
	}
}

const (
	testBase = "apps.test"
	testApp  = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
)

func testCert(t testing.TB, names ...string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), DNSNames: names, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
}

type rig struct {
	*Server
	t     testing.TB
	hooks *testHooks
	addr  string
	pool  *x509.CertPool
	cert  tls.Certificate
}

func freePort(t testing.TB) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

var rigs atomic.Uint32

func newRig(t testing.TB, edit func(*Options)) *rig {
	t.Helper()
	h := &testHooks{ended: make(chan Record, 4096), custom: map[string]string{}}
	// An address of its own: on 127.0.0.1 another test's connection may take the port meanwhile.
	n := rigs.Add(1)
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)}), freePort(t))
	o := Options{Logger: discard, Hooks: h, Listen: []netip.AddrPort{at}, Workers: 2, DeferAccept: time.Second,
		Selection: routing.Selection{TopN: 3, Stale: 30 * time.Minute, Penalty: 10 * time.Second}, HeadStart: 100 * time.Millisecond,
		Splice: relay.Gate{Auto: true}, PPHeader: time.Second, Handshake: time.Second, Resolve: time.Second, Connect: time.Second, PolicyHold: time.Second,
		Idle: time.Minute, Total: time.Hour}
	if edit != nil {
		edit(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	cert, pool := testCert(t, "*."+testBase)
	plain, h2 := terminate.Configs(&cert, tls.VersionTLS12, tls.VersionTLS13, nil)
	s.SetSnapshot(s.Snapshot().WithBases([]*routing.Base{{Domain: testBase, TLS: plain, TLSH2: h2}}))
	return &rig{Server: s, t: t, hooks: h, addr: at.String(), pool: pool, cert: cert}
}

var discard = slog.New(slog.DiscardHandler)

var open = routing.Policy{Known: true}

func (r *rig) instance(id, app, addr string, p routing.Policy) {
	r.SetSnapshot(r.Snapshot().With([]routing.Record{{ID: id, AppID: app, Addr: netip.MustParseAddr(addr), Policy: p}}, nil))
	r.Snapshot().Instance(id).State.Handshake.Store(time.Now().Unix())
}

// backend runs handle for each connection on addr and returns its port.
func backend(t testing.TB, addr string, handle func(net.Conn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); handle(c) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func echo(c net.Conn) {
	_, _ = io.Copy(c, c)
	_ = c.(*net.TCPConn).CloseWrite()
}

func (r *rig) dialTLS(name string, edit func(*tls.Config)) (*tls.Conn, error) {
	cfg := &tls.Config{ServerName: name, RootCAs: r.pool}
	if edit != nil {
		edit(cfg)
	}
	d := &net.Dialer{Timeout: 5 * time.Second, Control: ethernet}
	return tls.DialWithDialer(d, "tcp", r.addr, cfg)
}

func (r *rig) waitEnd() Record {
	r.t.Helper()
	select {
	case rec := <-r.hooks.ended:
		return rec
	case <-time.After(10 * time.Second):
		r.t.Fatal("no connection ended")
		return Record{}
	}
}

func transfer(t *testing.T, c interface {
	io.ReadWriter
	CloseWrite() error
}, size int) {
	t.Helper()
	data := make([]byte, size)
	_, _ = rand.Read(data)
	var wg sync.WaitGroup
	wg.Go(func() {
		for b := data; len(b) > 0; {
			n := min(len(b), 1+size/7)
			if _, err := c.Write(b[:n]); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			b = b[n:]
		}
		if err := c.CloseWrite(); err != nil {
			t.Errorf("close write: %v", err)
		}
	})
	got, err := io.ReadAll(c)
	wg.Wait()
	if err != nil {
		t.Fatalf("read: %v", err)
	}
	if sha256.Sum256(got) != sha256.Sum256(data) {
		t.Fatalf("content differs: sent %d, got %d bytes", len(data), len(got))
	}
}

func TestTerminate(t *testing.T) {
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, size := range []int{1, 100, 1 << 16, 8 << 20} {
			t.Run(fmt.Sprintf("%s/%d", tls.VersionName(v), size), func(t *testing.T) {
				r := newRig(t, nil)
				port := backend(t, "127.0.0.1:0", echo)
				r.instance("i1", testApp, "127.0.0.1", open)
				c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), func(c *tls.Config) { c.MaxVersion = v })
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				transfer(t, c, size)
				c.Close()
				rec := r.waitEnd()
				if rec.Reason != ReasonNormal || rec.Up != uint64(size) || rec.Down != uint64(size) || rec.Instance != "i1" || rec.TLSVersion != v {
					t.Errorf("record %+v", rec)
				}
			})
		}
	}
}

func TestPassthrough(t *testing.T) {
	for _, gate := range []relay.Gate{{Off: true}, {Auto: true}, {}, {AfterBytes: 100000}} {
		for _, size := range []int{1, 70000, 16 << 20} {
			t.Run(fmt.Sprintf("%+v/%d", gate, size), func(t *testing.T) {
				r := newRig(t, func(o *Options) { o.Splice = gate })
				port := backend(t, "127.0.0.1:0", func(c net.Conn) {
					s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{r.cert}})
					_, _ = io.Copy(s, s)
					_ = s.CloseWrite()
				})
				r.instance("i1", testApp, "127.0.0.1", open)
				c, err := r.dialTLS(fmt.Sprintf("%s-%ds.%s", testApp, port, testBase), nil)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				transfer(t, c, size)
				c.Close()
				rec := r.waitEnd()
				if rec.Reason != ReasonNormal || rec.Up < uint64(size) || rec.Down < uint64(size) {
					t.Errorf("record %+v", rec)
				}
				if want := !gate.Off && (size > 1<<20 || gate == relay.Gate{}); rec.Spliced != want && size != 70000 {
					t.Errorf("spliced = %v, want %v", rec.Spliced, want)
				}
			})
		}
	}
}

func TestDeadInstanceIsSkipped(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.3:0", echo)
	r.instance("dead", testApp, "127.0.0.2", open) // nothing listens: refused
	r.instance("live", testApp, "127.0.0.3", open)
	for range 20 {
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		transfer(t, c, 10)
		c.Close()
		if d := time.Since(begin); d > 90*time.Millisecond {
			t.Errorf("took %s", d)
		}
		if rec := r.waitEnd(); rec.Instance != "live" {
			t.Errorf("record %+v", rec)
		}
	}
	if n := r.Snapshot().Instance("dead").State.Active.Load(); n != 0 {
		t.Errorf("dead instance keeps %d connections", n)
	}
	if n := r.Snapshot().App(testApp).State.Active.Load(); n != 0 {
		t.Errorf("app keeps %d connections", n)
	}
}

func TestBalance(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.2:0", echo)
	backend(t, fmt.Sprintf("127.0.0.3:%d", port), echo)
	r.instance("a", testApp, "127.0.0.2", open)
	r.instance("b", testApp, "127.0.0.3", open)
	var conns []*tls.Conn
	for range 20 {
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		if _, err := c.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	a, b := r.Snapshot().Instance("a").State.Active.Load(), r.Snapshot().Instance("b").State.Active.Load()
	if a != 10 || b != 10 {
		t.Errorf("a has %d, b has %d connections, want 10 each", a, b)
	}
	for _, c := range conns {
		c.Close()
	}
}

func TestPolicyHold(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", routing.Policy{})
	var once sync.Once
	r.hooks.mu.Lock()
	r.hooks.policy = func(id string) {
		once.Do(func() {
			go func() {
				time.Sleep(100 * time.Millisecond)
				r.instance("i1", testApp, "127.0.0.1", routing.Policy{Known: true, Restrict: true, Ports: map[uint16]bool{port: false}})
			}()
		})
	}
	r.hooks.mu.Unlock()
	c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, c, 1000)
	c.Close()
	if rec := r.waitEnd(); rec.Reason != ReasonNormal {
		t.Errorf("record %+v", rec)
	}
	if _, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port+1, testBase), nil); err == nil {
		t.Error("a port outside the policy was served")
	}
	if rec := r.waitEnd(); rec.Reason != ReasonPortPolicy {
		t.Errorf("record %+v", rec)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.MaxPerApp = 1; o.PolicyHold = 0 })
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	hold, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
	if err != nil {
		t.Fatal(err)
	}
	for r.Snapshot().App(testApp).State.Active.Load() == 0 { // counted once the server's side of TLS is done
		time.Sleep(time.Millisecond)
	}
	for _, tc := range []struct {
		name string
		want Reason
	}{
		{fmt.Sprintf("%s-%d.%s", testApp, port, testBase), ReasonAppLimit},
		{"nosuchapp." + testBase, ReasonUnknownApp},
		{testApp + "-80sg." + testBase, ReasonUnknownApp},
		{"www.example.com", ReasonDNS},
		{"gateway-81." + testBase, ReasonPortPolicy},
	} {
		if _, err := r.dialTLS(tc.name, nil); err == nil {
			t.Errorf("%s was served", tc.name)
		}
		if rec := r.waitEnd(); rec.Reason != tc.want {
			t.Errorf("%s: reason %s (%v), want %s", tc.name, rec.Reason, rec.Detail, tc.want)
		}
	}
	hold.Close()
	r.waitEnd()
	// Not TLS, silence, and a name under a base without a certificate.
	c, _ := net.Dial("tcp", r.addr)
	_, _ = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Errorf("non-TLS client got %q", b)
	}
	c.Close()
	if rec := r.waitEnd(); rec.Reason != ReasonNoSNI {
		t.Errorf("record %+v", rec)
	}
	c, _ = net.Dial("tcp", r.addr)
	_, _ = c.Write([]byte{22, 3, 1})
	begin := time.Now()
	_, _ = io.ReadAll(c)
	if d := time.Since(begin); d < 500*time.Millisecond || d > 3*time.Second {
		t.Errorf("half a hello was closed after %s, want about 1s", d)
	}
	c.Close()
	if rec := r.waitEnd(); rec.Reason != ReasonTimeout {
		t.Errorf("record %+v", rec)
	}
}

func TestCustomDomainAndBuiltin(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.1:0", func(c net.Conn) {
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{r.cert}})
		_, _ = io.Copy(s, s)
		_ = s.CloseWrite()
	})
	r.instance("i1", testApp, "127.0.0.1", open)
	r.hooks.mu.Lock()
	r.hooks.custom["www.shop.example"], r.hooks.port = testApp, port
	r.hooks.mu.Unlock()
	c, err := r.dialTLS("www.shop.example", func(c *tls.Config) { c.InsecureSkipVerify = true })
	if err != nil {
		t.Fatal(err)
	}
	transfer(t, c, 5000)
	c.Close()
	r.waitEnd()
	c, err = r.dialTLS("gateway."+testBase, nil)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(c); string(b) != "builtin" {
		t.Errorf("got %q", b)
	}
	c.Close()
}

func TestPROXYIn(t *testing.T) {
	r := newRig(t, func(o *Options) { o.InboundPROXY = true })
	got := make(chan []byte, 1)
	port := backend(t, "127.0.0.1:0", func(c net.Conn) {
		b := make([]byte, 28)
		_, _ = io.ReadFull(c, b)
		got <- b
		echo(c)
	})
	r.instance("i1", testApp, "127.0.0.1", routing.Policy{Known: true, Ports: map[uint16]bool{port: true}})
	raw, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []byte("PROXY TCP4 9.8.7.6 1.2.3.4 1234 443\r\n") {
		_, _ = raw.Write([]byte{b})
	}
	c := tls.Client(raw, &tls.Config{ServerName: fmt.Sprintf("%s-%d.%s", testApp, port, testBase), RootCAs: r.pool})
	if _, err := c.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	if b := <-got; !bytes.HasPrefix(b, []byte("PROXY TCP4 9.8.7.6")) {
		t.Errorf("app got %q", b)
	}
	c.Close()
	if rec := r.waitEnd(); rec.Peer.String() != "9.8.7.6:1234" {
		t.Errorf("record %+v", rec)
	}
	c2, _ := net.Dial("tcp", r.addr)
	_, _ = io.WriteString(c2, "\x16\x03\x01hello")
	_, _ = io.ReadAll(c2)
	c2.Close()
	if rec := r.waitEnd(); rec.Reason != ReasonPPHeader {
		t.Errorf("record %+v", rec)
	}
}

func TestIdleAndHalfClose(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Idle = 700 * time.Millisecond })
	port := backend(t, "127.0.0.1:0", func(c net.Conn) {
		b, _ := io.ReadAll(c)
		time.Sleep(300 * time.Millisecond)
		_, _ = fmt.Fprintf(c, "got %d", len(b))
	})
	r.instance("i1", testApp, "127.0.0.1", open)
	c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = c.Write(make([]byte, 1000))
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "got 1000" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	c.Close()
	r.waitEnd()
	c, err = r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	_, _ = io.ReadAll(c)
	if d := time.Since(begin); d < 600*time.Millisecond || d > 2*time.Second {
		t.Errorf("idle connection lived %s", d)
	}
	c.Close()
	if rec := r.waitEnd(); rec.Reason != ReasonIdle {
		t.Errorf("record %+v", rec)
	}
}

func TestALPN(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	name := fmt.Sprintf("%s-%dg.%s", testApp, port, testBase)
	for _, tc := range []struct {
		offer []string
		ok    bool
		proto string
	}{{nil, true, ""}, {[]string{"h2"}, true, "h2"}, {[]string{"h2", "http/1.1"}, true, "h2"}, {[]string{"http/1.1"}, false, ""}, {[]string{"foo"}, false, ""}} {
		c, err := r.dialTLS(name, func(c *tls.Config) { c.NextProtos = tc.offer })
		if tc.ok != (err == nil) {
			t.Errorf("offer %v: %v", tc.offer, err)
		}
		if err == nil {
			if p := c.ConnectionState().NegotiatedProtocol; p != tc.proto {
				t.Errorf("offer %v: negotiated %q", tc.offer, p)
			}
			c.Close()
		} else if ae := tls.AlertError(0); !errors.As(err, &ae) || ae != 120 {
			var oe *net.OpError
			if !errors.As(err, &oe) || oe.Err.Error() != "tls: no application protocol" {
				t.Errorf("offer %v: %v", tc.offer, err)
			}
		}
	}
}
