package explain

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// Registry is the part of registry.Registry that is asked.
type Registry interface {
	Instance(id string) (registry.Instance, bool)
}

// WireGuard is the part of wireguard.Device that is asked.
type WireGuard interface {
	Handshakes() *wireguard.Table
	Status() wireguard.Status
}

// Resolver is the part of customdomain.Resolver that is asked.
type Resolver interface {
	Cached(name string) (customdomain.Answer, error, bool)
	Resolve(ctx context.Context, name string) (customdomain.Answer, error)
}

// Deps are the parts of the gateway that a report is made from. Snapshot, Mono,
// Registry, WireGuard and Resolver are required.
type Deps struct {
	// Snapshot is what connections route by (dataplane.Server.Snapshot).
	Snapshot func() *routing.Snapshot
	// Mono is the clock of routing.State.FailedAt (dataplane.Server.Mono).
	Mono      func() int64
	Registry  Registry
	WireGuard WireGuard
	Resolver  Resolver

	// LookupTXT asks DNS for one record, past the resolver's memory (DNS.LookupTXT);
	// nil: only what Resolver says is shown.
	LookupTXT func(ctx context.Context, name string) (TXT, error)
	// Prefix and Compat are core.proxy.app_address_ns_prefix and _compat.
	Prefix string
	Compat bool

	// LookupHost asks for the public addresses of a name; nil: they are not looked
	// at. PublicAddrs are those where this gateway knows to be reached, such as the
	// one of core.wg.endpoint.
	LookupHost  func(ctx context.Context, name string) ([]netip.Addr, error)
	PublicAddrs []netip.Addr

	// Listeners are the addresses of the proxy that are bound.
	Listeners []netip.AddrPort
	// InboundPROXY and TrustedSources are those of dataplane.Options.
	InboundPROXY   bool
	TrustedSources []netip.Prefix

	// Selection, MaxPerApp, Localhost (LocalhostBackend), PolicyHold and Connect are
	// those of dataplane.Options.
	Selection  routing.Selection
	MaxPerApp  int64
	Localhost  bool
	PolicyHold time.Duration
	Connect    time.Duration
	// PolicyFetch says how the last attempt to fetch an instance's port policy went,
	// "" if there was none; nil: unknown.
	PolicyFetch func(instance string) string

	// Roots judge certificates. Default: those of the system.
	Roots *x509.CertPool
	// Dial connects to apps. Default: that of a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Now is the wall clock. Default time.Now.
	Now func() time.Time

	// Timeout bounds a report, ProbeTimeout each connection to an app. Defaults
	// 10 s and 2 s.
	Timeout, ProbeTimeout time.Duration
	// MaxReports bounds the reports in the making; more wait. Default 4.
	MaxReports int
}

// Explainer makes reports. It is safe for concurrent use.
type Explainer struct {
	d     Deps
	slots chan struct{}
}

// New checks the dependencies and fills in the defaults.
func New(d Deps) (*Explainer, error) {
	if d.Snapshot == nil || d.Mono == nil || d.Registry == nil || d.WireGuard == nil || d.Resolver == nil {
		return nil, errors.New("explain: Snapshot, Mono, Registry, WireGuard and Resolver are required")
	}
	if d.Prefix == "" {
		d.Prefix = defaultPrefix
	}
	if d.Dial == nil {
		d.Dial = new(net.Dialer).DialContext
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	if d.Timeout <= 0 {
		d.Timeout = 10 * time.Second
	}
	if d.ProbeTimeout <= 0 {
		d.ProbeTimeout = 2 * time.Second
	}
	if d.MaxReports <= 0 {
		d.MaxReports = 4
	}
	return &Explainer{d: d, slots: make(chan struct{}, d.MaxReports)}, nil
}

// Explain walks the way of a connection to input: a host name, with or without
// scheme, port and path, or an app or instance id with or without port ("id",
// "id:8080", "id-8080s"). It takes at most Deps.Timeout.
func (e *Explainer) Explain(ctx context.Context, input string) *Report {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, e.d.Timeout)
	defer cancel()
	t := &trace{e: e, d: &e.d, ctx: ctx, now: e.d.Now(), report: Report{Input: input}}
	t.report.At = t.now.UTC().Truncate(time.Second)
	select {
	case e.slots <- struct{}{}:
		t.walk()
		<-e.slots
	case <-ctx.Done():
		t.busy()
	}
	t.report.TookMS = time.Since(began).Milliseconds()
	return &t.report
}

// trace is one report in the making.
type trace struct {
	e   *Explainer
	d   *Deps
	ctx context.Context
	now time.Time

	snap *routing.Snapshot
	in   input
	base *routing.Base // nil for custom domains and bare ids
	svc  hostname.Service

	// What the name means. port is 0 while a bare id came without one.
	id   string
	port uint16
	mode hostname.Mode

	inst *routing.Instance // id is an instance
	app  *routing.App      // of inst, or id is an app
	// cands are the instances that a connection would try, best first. shown are
	// those the tables show: cands and some more.
	cands []*routing.Instance
	shown []*routing.Instance
	// allowed are those of cands (or, without a healthy one, of shown) whose policy
	// allows the port.
	allowed []*routing.Instance
	dials   []dial

	report Report
	failed []failure
	broken string // what fails behind the gateway's back
}

func (t *trace) walk() {
	t.snap = t.d.Snapshot()
	if !t.readInput() {
		return
	}
	var address step
	var wg sync.WaitGroup
	wg.Go(func() { address = t.publicAddress() })
	t.listener()
	t.domain()
	t.label()
	t.txt()
	wg.Wait()
	t.insertAfter(stepListener, address)
	t.target()
	t.instances()
	t.policy()
	t.limit()
	t.certificate()
	t.probe()
	t.tunnel()
	t.connect()
	t.appTLS()
	t.result()
}
