package config

// ours is the "since" of keys that upstream does not have.
const ours = "dstack-gw"

// section is one table of the file.
type section struct {
	path    string
	since   string
	doc     string
	present *bool // optional table: set when a layer has it
	strict  bool  // unknown keys are errors
	repeat  bool  // the same keys stand in an earlier section; the reference page does not show them again
	keys    []key
}

// key is one setting: what it is called, what it is when no file says anything, where the value goes, what it means.
type key struct {
	name  string
	def   any // as a file would write it; nil = unset
	to    any // pointer into the Config
	since string
	doc   string

	min, max  uint64   // allowed numbers, sizes (bytes), spans (seconds), list lengths; max 0 = no limit
	oneOf     []string // allowed strings, also as elements of a list
	optional  bool     // "" means unset
	orFalse   bool     // false means ""
	orInteger bool     // a number means its digits
	hostBits  bool     // CIDR that is an address with a mask
	family    int      // 4 or 6, for addresses and CIDR; 0 = both
	besides   bool     // relative paths are meant relative to the file that names them
	secret    bool     // never shown
	url       bool     // may carry a password, which is never shown
	derived   string   // what an unset key becomes, for the reference page
	repeat    bool     // as in section
}

// table binds every key to its place in c. It is the single description of the configuration.
func table(c *Config) []section {
	core := &c.Core
	main := serverKeys(&c.Server, serverDefaults{
		workers: 8, maxBlocking: 64, ident: "dstack Gateway", tempDir: "/tmp", keepAlive: 10, address: "127.0.0.1:8010",
	}, false)
	framework := serverDefaults{maxBlocking: 512, ident: "Rocket", tempDir: "/tmp", keepAlive: 5}

	framework.address = "127.0.0.1:8011"
	admin := append([]key{
		{name: "enabled", def: false, to: &core.Admin.Enabled, doc: "Start the admin server. It refuses to start without one of `auth_token`, the environment variables `DSTACK_GATEWAY_ADMIN_TOKEN` or `ADMIN_API_TOKEN`, `htpasswd_file` or `insecure_no_auth`."},
		{name: "auth_token", def: "", to: &core.Admin.AuthToken, since: "0.6.0", secret: true, doc: "Shared secret of operators; white space around it is dropped. Empty: `DSTACK_GATEWAY_ADMIN_TOKEN`, then `ADMIN_API_TOKEN` of the environment. Less than 16 characters can be guessed and are warned about."},
		{name: "htpasswd_file", def: "", to: &core.Admin.HtpasswdFile, since: "0.6.0", doc: "Apache htpasswd file with bcrypt entries, read once at start; relative to the working directory."},
		{name: "insecure_no_auth", def: false, to: &core.Admin.InsecureNoAuth, since: "0.6.0", doc: "Let everybody who reaches the listener administer the gateway. For tests on a loopback address."},
		{name: "pprof", def: false, to: &core.Admin.Pprof, since: ours, doc: "Serve `/debug/pprof` behind the admin authentication. Profiles slow the gateway down a little while they are taken."},
	}, serverKeys(&core.Admin.Server, framework, true)...)

	framework.address = "127.0.0.1:8012"
	debug := append([]key{
		{name: "insecure_enable_debug_rpc", def: false, to: &core.Debug.InsecureEnableDebugRPC, since: "0.5.6", doc: "Start the debug server. It has no authentication and registers any app as asked: for tests only."},
		{name: "insecure_skip_attestation", def: false, to: &core.Debug.InsecureSkipAttestation, since: "0.5.6", doc: "Do not ask the guest agent for the own app id and do not check the identity of other nodes. Registration on the main server stays as strict as ever."},
		{name: "insecure_localhost_backend", def: false, to: &core.Debug.InsecureLocalhostBackend, since: "0.6.0", doc: "The app id `localhost` reaches every port of this machine's 127.0.0.1, whatever the port policy says."},
		{name: "insecure_allow_remote", def: false, to: &core.Debug.InsecureAllowRemote, since: ours, doc: "Allow the debug server to listen on an address that other machines reach. Without it such an address is an error."},
	}, serverKeys(&core.Debug.Server, framework, true)...)

	var all []section
	all = append(all, section{path: "", doc: "Main RPC server: guests register here, other nodes call it.", keys: main})
	all = append(all, serverSections("", &c.Server, false)...)
	all = append(all, section{path: "core", doc: "Process-wide settings.", keys: []key{
		{name: "set_ulimit", def: true, to: &core.SetUlimit, doc: "Raise the soft limit of open files to the hard limit at start. A connection takes two descriptors, six while spliced."},
		{name: "rpc_domain", def: "", to: &core.RPCDomain, doc: "When not empty, the guest agent is asked at every start for the certificate of the main server, with this name in it, and `tls.key`, `tls.certs` and `tls.mutual.ca_certs` are overwritten. Empty: the files are used as they are."},
		{name: "preflight", def: PreflightWarn, to: &core.Preflight, since: ours, oneOf: []string{PreflightWarn, PreflightEnforce, PreflightOff}, doc: "What to do when a kernel limit is too low for `core.tuning`. The kernel preflight is part of a later release: until then the value is accepted and has no effect, and `dstack-gw doctor` shows the limits."},
	}})
	all = append(all, section{path: "core.auth", doc: "Webhook that is asked whether an app may register.", keys: []key{
		{name: "enabled", def: false, to: &core.Auth.Enabled, doc: "Ask the webhook. Off: every attested app may register."},
		{name: "url", def: "http://localhost/app-auth", to: &core.Auth.URL, url: true, doc: "Where the question is posted, http or https."},
		{name: "timeout", def: "5s", to: &core.Auth.Timeout, min: 1, doc: "Limit of one question. A webhook that does not answer refuses the registration."},
		{name: "cache", def: "0s", to: &core.Auth.Cache, since: ours, max: 60, doc: "How long a yes is reused for the same app, at most 60 s. Guests register again every 180 s, so `0s` asks each time; a longer time saves the webhook after a restart, when all guests come at once, and delays a revocation by as much."},
	}})
	all = append(all, section{path: "core.admin", doc: "Admin server. The table takes all keys of the main server as well, with the defaults shown here.", keys: admin})
	all = append(all, serverSections("core.admin.", &core.Admin.Server, true)...)
	all = append(all, section{path: "core.debug", since: "0.5.6", doc: "Debug server and switches for tests. The table takes all keys of the main server as well. Each `insecure_` switch is warned about at start.", keys: debug})
	all = append(all, serverSections("core.debug.", &core.Debug.Server, true)...)
	all = append(all, section{path: "core.wg", doc: "WireGuard overlay through which apps are reached.", keys: []key{
		{name: "public_key", def: "", to: &core.WG.PublicKey, derived: "from `private_key`", doc: "Own public key, told to guests; base64 of 32 bytes."},
		{name: "private_key", def: "", to: &core.WG.PrivateKey, secret: true, doc: "Own private key; base64 of 32 bytes."},
		{name: "listen_port", def: 51820, to: &core.WG.ListenPort, doc: "UDP port of the interface."},
		{name: "ip", def: "10.0.0.1/24", to: &core.WG.IP, hostBits: true, family: 4, doc: "Own address with the mask of the whole overlay (all nodes), not only of this node's range."},
		{name: "reserved_net", def: []any{"10.0.0.1/32"}, to: &core.WG.ReservedNet, family: 4, doc: "Networks of which no address is given to a guest; one of them holds the own address, all lie in the overlay."},
		{name: "client_ip_range", def: "10.0.0.0/25", to: &core.WG.ClientIPRange, family: 4, doc: "Addresses that this node gives to guests. Ranges of two nodes must not overlap."},
		{name: "config_path", def: "/etc/wireguard/wg0.conf", to: &core.WG.ConfigPath, doc: "Where the peers are written in the format of `wg`, mode 0600, for other tools to read."},
		{name: "interface", def: "wg0", to: &core.WG.Interface, doc: "Name of the interface, at most 15 bytes. An existing one is adopted as it is."},
		{name: "endpoint", def: "10.0.2.2:51820", to: &core.WG.Endpoint, doc: "Public `ip:port` told to guests. IPv4 digits only: guests hand the part before the colon to iptables."},
		{name: "mode", def: WGAuto, to: &core.WG.Mode, since: ours, oneOf: []string{WGAuto, WGKernel, WGUserspace, WGNone}, doc: "Who does the encryption: `kernel` (the module), `userspace` (inside this process: slower, and its tunnels end with it), `auto` (the kernel if it can, else user space, saying so), `none` (no interface is touched; for tests)."},
		{name: "mtu", def: 1420, to: &core.WG.MTU, since: ours, min: 576, max: 65455, doc: "MTU in bytes of an interface that this process creates. 1420 fits a 1500 byte path; take 80 less than the smallest path MTU, or large packets vanish. Guests use 1420 too."},
	}})
	all = append(all, proxySections(&core.Proxy)...)
	all = append(all, section{path: "core.recycle", doc: "Removal of instances that are gone.", keys: []key{
		{name: "enabled", def: true, to: &core.Recycle.Enabled, doc: "Remove them."},
		{name: "interval", def: "5m", to: &core.Recycle.Interval, min: 1, doc: "Time between two rounds; the first comes after one interval."},
		{name: "timeout", def: "10h", to: &core.Recycle.Timeout, doc: "An instance without a handshake on any node for this long is removed. Its address is free again then, so shorter times need fewer addresses and forgive shorter outages."},
		{name: "node_timeout", def: "10m", to: &core.Recycle.NodeTimeout, doc: "Accepted, no effect: nodes are removed by an operator only."},
	}})
	all = append(all, section{path: "core.sync", doc: "This node's place in a cluster. Nodes share one store (`core.store`); the gossip settings of upstream are accepted so that its files load.", keys: []key{
		{name: "enabled", def: false, to: &core.Sync.Enabled, doc: "This node is one of several."},
		{name: "node_id", def: 0, to: &core.Sync.NodeID, doc: "Number of this node, unique in the cluster, not 0 when `enabled`. Never give the number of a lost node to a new one."},
		{name: "my_url", def: "https://localhost:8011", to: &core.Sync.MyURL, url: true, doc: "Base URL of this node's main server as other nodes reach it."},
		{name: "interval", def: "1m", to: &core.Sync.Interval, doc: "Accepted, no effect: changes reach all nodes at once. (Upstream: gossip period, 30 s up to 0.5.5.)"},
		{name: "timeout", def: "30s", to: &core.Sync.Timeout, min: 1, doc: "Limit of one call to another node. (2 s up to 0.5.5.)"},
		{name: "bootnode", def: "", to: &core.Sync.Bootnode, url: true, doc: "Base URL of a node to join through. Empty: this node is the first or knows the others from its store."},
		{name: "data_dir", def: "/dstack-gateway/data", to: &core.Sync.DataDir, doc: "Directory of everything this node must remember: identity, journal, store. Used with `enabled = false` too; it holds private keys."},
		{name: "persist_interval", def: "5m", to: &core.Sync.PersistInterval, doc: "Accepted, no effect: the store writes through."},
		{name: "sync_connections_enabled", def: true, to: &core.Sync.SyncConnectionsEnabled, doc: "Accepted, no effect: connection counts are asked of the nodes when somebody wants them."},
		{name: "sync_connections_interval", def: "30s", to: &core.Sync.SyncConnectionsInterval, doc: "Accepted, no effect, as above."},
	}})
	att := &core.Attestation
	all = append(all, section{path: "core.attestation", since: "0.6.0", strict: true, doc: "Verification of evidence. An unknown key here is an error, because a misspelt one would weaken the check silently.", keys: []key{
		{name: "insecure_allow_external_trust_anchors", def: false, to: &att.InsecureAllowExternalTrustAnchors, doc: "Accept entries of `root_ca`: whoever holds their keys can pose as any CVM. For tests."},
	}})
	all = append(all, section{path: "core.attestation.urls", since: "0.6.0", strict: true, doc: "Where collateral is fetched.", keys: []key{
		{name: "pccs", def: "", to: &att.PCCSURL, derived: "`https://pccs.phala.network`", url: true, doc: "TDX collateral service."},
		{name: "amd_kds", def: "", to: &att.AMDKDSURL, derived: "AMD's service", url: true, doc: "SEV-SNP certificate service."},
	}})
	anchor := func(name string, to *string, what string) key {
		return key{name: name, def: "", to: to, doc: "Root certificate (PEM or DER) instead of the built-in one for " + what + "."}
	}
	all = append(all, section{path: "core.attestation.root_ca", since: "0.6.0", strict: true, doc: "Replacement trust anchors, relative to the working directory. Needs `insecure_allow_external_trust_anchors`.", keys: []key{
		anchor("tdx", &att.RootCA.TDX, "Intel TDX quotes"),
		anchor("gcp_tpm", &att.RootCA.GCPTPM, "Google Cloud TPM quotes"),
		anchor("aws_nitro_enclave", &att.RootCA.AWSNitroEnclave, "AWS Nitro enclaves"),
		anchor("aws_nitro_tpm", &att.RootCA.AWSNitroTPM, "AWS NitroTPM"),
		anchor("sev_snp_milan", &att.RootCA.SEVSNPMilan, "SEV-SNP on Milan"),
		anchor("sev_snp_genoa", &att.RootCA.SEVSNPGenoa, "SEV-SNP on Genoa"),
		anchor("sev_snp_turin", &att.RootCA.SEVSNPTurin, "SEV-SNP on Turin"),
	}})
	st := &core.Store
	all = append(all, section{path: "core.store", since: ours, doc: "The etcd that holds registrations, certificates and settings, in `core.sync.data_dir` + `/store` when embedded. It syncs to disk on every write: take a local disk, not a network file system. Traffic never waits for it.", keys: []key{
		{name: "mode", def: StoreEmbedded, to: &st.Mode, oneOf: []string{StoreEmbedded, StoreExternal}, doc: "`embedded` runs etcd in this process and needs nothing else. `external` uses a cluster that somebody else operates, backs up and secures: it sees all certificate keys."},
		{name: "endpoints", def: []any{}, to: &st.Endpoints, url: true, doc: "URLs of the external etcd. List all members, or the loss of one can look like the loss of all."},
		{name: "username", def: "", to: &st.Username, doc: "User of the external etcd; empty = none, or the name in the client certificate."},
		{name: "password_file", def: "", to: &st.PasswordFile, besides: true, doc: "File with the password of `username`; one line."},
		{name: "quota_bytes", def: "2GiB", to: &st.QuotaBytes, min: 64 << 20, doc: "Size at which the embedded etcd refuses writes until space is freed. A larger quota makes a restart read more."},
	}})
	all = append(all, section{path: "core.store.tls", since: ours, doc: "TLS towards an external etcd. Relative paths are meant relative to the file that names them.", keys: []key{
		{name: "ca", def: "", to: &st.TLS.CA, besides: true, doc: "PEM file of the authorities that may sign the server's certificate; empty = those of the system."},
		{name: "cert", def: "", to: &st.TLS.Cert, besides: true, doc: "PEM client certificate; needs `key`."},
		{name: "key", def: "", to: &st.TLS.Key, besides: true, doc: "PEM key of `cert`."},
	}})
	all = append(all, section{path: "core.metrics", since: ours, doc: "Prometheus metrics. The admin server always has them, behind its authentication.", keys: []key{
		{name: "addr", def: "", to: &core.Metrics.Addr, optional: true, doc: "Extra listener for `/metrics` without authentication; empty = none. Metrics name apps, so keep it on loopback or a scraping network."},
		{name: "top_apps", def: 200, to: &core.Metrics.TopApps, max: 100000, doc: "Number of busiest apps that get a label of their own; the others are added up as `other`. Each adds a handful of series to Prometheus."},
	}})
	all = append(all, section{path: "core.log", since: ours, doc: "Shape of the log. The level comes from the environment variable `RUST_LOG`.", keys: []key{
		{name: "format", def: LogText, to: &core.Log.Format, oneOf: []string{LogText, LogJSON}, doc: "`text` (key=value) or `json`, one object a line."},
		{name: "access_log", def: false, to: &core.Log.AccessLog, doc: "Log each proxied connection when it ends. At high connection rates this costs noticeable CPU: see `sample`."},
		{name: "sample", def: 1, to: &core.Log.Sample, min: 1, doc: "Log one in this many connections; 1 = all."},
	}})
	all = append(all, section{path: "core.tuning", since: ours, doc: "Targets for which `dstack-gw doctor` judges kernel limits; nothing in the gateway is limited by them.", keys: []key{
		{name: "target_connections", def: 100000, to: &core.Tuning.TargetConnections, min: 1, doc: "Client connections open at the same time."},
		{name: "target_rate", def: 0, to: &core.Tuning.TargetRate, derived: "the larger of 1000 and a hundredth of `target_connections`", doc: "New connections a second at the peak; closed ones stay in the kernel's tables for minutes, so the rate often counts for more than the number."},
	}})
	return all
}

func proxySections(p *Proxy) []section {
	gates := func(g *Gate) []key {
		return []key{
			{name: "after_bytes", to: &g.AfterBytes, doc: "Take over when this many bytes went through, both directions together. Either gate is enough; with neither the connection is taken over at once. Short exchanges do not earn back the cost of the change, long ones do."},
			{name: "after_duration", to: &g.AfterDuration, doc: "Take over when the connection is this old, looked at when data moves."},
		}
	}
	t, f := &p.Timeouts, &p.PortPolicyFetch
	return []section{
		{path: "core.proxy", doc: "Public entry point for TLS connections.", keys: []key{
			{name: "tls_crypto_provider", def: "aws-lc-rs", to: &p.TLSCryptoProvider, oneOf: []string{"aws-lc-rs", "ring"}, doc: "Accepted, no effect: cryptography is Go's."},
			{name: "tls_versions", def: []any{"1.2"}, to: &p.TLSVersions, min: 1, oneOf: []string{"1.2", "1.3"}, doc: "TLS versions of the terminating endpoint. Adding `1.3` saves new clients a round trip; clients that know only 1.2 notice nothing."},
			{name: "listen_addr", def: "0.0.0.0", to: &p.ListenAddr, family: 4, doc: "IPv4 address of the listeners."},
			{name: "listen_addr6", def: "", to: &p.ListenAddr6, since: ours, optional: true, family: 6, doc: "IPv6 address for a second set of listeners, such as `::`; empty = none. Apps that are sent a PROXY header then see IPv6 sources."},
			{name: "listen_port", def: 8443, to: &p.ListenPort, doc: "One port, or a range `\"443-543\"` (string and range since 0.5.6). Each port of a range is a listener on each worker."},
			{name: "agent_port", def: 8090, to: &p.AgentPort, doc: "Port of the guest agent inside the CVM; told to guests and used to fetch port policies."},
			{name: "buffer_size", def: 65536, to: &p.BufferSize, min: 1, max: 16 << 20, doc: "Relay buffer of one direction of one connection (8192 up to 0.5.11). Two are held while a connection moves bytes in user space: larger is faster for bulk, and times the number of connections it is the memory."},
			{name: "connect_top_n", def: 3, to: &p.ConnectTopN, doc: "Instances among which the fastest to answer is taken; 0 = one random healthy instance. More hides dead instances better and opens more connections that apps see closed at once."},
			{name: "app_address_ns_prefix", def: "_dstack-app-address", to: &p.AppAddressNSPrefix, doc: "Label of the TXT record that points a custom domain at an app."},
			{name: "app_address_ns_compat", def: true, to: &p.AppAddressNSCompat, doc: "Also ask for `_tapp-address`, the label of old deployments."},
			{name: "app_address_dns_servers", def: []any{}, to: &p.AppAddressDNSServers, since: "0.6.0", doc: "Resolvers (`ip:port`) for these records; empty = those of the system."},
			{name: "workers", def: 32, to: &p.Workers, doc: "Accept loops, each with its own listener when `thread_per_core`; 0 counts as 1. More than the number of CPUs brings nothing but listeners."},
			{name: "thread_per_core", def: true, to: &p.ThreadPerCore, since: "0.6.0", doc: "One SO_REUSEPORT listener and accept loop for each worker, so that accepting is not one queue. Off: one shared listener."},
			{name: "connection_rebalance", def: true, to: &p.ConnectionRebalance, since: "0.6.0", doc: "Move fresh connections to the least loaded worker; needs `thread_per_core`."},
			{name: "max_connections_per_app", def: 2000, to: &p.MaxConnectionsPerApp, since: "0.5.6", doc: "Open connections of one app on this gateway; more are closed. 0 = no limit, then one app can take all descriptors."},
			{name: "inbound_pp_enabled", def: false, to: &p.InboundPPEnabled, since: "0.5.9", doc: "Every connection begins with a PROXY header (v1 or v2); one without is closed. Only behind a load balancer that sends it: the header is believed."},
			{name: "pp_trusted_sources", def: []any{}, to: &p.PPTrustedSources, since: ours, doc: "Networks (CIDR, both families) from which PROXY headers are believed; connections from elsewhere are closed. Empty = everywhere, as upstream: then whoever reaches the port chooses the source address that apps see."},
			{name: "max_half_open", def: 16384, to: &p.MaxHalfOpen, since: ours, doc: "Connections that have not yet said which host they want; more are closed at once. 0 = no limit. Each holds a buffer of up to 16 KiB for at most `timeouts.pp_header` + `timeouts.handshake`, so this bounds the memory that silent clients can take."},
			{name: "max_half_open_per_source", def: 4096, to: &p.MaxHalfOpenPerSource, since: ours, doc: "The same for one source address (one /64 of IPv6). 0 = no limit: needed when a load balancer or user-mode network makes all clients come from one address at high rates."},
			{name: "policy_hold", to: &p.PolicyHold, optional: true, since: ours, derived: "`timeouts.connect`", doc: "How long a connection to an instance waits whose port policy is still being fetched; `0s` refuses it at once, as upstream does."},
			{name: "base_domain", def: "", to: &p.BaseDomain, since: "<=0.5.5, 0.6.0", doc: "Domain of the static certificate for `*.base_domain`; used when `cert_chain` and `cert_key` are set as well."},
			{name: "cert_chain", def: "", to: &p.CertChain, since: "<=0.5.5, 0.6.0", doc: "PEM chain of the static certificate, relative to the working directory."},
			{name: "cert_key", def: "", to: &p.CertKey, since: "<=0.5.5, 0.6.0", doc: "PEM key of the static certificate, relative to the working directory."},
		}},
		{path: "core.proxy.tcp_splice", since: "0.6.0", present: &p.TCPSplice.Enabled, doc: "The table switches on moving bytes by `splice`, inside the kernel, for passthrough connections. Absent = off; empty = from the first byte.",
			keys: append(gates(&p.TCPSplice.Gate), key{name: "release_idle_pipes", def: false, to: &p.TCPSplice.ReleaseIdlePipes, doc: "Give the pipes of an idle connection back: fewer descriptors, a little more work when it wakes."})},
		{path: "core.proxy.ktls", since: "0.6.0", present: &p.KTLS.Enabled, doc: "The table asks for encryption of terminated connections in the kernel. Whether the kernel can is found out at start; when it cannot, the log says so and user space does it. Gates need `tcp_splice` too.",
			keys: gates(&p.KTLS.Gate)},
		{path: "core.proxy.port_policy_fetch", since: "0.5.9", doc: "Fetching the port policy of guests that do not report it.", keys: []key{
			{name: "timeout", def: "10s", to: &f.Timeout, min: 1, doc: "Limit of one call to the guest agent."},
			{name: "max_retries", def: 5, to: &f.MaxRetries, doc: "Further attempts after the first."},
			{name: "backoff_initial", def: "1s", to: &f.BackoffInitial, doc: "Pause before the second attempt; doubles each time."},
			{name: "backoff_max", def: "30s", to: &f.BackoffMax, doc: "Longest pause."},
		}},
		{path: "core.proxy.timeouts", doc: "Limits of one proxied connection. Longer ones forgive slow clients, shorter ones free descriptors earlier.", keys: []key{
			{name: "pp_header", def: "5s", to: &t.PPHeader, min: 1, since: "0.5.9", doc: "Reading the PROXY header."},
			{name: "handshake", def: "5s", to: &t.Handshake, min: 1, doc: "Reading the ClientHello; and again the TLS handshake when the gateway terminates."},
			{name: "dns_resolve", def: "5s", to: &t.DNSResolve, min: 1, since: "0.5.6", doc: "All TXT lookups of one connection together."},
			{name: "connect", def: "5s", to: &t.Connect, min: 1, doc: "Reaching an instance of the app, all attempts together."},
			{name: "cache_top_n", def: "30s", to: &t.CacheTopN, doc: "How long a choice of instances is reused."},
			{name: "handshake_stale", def: "30m", to: &t.HandshakeStale, since: "0.6.0", doc: "An instance whose last WireGuard handshake is older is not offered. A live tunnel makes one every 2 minutes."},
			{name: "data_timeout_enabled", def: true, to: &t.DataTimeoutEnabled, doc: "Off: `idle` and `shutdown` do not apply, only `total` ends a silent connection."},
			{name: "idle", def: "10m", to: &t.Idle, doc: "No byte moved in either direction. A slow connection is not an idle one. WebSocket and database clients often need an hour here."},
			{name: "write", def: "5s", to: &t.Write, doc: "Accepted, no effect since 0.6.0: a stalled write is idle."},
			{name: "shutdown", def: "5s", to: &t.Shutdown, doc: "Passing the end of one direction on to the other side."},
			{name: "total", def: "5h", to: &t.Total, min: 1, doc: "The whole connection, however busy it is."},
		}},
	}
}

type serverDefaults struct {
	workers, maxBlocking int
	ident, tempDir       string
	keepAlive            int
	address              string
}

// serverKeys are the keys of an HTTP server. The admin and debug tables repeat them with other defaults.
func serverKeys(s *Server, d serverDefaults, repeat bool) []key {
	keys := []key{
		{name: "address", def: d.address, to: &s.Address, doc: "Where the server listens: `ip`, `ip:port`, `tcp:ip:port` or `unix:/path`. Without a port here and in `port`: 8000."},
		{name: "ident", def: d.ident, to: &s.Ident, orFalse: true, doc: "`Server` header of answers; `false` = none."},
		{name: "keep_alive", def: d.keepAlive, to: &s.KeepAlive, doc: "Seconds that an idle HTTP/1.1 connection stays open; 0 = closed after each answer."},
		{name: "port", to: &s.port, repeat: repeat, doc: "Replaces the port of `address`."},
		{name: "limits", to: &s.Limits, repeat: repeat, doc: "Table of body limits by RPC method, as in `limits.RegisterCvm = \"1MiB\"`. Others have 10 MiB."},
		{name: "reuse", def: true, to: &s.Reuse, repeat: repeat, doc: "Replace the file of a unix socket that an earlier process left behind."},
		{name: "log_level", def: "info", to: &s.LogLevel, orInteger: true, repeat: repeat, doc: "Accepted, no effect: the level comes from `RUST_LOG`. `normal` and `critical` of very old files are warned about."},
		{name: "workers", def: d.workers, to: &s.Workers, repeat: repeat, doc: "Accepted, no effect: the Go runtime uses the CPUs it is given (`GOMAXPROCS`)."},
		{name: "max_blocking", def: d.maxBlocking, to: &s.MaxBlocking, repeat: repeat, doc: "Accepted, no effect, as above."},
		{name: "temp_dir", def: d.tempDir, to: &s.TempDir, repeat: repeat, doc: "Accepted, no effect: no request is written to disk."},
	}
	return keys
}

// serverSections are the tables inside the table of an HTTP server. prefix is "" or ends with a dot.
func serverSections(prefix string, s *Server, repeat bool) []section {
	return []section{
		{path: prefix + "shutdown", repeat: repeat, doc: "Graceful stop of the server.", keys: []key{
			{name: "grace", def: 2, to: &s.Shutdown.Grace, doc: "Seconds that running requests get to finish."},
			{name: "mercy", def: 3, to: &s.Shutdown.Mercy, doc: "Further seconds until their connections are cut."},
		}},
		{path: prefix + "tls", repeat: repeat, doc: "Certificate of the server; required for the main server. Relative paths are meant relative to the file that names them.", keys: []key{
			{name: "key", def: "", to: &s.TLS.Key, besides: true, doc: "PEM private key. On the main server also this node's identity towards other nodes."},
			{name: "certs", def: "", to: &s.TLS.Certs, besides: true, doc: "PEM certificate chain."},
			{name: "prefer_server_cipher_order", def: false, to: &s.TLS.PreferServerCipherOrder, doc: "Accepted, no effect: Go orders the cipher suites."},
		}},
		{path: prefix + "tls.mutual", repeat: repeat, doc: "Client certificates.", keys: []key{
			{name: "ca_certs", def: "", to: &s.TLS.Mutual.CACerts, besides: true, doc: "PEM authorities that may sign client certificates. The first one is the trust anchor towards other nodes."},
			{name: "mandatory", def: false, to: &s.TLS.Mutual.Mandatory, doc: "Refuse clients without a certificate. A certificate that does not verify is refused in any case."},
		}},
	}
}

// retired is a key or table that files may still have, or have too early.
type retired struct {
	path string
	kind Kind
	when string // the upstream versions that knew it
	now  string // what it means now, the text of the warning
	// to is the key that takes the value over, if one does; convert changes it on the way.
	to      string
	convert func(any) (any, error)
}

func retiredKeys() []retired {
	list := []retired{
		{path: "core.kms_url", when: "<=0.5.11", now: "no longer used: the guest agent talks to the KMS"},
		{path: "core.pccs_url", when: "<=0.5.11", to: "core.attestation.urls.pccs", now: "read as core.attestation.urls.pccs"},
		{path: "core.state_path", when: "<=0.5.5", now: "not read at start; `dstack-gw import` takes such a state file over, without it guests register again within minutes"},
		{path: "core.run_in_dstack", when: "<=0.5.5", to: "core.debug.insecure_skip_attestation", convert: invert, now: "read as core.debug.insecure_skip_attestation, inverted"},
		{path: "core.certbot", when: "<=0.5.5", now: "ignored: domains, DNS credentials and ACME settings now live in the store and are set through the admin API (AddZtDomain, CreateDnsCredential, SetCertbotConfig)"},
		{path: "core.admin.admin_token", when: "0.6.0, alias", to: "core.admin.auth_token", now: "read as core.admin.auth_token"},
		{path: "core.debug.key_file", when: "0.5.6-0.5.11", now: "no longer used"},
		{path: "core.proxy.localhost_enabled", when: "<=0.5.11", to: "core.debug.insecure_localhost_backend", now: "read as core.debug.insecure_localhost_backend"},
		{path: "core.proxy.external_port", when: "<=0.5.5", now: "no longer used: the public port belongs to each domain (AddZtDomain)"},
		{path: "core.sync.broadcast_interval", when: "<=0.5.5", now: "no longer used: nodes share one store"},
		{path: "core.proxy.health_check", kind: Unavailable, when: "after 0.6.0", now: "not available in this release"},
		{path: "core.sync.wal_sync_window", kind: Unavailable, when: "after 0.6.0", now: "not available in this release"},
		{path: "core.proxy.express", kind: Unavailable, when: ours, now: "not available in this release"},
		{path: "core.proxy.sockmap", kind: Unavailable, when: ours, now: "not available in this release"},
		{path: "core.guard", kind: Unavailable, when: ours, now: "not available in this release"},
	}
	for _, prefix := range []string{"", "core.admin.", "core.debug."} {
		for _, name := range []string{
			"cli_colors", "ip_header", "log_format", "proxy_proto_header", "secret_key",
			"shutdown.ctrlc", "shutdown.force", "shutdown.signals", "tls.ciphers",
		} {
			list = append(list, retired{path: prefix + name, when: "all", now: "no effect: a setting of upstream's HTTP framework"})
		}
	}
	for i := range list {
		if list[i].kind == "" {
			list[i].kind = Legacy
		}
	}
	return list
}
