package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/controlplane/certs"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

// Proxy is what the RPCs report about the data plane; *dataplane.Server is one.
type Proxy interface {
	// Connections is the number of open client connections, routed or not.
	Connections() int64
	// SpliceEngaged counts connections that moved to splice(2).
	SpliceEngaged() uint64
}

// Tunnels is the WireGuard device; *wireguard.Device is one.
type Tunnels interface {
	Apply(ctx context.Context, p wireguard.Peer) error
	Handshakes() *wireguard.Table
	Refresh(ctx context.Context) error
}

// Self is this node as others see it.
type Self struct {
	NodeID uint32
	UUID   store.UUID
	// AppID is the own app id, which peers must have too; nil when it is not known, and then no peer is accepted.
	AppID []byte
	// URL is the base URL of the own RPC server, BootnodeURL that of the node asked for peers, empty if none.
	URL, BootnodeURL string
	// WGPublicKey, WGIP and WGEndpoint are told to guests: base64, the address with the mask of the overlay, host:port.
	WGPublicKey string
	WGIP        netip.Prefix
	WGEndpoint  string
}

// Deps are the pieces that a Server answers from. All but the ones marked optional are required.
type Deps struct {
	Self     Self
	Registry *registry.Registry
	Store    *store.Store
	Tunnels  Tunnels
	Proxy    Proxy
	Certs    *certs.Store

	// AgentPort is the port of the guest agent inside CVMs, AppAddressNSPrefix the label of TXT records; told to guests.
	AgentPort          uint16
	AppAddressNSPrefix string
	// Splice is when connections move to splice(2), KTLS one of KTLSOff and KTLSNoULP: what is in effect, not what is
	// configured. Empty means KTLSOff.
	Splice relay.Gate
	KTLS   string
	// Webhook decides about registrations; optional.
	Webhook *Webhook
	// SkipAttestation lets every caller ask for the peers (tests only).
	SkipAttestation bool
	// Version is the bare package version, Revision the commit in hex.
	Version, Revision string

	// InstanceConnections is the number of open connections to an instance.
	InstanceConnections func(instanceID string) int64
	// AgentInfo asks the guest agent of the own CVM; optional: /app-info then drops the connection.
	AgentInfo func(ctx context.Context) (*guestpb.AppInfo, error)
	// PolicyMissing is told of every registration of an instance whose port policy is not known. It must not block.
	PolicyMissing func(instanceID string)
	// DomainsChanged is told when ZT domains were added, changed or deleted here, or certificates were reloaded. It must
	// not block.
	DomainsChanged func()
	// Exit ends the process: at once and without returning if force is set, else soon and in good order, returning
	// immediately so that the caller gets an answer.
	Exit func(force bool)

	Now        func() time.Time      // optional, default time.Now
	Logger     *slog.Logger          // optional, default slog.Default()
	Registerer prometheus.Registerer // optional: metrics are not registered
}

// recordWriter is how registrations become durable; *store.Store is one.
type recordWriter interface {
	PutInstance(ctx context.Context, i registry.Instance) (store.Durability, error)
}

// Server answers RPCs. Its exported RPC methods are safe for concurrent use.
type Server struct {
	d       Deps
	log     *slog.Logger
	now     func() time.Time
	records recordWriter
	auth    *authorizer // nil: everybody may register
	metrics *metrics
	locks   instanceLocks

	writesMu sync.Mutex
	// writing are the instances whose record is being written; their locks are held.
	writing map[string]struct{}
	// unwritten are those whose last write may not have happened: the next registration writes again even if it changes
	// nothing.
	unwritten map[string]struct{}

	view    clusterCache
	acme    acmeCache
	appInfo appInfoCache
}

// New checks that the pieces are there. Close the server when done.
func New(d Deps) (*Server, error) {
	for what, missing := range map[string]bool{
		"Registry": d.Registry == nil, "Store": d.Store == nil, "Tunnels": d.Tunnels == nil, "Proxy": d.Proxy == nil, "Certs": d.Certs == nil,
		"InstanceConnections": d.InstanceConnections == nil, "PolicyMissing": d.PolicyMissing == nil, "DomainsChanged": d.DomainsChanged == nil, "Exit": d.Exit == nil,
	} {
		if missing {
			return nil, fmt.Errorf("rpc: Deps.%s is missing", what)
		}
	}
	if d.Webhook != nil && d.Webhook.URL == "" {
		return nil, errors.New("rpc: registrations need authorization, but core.auth.url is empty")
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	if d.Logger == nil {
		d.Logger = slog.Default()
	}
	if d.KTLS == "" {
		d.KTLS = KTLSOff
	}
	s := &Server{d: d, log: d.Logger, now: d.Now, records: d.Store, metrics: newMetrics(), writing: make(map[string]struct{}), unwritten: make(map[string]struct{})}
	if d.Webhook != nil {
		s.auth = newAuthorizer(*d.Webhook, d.Now)
	}
	if d.Registerer != nil {
		if err := s.metrics.register(d.Registerer); err != nil {
			return nil, fmt.Errorf("rpc: failed to register metrics: %w", err)
		}
	}
	s.view.watch = d.Store.Watch(store.PrefixNodes, store.PrefixPeerAddrs, store.PrefixCerts)
	s.acme.watch = d.Store.Watch(store.PrefixCerts, store.PrefixGlobal)
	return s, nil
}

// Close ends the subscriptions to the store.
func (s *Server) Close() {
	s.view.watch.Close()
	s.acme.watch.Close()
	if s.auth != nil {
		s.auth.w.Client.CloseIdleConnections()
	}
}

// LockInstance serialises changes of one instance's record with registrations. Whoever changes the registry and then
// writes or deletes the record in the store must hold the lock over both, or a registration in between could leave the
// store with the older state.
func (s *Server) LockInstance(id string) (unlock func()) { return s.locks.lock(id) }

// Changing reports whether a record of an instance is being written that is younger than the stored one. An event of the
// store about the instance is then out of date; the one of the write follows. False means that LockInstance waits for
// memory work only, or that the write has just begun or ended.
func (s *Server) Changing(id string) bool {
	s.writesMu.Lock()
	defer s.writesMu.Unlock()
	_, ok := s.writing[id]
	return ok
}

func unix(t time.Time) uint64 { return uint64(max(t.Unix(), 0)) }
