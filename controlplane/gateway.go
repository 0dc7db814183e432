package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/adminauth"
	"github.com/dstack-gw/dstack-gw/controlplane/agent"
	"github.com/dstack-gw/dstack-gw/controlplane/certs"
	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/rpc"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// Options are what a Gateway is made from.
type Options struct {
	Config   *config.Config
	Logger   *slog.Logger
	Version  string // bare package version
	Revision string // commit, hex
	// Env reads an environment variable (only the edges know the environment).
	Env func(string) string
}

// Gateway is one running gateway node.
type Gateway struct {
	cfg      *config.Config
	log      *slog.Logger
	opt      Options
	started  time.Time
	metrics  *prometheus.Registry
	agent    *agent.Client
	identity *certs.Identity
	auth     *adminauth.Authenticator
	store    *store.Store
	reg      *registry.Registry
	wg       *wireguard.Device
	certs    *certs.Store
	tickets  *certs.TicketKeys
	txt      *customdomain.Resolver
	dp       *dataplane.Server
	pub      *publisher
	// refreshed is pub once there is one: the WireGuard device is there first and reports its handshakes from then on.
	refreshed atomic.Pointer[publisher]
	pol       *policyFetcher
	access    *accessLog
	rpc       *rpc.Server
	bases     baseTable
	builtin   *builtinServer
	servers   []*httpServer
	ktls      string

	stop    chan struct{} // closed by the Exit RPC
	stopped sync.Once
	bg      sync.WaitGroup
	closed  []func() // in reverse order of opening
}

// New opens everything in the order of gateway spec 1.12 and binds every listener.
// On an error nothing is left behind.
func New(ctx context.Context, o Options) (g *Gateway, err error) {
	cfg := o.Config
	g = &Gateway{cfg: cfg, log: o.Logger, opt: o, started: time.Now(), metrics: prometheus.NewRegistry(), stop: make(chan struct{})}
	defer func() {
		if err != nil {
			g.closeAll()
			g = nil
		}
	}()
	runCtx, cancel := context.WithCancel(context.Background())
	g.onClose(cancel)
	labelled := prometheus.WrapRegistererWith(prometheus.Labels{"node_id": fmt.Sprint(cfg.Core.Sync.NodeID)}, g.metrics)

	g.ktls = rpc.KTLSOff
	if cfg.Core.Proxy.KTLS.Enabled {
		if err := probeKTLS(); err != nil {
			g.log.Warn("kTLS is configured but unavailable; TLS is terminated in user space", "error", err)
			g.ktls = rpc.KTLSNoULP
		} else {
			g.log.Warn("kTLS is configured but unavailable: this release terminates TLS in user space even where the kernel could do it")
		}
	}

	// WireGuard first: without an interface there is nothing to serve.
	if g.wg, err = g.openWireGuard(ctx, labelled); err != nil {
		return g, err
	}
	g.onClose(func() { _ = g.wg.Close() })

	if g.agent, err = agent.New(agent.Address(o.Env("DSTACK_AGENT_ADDRESS"), exists), nil); err != nil {
		return g, fmt.Errorf("guest agent: %w", err)
	}
	g.onClose(g.agent.CloseIdleConnections)
	if err := g.openIdentity(ctx); err != nil {
		return g, err
	}
	if cfg.Core.SetUlimit {
		raiseFileLimit(g.log)
	}
	appID, err := g.ownAppID(ctx)
	if err != nil {
		return g, err
	}
	if cfg.Core.Admin.Enabled {
		if g.auth, err = newAuthenticator(cfg, o, labelled); err != nil {
			return g, err
		}
	}

	if err := os.MkdirAll(cfg.Core.Sync.DataDir, 0o700); err != nil {
		return g, fmt.Errorf("data directory (core.sync.data_dir): %w", err)
	}
	// Not cut short by a signal: the store counts openings that have not come to an end, and takes a database that
	// repeatedly survives none for damaged.
	if g.store, err = openStore(context.WithoutCancel(ctx), cfg, g.log, labelled); err != nil {
		return g, err
	}
	g.onClose(func() { _ = g.store.Close() })
	self := rpc.Self{NodeID: cfg.Core.Sync.NodeID, UUID: g.store.NodeUUID(), AppID: appID, URL: cfg.Core.Sync.MyURL, BootnodeURL: cfg.Core.Sync.Bootnode,
		WGPublicKey: cfg.Core.WG.PublicKey, WGIP: cfg.Core.WG.IP, WGEndpoint: cfg.Core.WG.Endpoint}
	g.publishSelf(ctx, self)

	g.reg, err = registry.New(registry.Config{Network: cfg.Core.WG.IP, Reserved: cfg.Core.WG.ReservedNet, ClientRange: cfg.Core.WG.ClientIPRange, OwnKey: cfg.Core.WG.PublicKey}, time.Now)
	if err != nil {
		return g, err
	}
	for _, r := range g.reg.Load(g.store.Instances()) {
		g.log.Error("a stored registration is not used", "instance", r.ID, "error", r.Err)
	}
	if err := g.wg.Sync(ctx, g.peers()); err != nil && !errors.Is(err, wireguard.ErrNotWireGuard) {
		g.log.Error("WireGuard peers could not be set; retried in the background", "error", err)
	}
	if err := g.wg.Refresh(ctx); err != nil {
		g.log.Warn("WireGuard handshakes could not be read; instances count as unhealthy until they can", "error", err)
	}

	if err := g.openCerts(labelled); err != nil {
		return g, err
	}
	if g.txt, err = customdomain.New(customdomain.Options{Prefix: cfg.Core.Proxy.AppAddressNSPrefix, Compat: cfg.Core.Proxy.AppAddressNSCompat,
		Servers: cfg.Core.Proxy.AppAddressDNSServers, Timeout: cfg.Core.Proxy.Timeouts.DNSResolve.Std(), Logger: g.log, Registerer: labelled}); err != nil {
		return g, fmt.Errorf("custom domains: %w", err)
	}
	g.onClose(func() { g.txt.Close() })

	g.access = newAccessLog(g.log.With("target", "access"), cfg.Core.Log.AccessLog, cfg.Core.Log.Sample)
	if g.dp, err = dataplane.New(g.dataplaneOptions()); err != nil {
		return g, err
	}
	g.onClose(g.dp.Close)
	labelled.MustRegister(dataplane.NewCollector(g.dp, cfg.Core.Metrics.TopApps))
	g.pub = newPublisher(g.log, g.reg, g.dp, g.wg, g.baseList)
	g.refreshed.Store(g.pub)

	if g.rpc, err = g.openRPC(self, labelled); err != nil {
		return g, err
	}
	g.onClose(g.rpc.Close)
	g.pol = newPolicyFetcher(runCtx, g.log, g.reg, cfg.Core.Proxy.AgentPort, cfg.Core.Proxy.PortPolicyFetch, g.rpc.SetReportedPolicy)
	g.registerMetrics(labelled)
	g.builtin = newBuiltinServer(g.log, g.rpc)
	g.onClose(g.builtin.close)

	// Routing is complete before the first connection is accepted.
	ready := make(chan struct{})
	g.bg.Go(func() { g.pub.run(runCtx, ready) })
	<-ready
	g.pub.handshakes(g.wg.Handshakes())
	if err := g.dp.Start(); err != nil {
		return g, err
	}
	if err := g.openServers(); err != nil {
		return g, err
	}
	g.background(runCtx)
	return g, nil
}

func (g *Gateway) onClose(f func()) { g.closed = append(g.closed, f) }

func (g *Gateway) closeAll() {
	for i := len(g.closed) - 1; i >= 0; i-- {
		g.closed[i]()
	}
	g.closed = nil
	g.bg.Wait()
}

// Run serves until ctx ends, Exit is called over RPC, or a server fails.
func (g *Gateway) Run(ctx context.Context) error {
	runCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, len(g.servers))
	var servers sync.WaitGroup
	for _, s := range g.servers {
		servers.Go(func() { errs <- s.run(runCtx) })
	}
	g.log.Info("gateway is serving", "version", g.opt.Version, "proxy", g.cfg.Core.Proxy.ListenPort.String(), "rpc", g.cfg.Server.Address.String(),
		"wireguard", string(g.wg.Status().Mode), "instances", g.reg.Len(), "start", time.Since(g.started).Round(time.Millisecond))
	var err error
	why := "a signal"
	select {
	case <-ctx.Done():
	case <-g.stop:
		why = "the Exit RPC"
	case err = <-errs: // one server that ends ends the process
		why = "a server that ended"
	}
	began := time.Now()
	g.log.Info("gateway is stopping: calls under way are finished, then connections are closed", "because", why, "connections", g.dp.Connections())
	cancel()
	servers.Wait()
	g.closeAll()
	g.log.Info("gateway has stopped", "took", time.Since(began).Round(time.Millisecond))
	return err
}

func (g *Gateway) openWireGuard(ctx context.Context, r prometheus.Registerer) (*wireguard.Device, error) {
	c := &g.cfg.Core.WG
	var key wgtypes.Key
	if c.PrivateKey != "" {
		var err error
		if key, err = wgtypes.ParseKey(c.PrivateKey); err != nil {
			return nil, errors.New("core.wg.private_key is not a WireGuard key: want 32 bytes in base64, as `wg genkey` prints it")
		}
	}
	d, err := wireguard.Open(ctx, wireguard.Options{
		Interface: c.Interface, Address: c.IP, PrivateKey: key, ListenPort: int(c.ListenPort), MTU: c.MTU, Mode: wireguard.Mode(c.Mode), ConfigPath: c.ConfigPath,
		Endpoints: wireguard.EndpointFile(filepath.Join(g.cfg.Core.Sync.DataDir, "wg-endpoints.json")),
		OnRefresh: func(t *wireguard.Table) {
			if p := g.refreshed.Load(); p != nil {
				p.handshakes(t)
			}
		},
		Logger: g.log, Registerer: r,
	})
	if err != nil {
		return nil, fmt.Errorf("WireGuard interface %s: %w", c.Interface, err)
	}
	return d, nil
}

// openIdentity loads the certificate of the RPC server, from the guest agent where
// rpc_domain says so (gateway spec 1.12 step 6).
func (g *Gateway) openIdentity(ctx context.Context) error {
	t := &g.cfg.Server.TLS
	if t.Key == "" || t.Certs == "" || t.Mutual.CACerts == "" {
		return errors.New("the main server needs [tls] key, certs and mutual.ca_certs: guests register over mutual TLS")
	}
	if domain := g.cfg.Core.RPCDomain; domain != "" {
		err := g.agent.WriteRPCCertificate(ctx, domain, g.cfg.Core.Sync.MyURL, agent.TLSFiles{Key: t.Key, Certs: t.Certs, CACerts: t.Mutual.CACerts})
		switch {
		case err == nil:
		case g.cfg.Core.Debug.InsecureSkipAttestation && exists(t.Key) && exists(t.Certs) && exists(t.Mutual.CACerts):
			g.log.Warn("the guest agent gave no RPC certificate; the existing files are used because attestation is skipped", "error", err)
		default:
			return fmt.Errorf("RPC certificate for core.rpc_domain %q: %w (without a guest agent leave rpc_domain empty and provide the [tls] files)", domain, err)
		}
	}
	id, err := certs.LoadIdentity(certs.IdentityOptions{KeyPath: t.Key, CertsPath: t.Certs, CAPath: t.Mutual.CACerts, Mandatory: t.Mutual.Mandatory, Logger: g.log})
	if err != nil {
		return err
	}
	g.identity = id
	return nil
}

// ownAppID asks the guest agent who we are; peers must be the same app.
func (g *Gateway) ownAppID(ctx context.Context) ([]byte, error) {
	if g.cfg.Core.Debug.InsecureSkipAttestation {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	info, err := g.agent.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the guest agent for the own app id: %w (outside a CVM set core.debug.insecure_skip_attestation = true)", err)
	}
	return info.GetAppId(), nil
}

func newAuthenticator(cfg *config.Config, o Options, r prometheus.Registerer) (*adminauth.Authenticator, error) {
	ao := adminauth.Options{Token: cfg.Core.Admin.AuthToken, InsecureNoAuth: cfg.Core.Admin.InsecureNoAuth, Logger: o.Logger, Registerer: r}
	if f := cfg.Core.Admin.HtpasswdFile; f != "" {
		h, err := adminauth.LoadHtpasswd(f)
		if err != nil {
			return nil, fmt.Errorf("core.admin.htpasswd_file: %w", err)
		}
		ao.Htpasswd = h
	}
	return adminauth.New(ao)
}

func openStore(ctx context.Context, cfg *config.Config, log *slog.Logger, r prometheus.Registerer) (*store.Store, error) {
	c := &cfg.Core.Store
	o := store.Options{Mode: store.Mode(c.Mode), Dir: cfg.Core.Sync.DataDir, NodeID: cfg.Core.Sync.NodeID, Endpoints: c.Endpoints, Username: c.Username,
		QuotaBytes: c.QuotaBytes.Int64(), Logger: log, Registerer: r}
	if c.PasswordFile != "" {
		b, err := os.ReadFile(c.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("core.store.password_file: %w", err)
		}
		o.Password = trimLine(b)
	}
	if c.TLS.CA != "" || c.TLS.Cert != "" {
		t := &tls.Config{MinVersion: tls.VersionTLS12}
		if c.TLS.CA != "" {
			pem, err := os.ReadFile(c.TLS.CA)
			if err != nil {
				return nil, fmt.Errorf("core.store.tls.ca: %w", err)
			}
			t.RootCAs = x509.NewCertPool()
			if !t.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("core.store.tls.ca: no certificate in %s", c.TLS.CA)
			}
		}
		if c.TLS.Cert != "" {
			pair, err := tls.LoadX509KeyPair(c.TLS.Cert, c.TLS.Key)
			if err != nil {
				return nil, fmt.Errorf("core.store.tls.cert: %w", err)
			}
			t.Certificates = []tls.Certificate{pair}
		}
		o.TLS = t
	}
	return store.Open(ctx, o)
}

// publishSelf writes this node's record; a restart takes an operator's "down" back
// (gateway spec 1.12 step 10).
func (g *Gateway) publishSelf(ctx context.Context, self rpc.Self) {
	note := func(what string, d store.Durability, err error) {
		if err != nil {
			g.log.Error("the own node record could not be stored", "record", what, "error", err)
		} else if d != store.Stored {
			g.log.Warn("the own node record waits for the store", "record", what, "durability", d.String())
		}
	}
	d, err := g.store.PutNode(ctx, store.Node{ID: self.NodeID, UUID: self.UUID, URL: self.URL, WGPublicKey: self.WGPublicKey, WGEndpoint: self.WGEndpoint, WGIP: self.WGIP.String()})
	note("node", d, err)
	d, err = g.store.SetNodeStatus(ctx, self.NodeID, store.NodeUp)
	note("status", d, err)
	d, err = g.store.SetPeerAddr(ctx, self.NodeID, self.URL)
	note("address", d, err)
}

func (g *Gateway) peers() []wireguard.Peer {
	var peers []wireguard.Peer
	for _, i := range g.reg.List() {
		k, err := wgtypes.ParseKey(i.PublicKey)
		if err != nil {
			continue // the publisher says so
		}
		peers = append(peers, wireguard.Peer{ID: i.ID, PublicKey: k, IP: i.IP})
	}
	return peers
}

func (g *Gateway) dataplaneOptions() dataplane.Options {
	p := &g.cfg.Core.Proxy
	o := dataplane.Options{
		Logger: g.log, Hooks: hooks{g},
		Workers:      min(p.Workers, runtime.NumCPU()),
		Rebalance:    p.ConnectionRebalance,
		Backlog:      4096,
		DeferAccept:  time.Second,
		InboundPROXY: p.InboundPPEnabled, TrustedSources: p.PPTrustedSources,
		Selection: routing.Selection{TopN: p.ConnectTopN, Stale: p.Timeouts.HandshakeStale.Std(), Penalty: 10 * time.Second},
		HeadStart: 200 * time.Millisecond,
		MaxPerApp: int64(min(p.MaxConnectionsPerApp, 1<<62)), MaxHalfOpen: int64(p.MaxHalfOpen), MaxHalfOpenPeer: p.MaxHalfOpenPerSource,
		LocalhostBackend: g.cfg.Core.Debug.InsecureLocalhostBackend,
		BufferSize:       int(p.BufferSize.Int64()), Splice: spliceGate(p),
		PPHeader: p.Timeouts.PPHeader.Std(), Handshake: p.Timeouts.Handshake.Std(), Resolve: p.Timeouts.DNSResolve.Std(),
		Connect: p.Timeouts.Connect.Std(), PolicyHold: p.PolicyHold.Std(), Total: p.Timeouts.Total.Std(),
	}
	if p.Timeouts.DataTimeoutEnabled {
		o.Idle = p.Timeouts.Idle.Std()
	}
	for port := range p.ListenPort.All() {
		if p.ListenAddr.IsValid() {
			o.Listen = append(o.Listen, netip.AddrPortFrom(p.ListenAddr, port))
		}
		if p.ListenAddr6.IsValid() {
			o.Listen = append(o.Listen, netip.AddrPortFrom(p.ListenAddr6, port))
		}
	}
	return o
}

func (g *Gateway) openRPC(self rpc.Self, r prometheus.Registerer) (*rpc.Server, error) {
	d := rpc.Deps{
		Self: self, Registry: g.reg, Store: g.store, Tunnels: g.wg, Proxy: g.dp, Certs: g.certs,
		AgentPort: g.cfg.Core.Proxy.AgentPort, AppAddressNSPrefix: g.cfg.Core.Proxy.AppAddressNSPrefix,
		Splice: spliceGate(&g.cfg.Core.Proxy), KTLS: g.ktls, SkipAttestation: g.cfg.Core.Debug.InsecureSkipAttestation,
		Version: g.opt.Version, Revision: g.opt.Revision,
		InstanceConnections: func(id string) int64 {
			if i := g.dp.Snapshot().Instance(id); i != nil {
				return i.State.Active.Load()
			}
			return 0
		},
		AgentInfo:      g.agent.Info,
		PolicyMissing:  func(id string) { g.pol.need(id) },
		DomainsChanged: func() { g.pub.basesChanged() },
		Exit: func(force bool) {
			if force {
				os.Exit(0)
			}
			g.stopped.Do(func() { close(g.stop) })
		},
		Logger: g.log, Registerer: r,
	}
	if a := &g.cfg.Core.Auth; a.Enabled {
		d.Webhook = &rpc.Webhook{URL: a.URL, Timeout: a.Timeout.Std(), Cache: a.Cache.Std()}
	}
	return rpc.New(d)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func trimLine(b []byte) string {
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == '\r') {
		b = b[:len(b)-1]
	}
	return string(b)
}
