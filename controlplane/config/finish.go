package config

import (
	"crypto/ecdh"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// shortToken is the length below which an admin token is worth a warning.
const shortToken = 16

// finish fills in what follows from other values and checks what one key alone cannot show.
// It also runs when a key did not decode, so that all problems are found at once; such a key then has its default.
func (l *loader) finish(env func(string) string) {
	l.finishServers()
	l.finishAdmin(env)
	l.finishDebug()
	l.finishWG()
	l.finishProxy()
	l.finishCluster()
	l.finishRest()
	l.checkListeners()
}

// server is one of the HTTP servers with the prefix of its keys.
type server struct {
	prefix  string
	name    string
	enabled bool
	*Server
}

func (l *loader) servers() []server {
	core := &l.config.Core
	return []server{
		{"", "main", true, &l.config.Server},
		{"core.admin.", "admin", core.Admin.Enabled, &core.Admin.Server},
		{"core.debug.", "debug", core.Debug.InsecureEnableDebugRPC, &core.Debug.Server},
	}
}

func (l *loader) finishServers() {
	for _, s := range l.servers() {
		if s.port != nil {
			s.Address = s.Address.withPort(*s.port)
			s.port = nil
		}
		if s.enabled && !s.Address.IsUnix() && !s.Address.hasPort {
			l.warn(Suspicious, s.prefix+"address", "no port is given, %d is used", defaultPort)
			s.Address = s.Address.withPort(defaultPort)
		}
		l.checkLogLevel(s)
		l.checkTLS(s)
	}
}

func (l *loader) checkLogLevel(s server) {
	const path = "log_level"
	switch level := strings.ToLower(s.LogLevel); level {
	case "off", "error", "warn", "info", "debug", "trace", "0", "1", "2", "3", "4", "5":
	case "normal", "critical":
		l.warn(Legacy, s.prefix+path, "%q is a level of very old files; the level comes from RUST_LOG", level)
	default:
		l.warn(Suspicious, s.prefix+path, "%q is not a level; it has no effect, the level comes from RUST_LOG", s.LogLevel)
	}
}

func (l *loader) checkTLS(s server) {
	need := func(key, value, why string) {
		if value == "" {
			l.fail(s.prefix+key, errors.New(why))
		}
	}
	t := s.TLS
	if s.prefix == "" {
		need("tls.key", t.Key, "is required: the main server has no private key")
		need("tls.certs", t.Certs, "is required: the main server has no certificate")
		need("tls.mutual.ca_certs", t.Mutual.CACerts, "is required: without it no guest can be recognised")
		return
	}
	if t.Key != "" || t.Certs != "" || t.Mutual.CACerts != "" {
		need("tls.key", t.Key, "is missing: the server has no private key")
		need("tls.certs", t.Certs, "is missing: the server has no certificate")
	}
	if t.Mutual.Mandatory {
		need("tls.mutual.ca_certs", t.Mutual.CACerts, "is needed by tls.mutual.mandatory")
	}
}

func (l *loader) finishAdmin(env func(string) string) {
	a := &l.config.Core.Admin
	a.AuthToken = strings.TrimSpace(a.AuthToken)
	for _, name := range []string{"DSTACK_GATEWAY_ADMIN_TOKEN", "ADMIN_API_TOKEN"} {
		if a.AuthToken == "" {
			if a.AuthToken = strings.TrimSpace(env(name)); a.AuthToken != "" {
				l.config.origin["core.admin.auth_token"] = origin{file: "$" + name}
			}
		}
	}
	if !a.Enabled {
		return
	}
	switch {
	case a.InsecureNoAuth:
		l.warn(Insecure, "core.admin.insecure_no_auth", "the admin server on %s asks nobody for a password", a.Server.Address)
	case a.AuthToken == "" && a.HtpasswdFile == "" && !l.broken["core.admin.auth_token"]:
		l.fail("core.admin", errors.New("the admin server is enabled without authentication: set core.admin.auth_token, "+
			"one of the environment variables DSTACK_GATEWAY_ADMIN_TOKEN and ADMIN_API_TOKEN, or core.admin.htpasswd_file "+
			"(or core.admin.insecure_no_auth = true for a test)"))
	}
	if a.AuthToken != "" && len(a.AuthToken) < shortToken {
		l.warn(Insecure, "core.admin.auth_token", "is shorter than %d characters and can be guessed", shortToken)
	}
}

func (l *loader) finishDebug() {
	d := &l.config.Core.Debug
	if d.InsecureEnableDebugRPC {
		l.warn(Insecure, "core.debug.insecure_enable_debug_rpc", "the debug server on %s registers any app for anybody", d.Server.Address)
		if !d.Server.Address.Local() {
			if !d.InsecureAllowRemote {
				l.fail("core.debug.address", fmt.Errorf("%s can be reached from other machines and the debug server has no authentication: "+
					"use a loopback address, or set core.debug.insecure_allow_remote = true", d.Server.Address))
			} else {
				l.warn(Insecure, "core.debug.insecure_allow_remote", "the debug server can be reached from other machines")
			}
		}
	}
	if d.InsecureSkipAttestation {
		l.warn(Insecure, "core.debug.insecure_skip_attestation", "the identity of other nodes is not checked")
	}
	if d.InsecureLocalhostBackend {
		l.warn(Insecure, "core.debug.insecure_localhost_backend", "the app id localhost reaches every port of 127.0.0.1")
	}
	if d.Server.TLS.Enabled() && !d.InsecureEnableDebugRPC {
		l.warn(Suspicious, "core.debug.tls.key", "has no effect: the debug server is off")
	}
}

func (l *loader) finishWG() {
	w := &l.config.Core.WG
	if !l.broken["core.wg.ip"] && !l.broken["core.wg.reserved_net"] && !l.broken["core.wg.client_ip_range"] {
		l.checkNets(w)
	}
	if w.Interface == "" || len(w.Interface) > 15 || strings.ContainsAny(w.Interface, "/ \t\n\x00") {
		l.fail("core.wg.interface", fmt.Errorf("%q is not a name for an interface: 1 to 15 bytes without spaces and slashes", w.Interface))
	}
	if ap, err := netip.ParseAddrPort(w.Endpoint); w.Mode != WGNone && (err != nil || !ap.Addr().Is4()) {
		l.warn(Suspicious, "core.wg.endpoint", "%q is not an IPv4 address and port; guests that use iptables cannot reach this gateway", w.Endpoint)
	}
	l.checkKeys(w)
}

// checkNets is the address plan of gateway spec 1.9.
func (l *loader) checkNets(w *WG) {
	overlay := w.IP.Masked()
	for _, n := range w.ReservedNet {
		if !within(n, overlay) {
			l.fail("core.wg.reserved_net", fmt.Errorf("%w: %s is not inside %s, the network of core.wg.ip", ErrReservedNetOutside, n, overlay))
		}
	}
	if !slices.ContainsFunc(w.ReservedNet, func(n netip.Prefix) bool { return n.Contains(w.IP.Addr()) }) {
		l.fail("core.wg.reserved_net", fmt.Errorf("%w: %s, the address of core.wg.ip, could be given to a guest", ErrIPNotReserved, w.IP.Addr()))
	}
	if !within(w.ClientIPRange, overlay) {
		l.fail("core.wg.client_ip_range", fmt.Errorf("%w: %s is not inside %s, the network of core.wg.ip", ErrClientRangeOutside, w.ClientIPRange, overlay))
	}
}

// checkKeys compares the two WireGuard keys. They load in any state, as upstream has it, but a wrong one means no tunnel.
func (l *loader) checkKeys(w *WG) {
	decode := func(path, text string) []byte {
		raw, err := base64.StdEncoding.DecodeString(text)
		if err == nil && len(raw) == 32 {
			return raw
		}
		if text != "" {
			l.warn(Suspicious, path, "is not a WireGuard key (base64 of 32 bytes); no tunnel will come up")
		}
		return nil
	}
	public := decode("core.wg.public_key", w.PublicKey)
	raw := decode("core.wg.private_key", w.PrivateKey)
	if w.PrivateKey == "" && w.Mode != WGNone {
		l.warn(Suspicious, "core.wg.private_key", "is empty; no tunnel will come up")
	}
	if raw == nil {
		return
	}
	private, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		l.fail("core.wg.private_key", errors.New("is not a key for Curve25519"))
		return
	}
	derived := private.PublicKey().Bytes()
	switch {
	case w.PublicKey == "":
		w.PublicKey = base64.StdEncoding.EncodeToString(derived)
	case public != nil && !slices.Equal(public, derived):
		l.warn(Suspicious, "core.wg.public_key", "does not belong to core.wg.private_key; guests that are told it cannot connect")
	}
}

// within says that all of inner lies in outer.
func within(inner, outer netip.Prefix) bool {
	return inner.Bits() >= outer.Bits() && outer.Contains(inner.Addr())
}

func (l *loader) finishProxy() {
	p := &l.config.Core.Proxy
	p.Workers = max(1, p.Workers)
	if _, set := l.config.origin["core.proxy.policy_hold"]; !set {
		p.PolicyHold = p.Timeouts.Connect
	}
	if l.config.Core.Preflight == PreflightEnforce {
		l.warn(Unavailable, "core.preflight", "has no effect: the kernel preflight is not available in this release; `dstack-gw doctor` shows the limits")
	}
	if p.ConnectionRebalance && !p.ThreadPerCore {
		l.warn(Suspicious, "core.proxy.connection_rebalance", "connection_rebalance is set but has no effect without core.proxy.thread_per_core")
	}
	if p.KTLS.Enabled && !p.KTLS.Immediate() && !p.TCPSplice.Enabled {
		l.warn(Suspicious, "core.proxy.ktls", "has no effect: after_bytes and after_duration need [core.proxy.tcp_splice]")
	}
	if len(p.PPTrustedSources) > 0 && !p.InboundPPEnabled {
		l.warn(Suspicious, "core.proxy.pp_trusted_sources", "has no effect without core.proxy.inbound_pp_enabled")
	}
	if !p.StaticCert() && p.BaseDomain+p.CertChain+p.CertKey != "" {
		var missing []string
		for _, k := range []struct{ name, value string }{{"base_domain", p.BaseDomain}, {"cert_chain", p.CertChain}, {"cert_key", p.CertKey}} {
			if k.value == "" {
				missing = append(missing, k.name)
			}
		}
		l.warn(Suspicious, "core.proxy", "the static certificate is not used, missing: %s", strings.Join(missing, ", "))
	}
}

func (l *loader) finishCluster() {
	s, st := &l.config.Core.Sync, &l.config.Core.Store
	if s.Enabled && s.NodeID == 0 {
		l.fail("core.sync.node_id", ErrNodeID)
	}
	if s.Enabled {
		l.wantURL(Suspicious, "core.sync.my_url", s.MyURL, "https")
		if s.Bootnode != "" {
			l.wantURL(Suspicious, "core.sync.bootnode", s.Bootnode, "https")
		}
	}

	if st.Mode == StoreExternal {
		if len(st.Endpoints) == 0 {
			l.fail("core.store.endpoints", errors.New(`is empty: core.store.mode = "external" needs the URLs of the etcd`))
		}
		for _, e := range st.Endpoints {
			l.wantURL("", "core.store.endpoints", e, "https", "http")
		}
		if slices.ContainsFunc(st.Endpoints, func(e string) bool { return strings.HasPrefix(e, "http://") }) {
			l.warn(Insecure, "core.store.endpoints", "certificate keys travel to the etcd in clear: use https")
		}
	} else if len(st.Endpoints) > 0 {
		l.warn(Suspicious, "core.store.endpoints", `has no effect: core.store.mode is "embedded"`)
	}
	if (st.Username == "") != (st.PasswordFile == "") {
		l.fail("core.store.username", errors.New("core.store.username and core.store.password_file belong together: one of them is missing"))
	}
	if (st.TLS.Cert == "") != (st.TLS.Key == "") {
		l.fail("core.store.tls.cert", errors.New("core.store.tls.cert and core.store.tls.key belong together: one of them is missing"))
	}
}

func (l *loader) finishRest() {
	core := &l.config.Core
	if core.Auth.Enabled {
		l.wantURL("", "core.auth.url", core.Auth.URL, "http", "https")
	}
	if m := core.Metrics.Addr; !m.IsZero() && !m.Local() {
		l.warn(Insecure, "core.metrics.addr", "%s serves metrics to everybody who reaches it", m)
	}
	if core.Tuning.TargetRate == 0 {
		core.Tuning.TargetRate = max(1000, core.Tuning.TargetConnections/100)
	}
	a := &core.Attestation
	if a.InsecureAllowExternalTrustAnchors {
		l.warn(Insecure, "core.attestation.insecure_allow_external_trust_anchors", "evidence signed by the keys of root_ca is believed")
		return
	}
	for _, s := range l.sections {
		if s.path != "core.attestation.root_ca" {
			continue
		}
		for _, k := range s.keys {
			if k.value() != "" {
				l.fail(join(s.path, k.name), errors.New("is refused without core.attestation.insecure_allow_external_trust_anchors = true"))
			}
		}
	}
}

// wantURL checks that a value is a base URL. kind "" makes a failure an error, else a warning of that kind.
func (l *loader) wantURL(kind Kind, path, text string, schemes ...string) {
	u, err := url.Parse(text)
	if err == nil && u.Host != "" && slices.Contains(schemes, u.Scheme) {
		return
	}
	// Not the text itself: it may carry a password.
	why := fmt.Sprintf("is not a URL with a host that starts with %s://", strings.Join(schemes, ":// or "))
	if kind != "" {
		l.warn(kind, path, "%s", why)
		return
	}
	l.fail(path, errors.New(why))
}

// checkListeners finds two TCP listeners that want the same address and port, which bind would refuse one after the other.
func (l *loader) checkListeners() {
	type listener struct {
		key   string
		name  string
		ip    netip.Addr
		ports PortSpec
	}
	var all []listener
	add := func(key, name string, a Address) {
		if !a.IsZero() && !a.IsUnix() {
			port := a.AddrPort().Port()
			all = append(all, listener{key, name, a.AddrPort().Addr().Unmap(), PortSpec{port, port}})
		}
	}
	for _, s := range l.servers() {
		if s.enabled {
			add(s.prefix+"address", s.name+" server", s.Address)
		}
	}
	core := &l.config.Core
	add("core.metrics.addr", "metrics listener", core.Metrics.Addr)
	for _, ip := range []netip.Addr{core.Proxy.ListenAddr, core.Proxy.ListenAddr6} {
		if ip.IsValid() {
			all = append(all, listener{"core.proxy.listen_port", "proxy", ip, core.Proxy.ListenPort})
		}
	}
	for i, b := range all {
		for _, a := range all[:i] {
			first, last := max(a.ports.First, b.ports.First), min(a.ports.Last, b.ports.Last)
			sameIP := a.ip == b.ip || a.ip.Is4() == b.ip.Is4() && (a.ip.IsUnspecified() || b.ip.IsUnspecified())
			if a.name != b.name && sameIP && first <= last && last != 0 {
				l.fail(b.key, fmt.Errorf("the %s and the %s both want TCP port %d", a.name, b.name, max(first, 1)))
			}
		}
	}
}
