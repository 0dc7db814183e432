package config

import "net/netip"

// Config is the effective configuration: defaults, files and environment merged, derived values filled in.
// Load makes it; nothing changes it afterwards.
type Config struct {
	// Server is the main RPC server (top-level keys).
	Server Server
	Core   Core

	origin map[string]origin // where each key was set; keys at their default are absent
}

// origin is the place a value came from.
type origin struct {
	file string
	line int
}

// Server is the HTTP side of one of the three servers (main, admin, debug); gateway spec 1.4.
type Server struct {
	Workers     int
	MaxBlocking int
	Ident       string // "" sends no Server header
	TempDir     string
	KeepAlive   uint32 // seconds, 0 = off
	LogLevel    string
	Address     Address
	Reuse       bool
	Limits      map[string]Size // body limit by RPC method
	Shutdown    Shutdown
	TLS         TLS

	port *uint16 // folded into Address by finish
}

// BodyLimit is the largest request body of the named RPC method, in bytes.
func (s *Server) BodyLimit(method string) int64 {
	if n, ok := s.Limits[method]; ok {
		return n.Int64()
	}
	return 10 << 20
}

// Shutdown bounds the graceful stop of a server, in seconds.
type Shutdown struct {
	Grace uint32
	Mercy uint32
}

// TLS is the certificate set of one server. Paths are absolute or relative to the process's working directory: what a file
// gave relative to itself is already resolved.
type TLS struct {
	Key                     string
	Certs                   string
	Mutual                  MutualTLS
	PreferServerCipherOrder bool
}

// Enabled says whether the server speaks TLS.
func (t TLS) Enabled() bool { return t.Key != "" && t.Certs != "" }

// MutualTLS says which client certificates are accepted.
type MutualTLS struct {
	CACerts   string
	Mandatory bool
}

// Core is the [core] table; gateway spec 1.5 - 1.11.
type Core struct {
	SetUlimit   bool
	RPCDomain   string
	Preflight   string // PreflightWarn, PreflightEnforce, PreflightOff
	Auth        Auth
	Admin       Admin
	Debug       Debug
	WG          WG
	Proxy       Proxy
	Recycle     Recycle
	Sync        Sync
	Attestation Attestation
	Store       Store
	Metrics     Metrics
	Log         Log
	Tuning      Tuning
}

// Values of core.preflight.
const (
	PreflightWarn    = "warn"
	PreflightEnforce = "enforce"
	PreflightOff     = "off"
)

// Auth is the registration webhook.
type Auth struct {
	Enabled bool
	URL     string
	Timeout Duration
	Cache   Duration // how long a positive answer is reused, at most 60 s
}

// Admin is the admin server and its authentication.
type Admin struct {
	Enabled        bool
	Server         Server
	AuthToken      string // trimmed; from the file or the environment
	HtpasswdFile   string
	InsecureNoAuth bool
	Pprof          bool
}

// Debug is the debug server and the switches that weaken the gateway for tests.
type Debug struct {
	Server                   Server
	InsecureEnableDebugRPC   bool
	InsecureSkipAttestation  bool
	InsecureLocalhostBackend bool
	InsecureAllowRemote      bool
}

// Values of core.wg.mode.
const (
	WGAuto      = "auto"
	WGKernel    = "kernel"
	WGUserspace = "userspace"
	WGNone      = "none"
)

// WG is the WireGuard overlay of this node.
type WG struct {
	PublicKey     string
	PrivateKey    string
	ListenPort    uint16
	IP            netip.Prefix // own address, host bits kept; the mask is that of the whole overlay
	ReservedNet   []netip.Prefix
	ClientIPRange netip.Prefix
	ConfigPath    string
	Interface     string
	Endpoint      string
	Mode          string // WGAuto, WGKernel, WGUserspace, WGNone
	MTU           int
}

// Proxy is the public entry point.
type Proxy struct {
	TLSCryptoProvider    string
	TLSVersions          []string // "1.2", "1.3"
	ListenAddr           netip.Addr
	ListenAddr6          netip.Addr // invalid = off
	ListenPort           PortSpec
	AgentPort            uint16
	BufferSize           Size
	ConnectTopN          int // 0 = one random healthy instance
	AppAddressNSPrefix   string
	AppAddressNSCompat   bool
	AppAddressDNSServers []netip.AddrPort // empty = system resolver
	Workers              int              // at least 1
	ThreadPerCore        bool
	ConnectionRebalance  bool
	MaxConnectionsPerApp uint64 // 0 = unlimited
	InboundPPEnabled     bool
	PPTrustedSources     []netip.Prefix // empty = everybody
	MaxHalfOpen          int            // 0 = unlimited
	MaxHalfOpenPerSource int            // 0 = unlimited
	PolicyHold           Duration
	BaseDomain           string
	CertChain            string
	CertKey              string
	TCPSplice            TCPSplice
	KTLS                 KTLS
	PortPolicyFetch      PortPolicyFetch
	Timeouts             Timeouts
}

// StaticCert says whether the static certificate for *.BaseDomain is configured (all three keys; gateway spec 7.2).
func (p *Proxy) StaticCert() bool {
	return p.BaseDomain != "" && p.CertChain != "" && p.CertKey != ""
}

// Gate says when an accelerated path takes over a connection: at once when both are nil, else when either is reached.
type Gate struct {
	AfterBytes    *uint64
	AfterDuration *Duration
}

// Immediate says that the path is taken from the first byte.
func (g Gate) Immediate() bool { return g.AfterBytes == nil && g.AfterDuration == nil }

// TCPSplice is [core.proxy.tcp_splice].
type TCPSplice struct {
	Enabled bool // the table is present
	Gate
	ReleaseIdlePipes bool
}

// KTLS is [core.proxy.ktls]. Enabled says that it was asked for; whether the kernel can do it is found out at start.
type KTLS struct {
	Enabled bool
	Gate
}

// PortPolicyFetch is how the port policy of a guest that does not report one is fetched.
type PortPolicyFetch struct {
	Timeout        Duration
	MaxRetries     int
	BackoffInitial Duration
	BackoffMax     Duration
}

// Timeouts are the time limits of one proxied connection.
type Timeouts struct {
	PPHeader           Duration
	Handshake          Duration
	DNSResolve         Duration
	Connect            Duration
	CacheTopN          Duration
	HandshakeStale     Duration
	DataTimeoutEnabled bool
	Idle               Duration
	Write              Duration
	Shutdown           Duration
	Total              Duration
}

// Recycle removes instances that are gone.
type Recycle struct {
	Enabled     bool
	Interval    Duration
	Timeout     Duration
	NodeTimeout Duration
}

// Sync is this node's place in the cluster.
type Sync struct {
	Enabled                 bool
	NodeID                  uint32
	MyURL                   string
	Interval                Duration
	Timeout                 Duration
	Bootnode                string
	DataDir                 string
	PersistInterval         Duration
	SyncConnectionsEnabled  bool
	SyncConnectionsInterval Duration
}

// Attestation is where collateral comes from and what is trusted.
type Attestation struct {
	InsecureAllowExternalTrustAnchors bool
	PCCSURL                           string // "" = https://pccs.phala.network
	AMDKDSURL                         string // "" = AMD's service
	RootCA                            RootCA
}

// RootCA are files that replace built-in trust anchors; "" keeps the built-in one.
type RootCA struct {
	TDX             string
	GCPTPM          string
	AWSNitroEnclave string
	AWSNitroTPM     string
	SEVSNPMilan     string
	SEVSNPGenoa     string
	SEVSNPTurin     string
}

// Values of core.store.mode.
const (
	StoreEmbedded = "embedded"
	StoreExternal = "external"
)

// Store is the etcd that holds registrations, certificates and settings.
type Store struct {
	Mode         string // StoreEmbedded, StoreExternal
	Endpoints    []string
	Username     string
	PasswordFile string
	TLS          StoreTLS
	QuotaBytes   Size
}

// StoreTLS is the client side of TLS towards an external etcd.
type StoreTLS struct {
	CA   string
	Cert string
	Key  string
}

// Metrics is the optional listener that serves /metrics without authentication.
type Metrics struct {
	Addr    Address // IsZero = off
	TopApps int
}

// Values of core.log.format.
const (
	LogText = "text"
	LogJSON = "json"
)

// Log is the shape of the log; its level comes from RUST_LOG (ParseLogFilter).
type Log struct {
	Format    string // LogText, LogJSON
	AccessLog bool
	Sample    int // one in Sample connections is logged, at least 1
}

// Tuning are the targets that the kernel preflight computes with.
type Tuning struct {
	TargetConnections uint64
	TargetRate        uint64 // new connections a second; filled in when the file leaves it 0
}
