package store

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

// server is an etcd of its own, as an operator would run it, reached by URL.
type server struct {
	etcd *embed.Etcd
	once sync.Once
	url  string
}

func (s *server) Close() { s.once.Do(s.etcd.Close) }

func startServer(t *testing.T, dir, clientURL string) *server {
	t.Helper()
	if clientURL == "" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		clientURL = "http://" + l.Addr().String()
		l.Close()
	}
	u, err := url.Parse(clientURL)
	if err != nil {
		t.Fatal(err)
	}
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ListenPeerUrls = nil
	peer := url.URL{Scheme: "unix", Host: "peer:0"}
	cfg.AdvertisePeerUrls = []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*u}, []url.URL{*u}
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	<-e.Server.ReadyNotify()
	s := &server{etcd: e, url: clientURL}
	t.Cleanup(s.Close)
	return s
}

func (s *server) client(t *testing.T) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.url}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func externalStore(t *testing.T, srv *server, dir string, node uint32, prefix string) (*Store, *logBuffer) {
	t.Helper()
	opts, buf := testOptions(t, dir)
	opts.Mode, opts.Endpoints, opts.NodeID, opts.Prefix = External, []string{srv.url}, node, prefix
	opts.WriteTimeout, opts.StartTimeout = time.Second, 3*time.Second
	return openWith(t, opts), buf
}

func TestExternalTwoNodes(t *testing.T) {
	t.Parallel()
	srv := startServer(t, t.TempDir(), "")
	a, _ := externalStore(t, srv, t.TempDir(), 1, "")
	b, _ := externalStore(t, srv, t.TempDir(), 2, "")
	other, _ := externalStore(t, srv, t.TempDir(), 1, "other/")

	w := b.Watch(PrefixInstances)
	defer w.Close()
	put(t, a, instance(1), Stored)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	events, err := w.Next(ctx)
	if err != nil || len(events) != 1 || events[0].Kind != KindInstance || events[0].ID != instance(1).ID || events[0].Deleted {
		t.Fatalf("%+v, %v", events, err)
	}
	has(t, b, instance(1))
	if d, err := b.DeleteInstance(ctx, instance(1).ID); d != Stored || err != nil {
		t.Fatal(d, err)
	}
	eventually(t, "the deletion on a", func() bool { _, ok := a.Instance(instance(1).ID); return !ok })
	if len(other.Instances()) != 0 {
		t.Error("prefixes do not separate")
	}

	put(t, a, instance(2), Stored)
	kvs, err := srv.client(t).Get(ctx, "", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range kvs.Kvs {
		if !strings.HasPrefix(string(kv.GetKey()), "dstack-gw/") {
			t.Errorf("key %s outside the prefix", kv.GetKey())
		}
	}
	if len(kvs.Kvs) != 1 {
		t.Errorf("%d keys", len(kvs.Kvs))
	}

	// Locks exclude across nodes and fence.
	la, err := a.LockCert(ctx, "example.com", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var held *HeldError
	if _, err := b.LockCert(ctx, "example.com", time.Minute); !errors.As(err, &held) || held.Holder.Node != 1 || !errors.Is(err, ErrLocked) {
		t.Fatalf("second lock: %v", err)
	}
	if err := b.ForceReleaseCertLock(ctx, "example.com"); err != nil {
		t.Fatal(err)
	}
	lb, err := b.LockCert(ctx, "example.com", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.PutCertData(ctx, "example.com", CertData{CertPEM: "old"}, la); !errors.Is(err, ErrFenced) {
		t.Errorf("fenced write: %v", err)
	}
	if err := b.PutCertData(ctx, "example.com", CertData{CertPEM: "new"}, lb); err != nil {
		t.Error(err)
	}
	la.Release(ctx) // must not release b's lock
	if h, ok := b.CertLockHolder("example.com"); !ok || h.Node != 2 {
		t.Errorf("holder %+v, %v", h, ok)
	}
	lb.Release(ctx)
	eventually(t, "the lock to be free", func() bool { _, ok := a.CertLockHolder("example.com"); return !ok })
	if c, ok := a.CertData("example.com"); !ok || c.CertPEM != "new" {
		t.Errorf("%v %v", c, ok)
	}
}

// gatewayNode is the way records go in a gateway: the registry decides, the store keeps, the watch brings what others
// did.
type gatewayNode struct {
	reg   *registry.Registry
	store *Store
	done  chan struct{}
	stop  context.CancelFunc
}

func newGatewayNode(t *testing.T, srv *server, id uint32, pool string) *gatewayNode {
	t.Helper()
	reg, err := registry.New(registry.Config{Network: netip.MustParsePrefix("10.8.0.1/16"), ClientRange: netip.MustParsePrefix(pool)}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s, _ := externalStore(t, srv, t.TempDir(), id, "")
	ctx, stop := context.WithCancel(context.Background())
	n := &gatewayNode{reg, s, make(chan struct{}), stop}
	w := s.Watch(PrefixInstances)
	go func() {
		defer close(n.done)
		defer w.Close()
		for {
			events, err := w.Next(ctx)
			if err != nil {
				return
			}
			for _, e := range events {
				if i, ok := s.Instance(e.ID); ok {
					reg.Apply(i)
				} else {
					reg.Remove(e.ID)
				}
			}
		}
	}()
	t.Cleanup(func() { stop(); <-n.done })
	return n
}

func (n *gatewayNode) register(t *testing.T, id, key int) registry.Instance {
	t.Helper()
	res, err := n.reg.Register(registry.Request{AppID: "app", InstanceID: instance(id).ID, ComposeHash: "h", PublicKey: instance(key).PublicKey})
	if err != nil {
		t.Fatal(err)
	}
	if res.Record {
		put(t, n.store, res.Instance, Stored)
	}
	return res.Instance
}

// TestRegistriesConverge: two gateways, instances that move between them, change keys and leave.
func TestRegistriesConverge(t *testing.T) {
	t.Parallel()
	srv := startServer(t, t.TempDir(), "")
	a, b := newGatewayNode(t, srv, 1, "10.8.0.0/18"), newGatewayNode(t, srv, 2, "10.8.64.0/18")
	agree := func(what string) {
		t.Helper()
		eventually(t, what, func() bool {
			x, y := a.reg.List(), b.reg.List()
			return len(x) > 0 && slices.EqualFunc(x, y, registry.Instance.Equal) && slices.EqualFunc(x, a.store.Instances(), registry.Instance.Equal)
		})
	}
	for n := range 50 {
		[]*gatewayNode{a, b}[n%2].register(t, n, n)
	}
	agree("the registrations")
	if i := b.register(t, 0, 0); i.IP.String() != "10.8.64.26" {
		t.Errorf("an instance that moved has %s", i.IP)
	}
	agree("the move")
	for n := range 50 {
		[]*gatewayNode{a, b}[n%2].register(t, n, n+100)
	}
	agree("the new keys")
	for n := range 25 {
		id := instance(n).ID
		b.reg.Remove(id)
		if d, err := b.store.DeleteInstance(context.Background(), id); d != Stored || err != nil {
			t.Fatal(d, err)
		}
	}
	agree("the removals")
	if n := a.reg.Len(); n != 25 {
		t.Errorf("%d instances left", n)
	}
}

// TestExternalOutage: the cluster goes away and comes back. Both nodes register meanwhile; where both wrote the same
// key, the later one wins.
func TestExternalOutage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := startServer(t, dir, "")
	a, buf := externalStore(t, srv, t.TempDir(), 1, "")
	b, _ := externalStore(t, srv, t.TempDir(), 2, "")
	put(t, a, instance(0), Stored)
	srv.Close()

	first, second := instance(1), instance(1)
	second.RegTime += 100
	put(t, a, first, Journaled)
	time.Sleep(5 * time.Millisecond)
	put(t, b, second, Journaled)
	put(t, a, instance(2), Journaled)
	for n := 10; n < 200; n++ {
		put(t, a, instance(n), Journaled)
	}
	if d, err := a.DeleteInstance(context.Background(), instance(0).ID); d != Journaled || err != nil {
		t.Fatal(d, err)
	}
	if err := a.CreateZTDomain(context.Background(), ZTDomain{Domain: "x.org", Port: 443}); !errors.Is(err, ErrNotWritable) {
		t.Errorf("admin write: %v", err)
	}
	if _, err := a.LockCert(context.Background(), "x.org", time.Minute); !errors.Is(err, ErrNotWritable) {
		t.Errorf("lock: %v", err)
	}
	has(t, a, first)
	has(t, b, second)
	if st := a.Status(); st.Writable || st.Pending != 193 || st.Reason == "" {
		t.Errorf("%+v", st)
	}

	startServer(t, dir, srv.url)
	for _, s := range []*Store{a, b} {
		eventually(t, "the cluster to be writable", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	}
	for _, s := range []*Store{a, b} {
		eventually(t, "both to agree", func() bool {
			i, _ := s.Instance(first.ID)
			_, gone := s.Instance(instance(0).ID)
			_, third := s.Instance(instance(2).ID)
			return i.Equal(second) && !gone && third && len(s.Instances()) == 192
		})
	}
	put(t, a, instance(3), Stored)
	if !strings.Contains(buf.String(), "writes that had waited are in etcd") {
		t.Errorf("not said:\n%s", buf)
	}
}

// TestExternalStartWithout: a node restarts while the cluster is unreachable.
func TestExternalStartWithout(t *testing.T) {
	t.Parallel()
	dir, data := t.TempDir(), t.TempDir()
	srv := startServer(t, dir, "")
	a, _ := externalStore(t, srv, data, 1, "")
	put(t, a, instance(1), Stored)
	if err := a.CreateDNSCredential(context.Background(), DNSCredential{ID: "c", Provider: "cloudflare"}, true); err != nil {
		t.Fatal(err)
	}
	srv.Close()
	put(t, a, instance(2), Journaled)
	a.Close()

	a, buf := externalStore(t, srv, data, 1, "")
	has(t, a, instance(1))
	has(t, a, instance(2))
	if _, ok := a.DNSCredential("c"); !ok {
		t.Error("the backup lacks the credential")
	}
	put(t, a, instance(3), Journaled)
	if !strings.Contains(buf.String(), "starting from the backup") {
		t.Errorf("not said:\n%s", buf)
	}
	w := a.Watch(PrefixInstances)
	defer w.Close()
	w.Take()
	srv = startServer(t, dir, srv.url)
	c := srv.client(t)
	if _, err := c.Delete(context.Background(), "dstack-gw/"+instanceKey(instance(1).ID)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cluster to be writable", func() bool { st := a.Status(); return st.Writable && st.Pending == 0 })
	eventually(t, "the deletion made elsewhere", func() bool { _, ok := a.Instance(instance(1).ID); return !ok })
	has(t, a, instance(2))
	has(t, a, instance(3))
}

// TestWatchResume: changes that were compacted away while the watch was interrupted still arrive, as differences.
func TestWatchResume(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := startServer(t, dir, "")
	a, _ := externalStore(t, srv, t.TempDir(), 1, "")
	put(t, a, instance(1), Stored)
	put(t, a, instance(2), Stored)
	w := a.Watch(PrefixInstances)
	defer w.Close()
	if events := w.Take(); len(events) != 2 {
		t.Fatalf("a new watcher sees %+v", events)
	}
	srv.Close()
	eventually(t, "the outage to be noticed", func() bool { return !a.Status().Writable })

	srv = startServer(t, dir, "") // on another port: not visible to the store
	c := srv.client(t)
	ctx := context.Background()
	codec, _ := newCodec(9, nil)
	enc := func(n int, at int64) string {
		v, _ := codec.encode("", at, toInstanceRecord(instance(n)))
		return string(v)
	}
	var rev int64
	for range 50 {
		r, err := c.Put(ctx, "dstack-gw/"+instanceKey(instance(3).ID), enc(3, time.Now().UnixMilli()))
		if err != nil {
			t.Fatal(err)
		}
		rev = r.Header.Revision
	}
	if _, err := c.Delete(ctx, "dstack-gw/"+instanceKey(instance(1).ID)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(ctx, rev, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	srv.Close()

	startServer(t, dir, a.opts.Endpoints[0])
	got := map[string]bool{}
	dctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for len(got) < 2 {
		events, err := w.Next(dctx)
		if err != nil {
			t.Fatalf("%v, only %v arrived", err, got)
		}
		for _, e := range events {
			got[e.ID] = e.Deleted
		}
	}
	if del, ok := got[instance(1).ID]; !ok || !del {
		t.Errorf("the deletion did not arrive: %v", got)
	}
	if del, ok := got[instance(3).ID]; !ok || del {
		t.Errorf("the new record did not arrive: %v", got)
	}
	has(t, a, instance(2))
	has(t, a, instance(3))
}
