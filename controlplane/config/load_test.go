package config

import (
	"encoding/base64"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

const tlsTables = "[tls]\nkey = \"/t/k\"\ncerts = \"/t/c\"\n[tls.mutual]\nca_certs = \"/t/ca\"\n"

// load writes the text as -c file and loads it, with nothing else on the machine.
func load(t *testing.T, text string, env map[string]string) (*Config, []Warning, error) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "c.toml")
	write(t, path, text)
	return Load(LoadOptions{Path: path, Dir: dir, EtcDir: dir, Env: func(name string) string { return env[name] }})
}

func mustLoad(t *testing.T, text string, env map[string]string) (*Config, []Warning) {
	t.Helper()
	c, warnings, err := load(t, text, env)
	if err != nil {
		t.Fatal(err)
	}
	return c, warnings
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func hasWarning(warnings []Warning, kind Kind, text string) bool {
	return slices.ContainsFunc(warnings, func(w Warning) bool { return w.Kind == kind && strings.Contains(w.String(), text) })
}

func TestDefaults(t *testing.T) {
	c := Default()
	for _, tt := range []struct{ name, got, want string }{
		{"address", c.Server.Address.String(), "127.0.0.1:8010"},
		{"admin", c.Core.Admin.Server.Address.String(), "127.0.0.1:8011"},
		{"debug", c.Core.Debug.Server.Address.String(), "127.0.0.1:8012"},
		{"ident", c.Server.Ident, "dstack Gateway"},
		{"admin ident", c.Core.Admin.Server.Ident, "Rocket"},
		{"wg ip", c.Core.WG.IP.String(), "10.0.0.1/24"},
		{"idle", c.Core.Proxy.Timeouts.Idle.String(), "10m"},
		{"policy hold", c.Core.Proxy.PolicyHold.String(), "5s"},
		{"ports", c.Core.Proxy.ListenPort.String(), "8443"},
	} {
		if tt.got != tt.want {
			t.Errorf("default %s = %q, want %q", tt.name, tt.got, tt.want)
		}
	}
	if c.Core.Proxy.ListenAddr6.IsValid() || !c.Core.Metrics.Addr.IsZero() || c.Core.Proxy.TCPSplice.Enabled || c.Core.Proxy.KTLS.Enabled {
		t.Error("something optional is on by default")
	}
	if c.Core.Tuning.TargetRate != 1000 || c.Server.BodyLimit("Any") != 10<<20 || !c.Core.Proxy.ThreadPerCore {
		t.Errorf("defaults: rate %d, body limit %d, thread per core %v", c.Core.Tuning.TargetRate, c.Server.BodyLimit("Any"), c.Core.Proxy.ThreadPerCore)
	}
	if _, _, err := Load(LoadOptions{Dir: t.TempDir(), EtcDir: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "tls.key: is required") {
		t.Errorf("without any file: %v", err)
	}
}

// TestLayers puts one key in more and more layers: the latest wins, the other keys of the tables stay.
func TestLayers(t *testing.T) {
	etc, dir, elsewhere := t.TempDir(), t.TempDir(), t.TempDir()
	explicit := filepath.Join(elsewhere, "site.conf")
	env := map[string]string{}
	layers := []struct {
		add  func()
		want string
		list int
	}{
		{func() {
			write(t, filepath.Join(etc, "gateway.toml"), tlsTables+"[core.wg]\ninterface = \"a\"\nreserved_net = [\"10.0.0.1/32\", \"10.0.0.2/32\"]\n")
		}, "a", 2},
		{func() { write(t, filepath.Join(etc, "gateway.json"), `{"core":{"wg":{"interface":"b"}}}`) }, "b", 2},
		{func() {
			write(t, filepath.Join(dir, "gateway.toml"), "[core.wg]\ninterface = \"c\"\nreserved_net = [\"10.0.0.1/32\"]")
		}, "c", 1},
		{func() { write(t, filepath.Join(dir, "gateway.json"), `{"core":{"wg":{"interface":"d"}}}`) }, "d", 1},
		{func() { write(t, explicit, `{"core":{"wg":{"interface":"e"}}}`) }, "e", 1},
		{func() {
			env[overlayEnv] = base64.StdEncoding.EncodeToString([]byte("core.wg.interface = \"f\"")) + "\n"
		}, "f", 1},
	}
	for _, layer := range layers {
		layer.add()
		opts := LoadOptions{Dir: dir, EtcDir: etc, Env: func(name string) string { return env[name] }}
		if layer.want >= "e" {
			opts.Path = explicit
		}
		c, _, err := Load(opts)
		if err != nil {
			t.Fatalf("layer %s: %v", layer.want, err)
		}
		if c.Core.WG.Interface != layer.want || len(c.Core.WG.ReservedNet) != layer.list || c.Server.TLS.Key != "/t/k" {
			t.Errorf("layer %s: interface %s, reserved %v, key %s", layer.want, c.Core.WG.Interface, c.Core.WG.ReservedNet, c.Server.TLS.Key)
		}
	}
}

func TestExplicitFile(t *testing.T) {
	root := t.TempDir()
	deep := filepath.Join(root, "a", "b")
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	opts := LoadOptions{Dir: deep, EtcDir: root}

	opts.Path = "absent.toml"
	if _, _, err := Load(opts); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), filepath.Join(deep, "absent.toml")) {
		t.Errorf("a missing relative file: %v", err)
	}
	opts.Path = filepath.Join(root, "absent.toml")
	if _, _, err := Load(opts); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), opts.Path) {
		t.Errorf("a missing absolute file: %v", err)
	}

	write(t, filepath.Join(root, "up.toml"), tlsTables)
	opts.Path = "up.toml"
	if _, warnings, err := Load(opts); err != nil || !hasWarning(warnings, Suspicious, filepath.Join(root, "up.toml")) {
		t.Errorf("a file above the working directory: %v, %v", warnings, err)
	}

	// The file of the working directory named again with -c: read once, said once.
	write(t, filepath.Join(deep, "gateway.toml"), tlsTables+"[nonsense]\n")
	opts.Path = "./gateway.toml"
	_, warnings, err := Load(opts)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, w := range warnings {
		if w.Key == "nonsense" {
			count++
		}
	}
	if count != 1 {
		t.Errorf("the same file twice: %d warnings", count)
	}

	opts.Path = deep
	if _, _, err := Load(opts); err == nil {
		t.Error("a directory was read as configuration")
	}
	write(t, filepath.Join(root, "big.toml"), strings.Repeat("#", maxFileSize+1))
	opts.Path = filepath.Join(root, "big.toml")
	if _, _, err := Load(opts); err == nil || !strings.Contains(err.Error(), "bytes") {
		t.Errorf("a huge file: %v", err)
	}
}

// TestTLSPaths: a path belongs to the directory of the file that set it, layer by layer.
func TestTLSPaths(t *testing.T) {
	etc, dir := t.TempDir(), t.TempDir()
	write(t, filepath.Join(etc, "gateway.toml"), "tls.key = \"k\"\ntls.certs = \"../c\"\ntls.mutual.ca_certs = \"/abs/ca\"\n[core.proxy]\ncert_chain = \"chain\"\n")
	write(t, filepath.Join(dir, "gateway.json"), `{"tls":{"key":"sub/k2"},"core":{"admin":{"tls":{"key":"ak","certs":"ac"}}}}`)
	c, _, err := Load(LoadOptions{Dir: dir, EtcDir: etc})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ got, want string }{
		{c.Server.TLS.Key, filepath.Join(dir, "sub/k2")},
		{c.Server.TLS.Certs, filepath.Join(filepath.Dir(etc), "c")},
		{c.Server.TLS.Mutual.CACerts, "/abs/ca"},
		{c.Core.Admin.Server.TLS.Key, filepath.Join(dir, "ak")},
		{c.Core.Proxy.CertChain, "chain"},
	} {
		if tt.got != tt.want {
			t.Errorf("path %s, want %s", tt.got, tt.want)
		}
	}
}

func TestPortOverridesAddress(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"", "127.0.0.1:8010"},
		{"port = 9000\n", "127.0.0.1:9000"},
		{"address = \"0.0.0.0\"\n", "0.0.0.0:8000"},
		{"address = \"0.0.0.0\"\nport = 8001\n", "0.0.0.0:8001"},
		{"address = \"0.0.0.0:1\"\nport = 8001\n", "0.0.0.0:8001"},
		{"address = \"tcp:[::]:1\"\n", "[::]:1"},
		{"address = \"unix:/s\"\nport = 1\n", "unix:/s"},
	} {
		c, warnings := mustLoad(t, tt.text+tlsTables, nil)
		if got := c.Server.Address.String(); got != tt.want {
			t.Errorf("%q listens on %s, want %s", tt.text, got, tt.want)
		}
		if got, want := hasWarning(warnings, Suspicious, "no port"), strings.HasSuffix(tt.want, ":8000"); got != want {
			t.Errorf("%q: warned %v, want %v", tt.text, got, want)
		}
	}
}

func TestWireGuardNets(t *testing.T) {
	for _, tt := range []struct {
		name, ip, reserved, clients string
		want                        []error
	}{
		{"default", "10.0.0.1/24", `"10.0.0.1/32"`, "10.0.0.0/25", nil},
		{"node 2 of the scripts", "10.8.128.1/16", `"10.8.128.1/32"`, "10.8.128.0/18", nil},
		{"generated", "10.77.3.1/24", `"10.77.3.1/31"`, "10.77.3.1/24", nil},
		{"one net outside", "10.0.0.1/24", `"10.0.0.1/32", "10.0.1.0/24"`, "10.0.0.0/25", []error{ErrReservedNetOutside}},
		{"net larger than the overlay", "10.0.0.1/24", `"10.0.0.0/16"`, "10.0.0.0/25", []error{ErrReservedNetOutside}},
		{"own address not reserved", "10.0.0.1/24", `"10.0.0.2/32"`, "10.0.0.0/25", []error{ErrIPNotReserved}},
		{"nothing reserved", "10.0.0.1/24", ``, "10.0.0.0/25", []error{ErrIPNotReserved}},
		{"clients outside", "10.0.0.1/24", `"10.0.0.1/32"`, "10.0.1.0/25", []error{ErrClientRangeOutside}},
		{"more clients than overlay", "10.0.0.1/24", `"10.0.0.1/32"`, "10.0.0.0/23", []error{ErrClientRangeOutside}},
		{"all at once", "10.0.0.1/24", `"10.1.0.0/32"`, "10.2.0.0/25", []error{ErrReservedNetOutside, ErrIPNotReserved, ErrClientRangeOutside}},
	} {
		_, _, err := load(t, tlsTables+"[core.wg]\nip = \""+tt.ip+"\"\nreserved_net = ["+tt.reserved+"]\nclient_ip_range = \""+tt.clients+"\"\n", nil)
		if (err != nil) != (len(tt.want) > 0) {
			t.Errorf("%s: %v", tt.name, err)
		}
		for _, want := range []error{ErrReservedNetOutside, ErrIPNotReserved, ErrClientRangeOutside} {
			if errors.Is(err, want) != slices.Contains(tt.want, want) {
				t.Errorf("%s: %q in %v, want %v", tt.name, want, err, tt.want)
			}
		}
	}
	// The texts themselves are what upstream's tests look for.
	for err, text := range map[error]string{
		ErrReservedNetOutside: "Reserved net is not in the network",
		ErrIPNotReserved:      "Wg peer IP is not in the reserved net",
		ErrClientRangeOutside: "Client IP range is not in the network",
		ErrNodeID:             "node_id must be greater than 0",
	} {
		if err.Error() != text {
			t.Errorf("text %q, want %q", err, text)
		}
	}
}

func TestPublicKeyIsDerived(t *testing.T) {
	const private = "[core.wg]\nprivate_key = \"AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=\"\n"
	c, warnings := mustLoad(t, tlsTables+private, nil)
	if c.Core.WG.PublicKey != "B6N8vBQgk8i3VdwbEOhstCY3StFqqFPtC9/AsrhtHHw=" || len(warnings) != 0 {
		t.Errorf("derived %q, %v", c.Core.WG.PublicKey, warnings)
	}
	_, warnings = mustLoad(t, tlsTables+"[core.wg]\nprivate_key = \"c2hvcnQ=\"\n", nil)
	if !hasWarning(warnings, Suspicious, "not a WireGuard key") || hasWarning(warnings, Suspicious, "c2hvcnQ=") {
		t.Errorf("a short key: %v", warnings)
	}
}

func TestAdminAuthentication(t *testing.T) {
	const long, other = "0123456789abcdef", "fedcba9876543210"
	for _, tt := range []struct {
		name, admin string
		env         map[string]string
		token       string // "" = must fail, unless insecure or htpasswd
		ok, short   bool
	}{
		{name: "nothing", admin: "enabled = true"},
		{name: "disabled", admin: "enabled = false", ok: true},
		{name: "blank token", admin: "enabled = true\nauth_token = \"  \""},
		{name: "blank environment", admin: "enabled = true", env: map[string]string{"ADMIN_API_TOKEN": " \n"}},
		{name: "token", admin: "enabled = true\nauth_token = \" " + long + "\"", token: long, ok: true},
		{name: "old alias", admin: "enabled = true\nadmin_token = \"" + long + "\"", token: long, ok: true},
		{name: "alias beside an empty new key", admin: "enabled = true\nauth_token = \"\"\nadmin_token = \"" + long + "\"", token: long, ok: true},
		{name: "alias beside the new key", admin: "enabled = true\nauth_token = \"" + long + "\"\nadmin_token = \"" + other + "\"", token: long, ok: true},
		{name: "file before environment", admin: "enabled = true\nauth_token = \"" + long + "\"", env: map[string]string{"DSTACK_GATEWAY_ADMIN_TOKEN": other}, token: long, ok: true},
		{name: "first variable", admin: "enabled = true", env: map[string]string{"DSTACK_GATEWAY_ADMIN_TOKEN": long, "ADMIN_API_TOKEN": other}, token: long, ok: true},
		{name: "second variable", admin: "enabled = true", env: map[string]string{"ADMIN_API_TOKEN": other}, token: other, ok: true},
		{name: "short", admin: "enabled = true\nauth_token = \"0123456789abcde\"", token: "0123456789abcde", ok: true, short: true},
		{name: "short in the environment", admin: "enabled = true", env: map[string]string{"ADMIN_API_TOKEN": "pw"}, token: "pw", ok: true, short: true},
		{name: "htpasswd", admin: "enabled = true\nhtpasswd_file = \"h\"", ok: true},
		{name: "insecure", admin: "enabled = true\ninsecure_no_auth = true", ok: true},
	} {
		c, warnings, err := load(t, tlsTables+"[core.admin]\n"+tt.admin+"\n", tt.env)
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if err != nil {
			if !strings.Contains(err.Error(), "without authentication") {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if c.Core.Admin.AuthToken != tt.token {
			t.Errorf("%s: token %q, want %q", tt.name, c.Core.Admin.AuthToken, tt.token)
		}
		if got := hasWarning(warnings, Insecure, "shorter than 16"); got != tt.short {
			t.Errorf("%s: warned %v, want %v", tt.name, got, tt.short)
		}
	}
}

// TestContainerOf055NeedsAToken: the oldest container has no authentication; the token of the environment is enough to start it.
func TestContainerOf055NeedsAToken(t *testing.T) {
	env := func(name string) string {
		return map[string]string{"ADMIN_API_TOKEN": "0123456789abcdef0123456789abcdef"}[name]
	}
	c, _, err := Load(LoadOptions{Path: "testdata/container-0.5.5.toml", EtcDir: t.TempDir(), Env: env})
	if err != nil {
		t.Fatal(err)
	}
	if c.Core.Attestation.PCCSURL != "https://pccs.example.com" || c.Core.Debug.InsecureSkipAttestation || c.Core.Debug.InsecureLocalhostBackend {
		t.Errorf("old keys: %+v, %+v", c.Core.Attestation, c.Core.Debug)
	}
	if !c.Core.Proxy.StaticCert() {
		t.Error("the static certificate is not used")
	}
}

func TestDebugListener(t *testing.T) {
	for _, tt := range []struct {
		debug string
		ok    bool
	}{
		{"insecure_enable_debug_rpc = true", true},
		{"address = \"0.0.0.0:1\"", true},
		{"insecure_enable_debug_rpc = true\naddress = \"0.0.0.0:1\"", false},
		{"insecure_enable_debug_rpc = true\naddress = \"192.0.2.1:1\"", false},
		{"insecure_enable_debug_rpc = true\naddress = \"[::]:1\"", false},
		{"insecure_enable_debug_rpc = true\naddress = \"127.9.9.9:1\"", true},
		{"insecure_enable_debug_rpc = true\naddress = \"[::1]:1\"", true},
		{"insecure_enable_debug_rpc = true\naddress = \"unix:/s\"", true},
		{"insecure_enable_debug_rpc = true\naddress = \"0.0.0.0:1\"\ninsecure_allow_remote = true", true},
	} {
		_, _, err := load(t, tlsTables+"[core.debug]\n"+tt.debug+"\n", nil)
		if (err == nil) != tt.ok {
			t.Errorf("%q: %v", tt.debug, err)
		}
	}
}

// TestOldKeysFollowTheLayers: an old name in a later layer beats the new name in an earlier one.
func TestOldKeysFollowTheLayers(t *testing.T) {
	etc, dir := t.TempDir(), t.TempDir()
	write(t, filepath.Join(etc, "gateway.toml"), tlsTables+"[core.debug]\ninsecure_localhost_backend = false\ninsecure_skip_attestation = true\n")
	write(t, filepath.Join(dir, "gateway.toml"), "[core]\nrun_in_dstack = true\n[core.proxy]\nlocalhost_enabled = true\n")
	c, warnings, err := Load(LoadOptions{Dir: dir, EtcDir: etc})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Core.Debug.InsecureLocalhostBackend || c.Core.Debug.InsecureSkipAttestation {
		t.Errorf("debug: %+v", c.Core.Debug)
	}
	if !hasWarning(warnings, Legacy, "gateway.toml:2: core.run_in_dstack: read as core.debug.insecure_skip_attestation, inverted") {
		t.Errorf("warnings: %v", warnings)
	}
}

func TestRetiredKeys(t *testing.T) {
	for _, r := range retiredKeys() {
		value := "\"x\""
		if strings.Contains(r.to, "insecure_") {
			value = "true"
		}
		dir := t.TempDir()
		write(t, filepath.Join(dir, "gateway.toml"), tlsTables)
		write(t, filepath.Join(dir, "old.toml"), r.path+" = "+value+"\n")
		_, warnings, err := Load(LoadOptions{Path: "old.toml", Dir: dir, EtcDir: dir})
		if err != nil {
			t.Errorf("%s: %v", r.path, err)
		}
		if !hasWarning(warnings, r.kind, r.path+": "+r.now) {
			t.Errorf("%s: no warning in %v", r.path, warnings)
		}
		if hasWarning(warnings, Unknown, "") {
			t.Errorf("%s: also unknown: %v", r.path, warnings)
		}
	}
}

func TestUnknownKeysOfAttestationAreErrors(t *testing.T) {
	for _, text := range []string{"[core.attestation]\nx = 1", "[core.attestation.urls]\npcs = \"\"", "[core.attestation.root_ca]\ntdxx = \"\"", "[core.attestation.new]"} {
		if _, _, err := load(t, tlsTables+text+"\n", nil); err == nil || !strings.Contains(err.Error(), "unknown") {
			t.Errorf("%q: %v", text, err)
		}
	}
	_, warnings := mustLoad(t, tlsTables+"[core.wg]\nx = 1\n", nil)
	if !hasWarning(warnings, Unknown, "c.toml:7: core.wg.x") {
		t.Errorf("elsewhere: %v", warnings)
	}
}

func TestNotes(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"[core.proxy]\nthread_per_core = false", "has no effect"},
		{"log_level = \"normal\"\n[core]", "RUST_LOG"},
		{"log_level = \"critical\"\n[core]", "RUST_LOG"},
		{"[core.proxy.express]\nmode = \"auto\"", "not available in this release"},
		{"[core.proxy.sockmap]", "not available in this release"},
		{"[core.guard]\nx.y = 1", "not available in this release"},
	} {
		text := tt.text + "\n" + tlsTables
		_, warnings := mustLoad(t, text, nil)
		if !slices.ContainsFunc(warnings, func(w Warning) bool { return strings.Contains(w.String(), tt.want) }) {
			t.Errorf("%q: %v", tt.text, warnings)
		}
	}
	for _, level := range []string{"off", "error", "warn", "info", "debug", "trace", "WARN", "0", "5"} {
		if _, warnings := mustLoad(t, "log_level = \""+level+"\"\n"+tlsTables, nil); hasWarning(warnings, Suspicious, "log_level") || hasWarning(warnings, Legacy, "log_level") {
			t.Errorf("level %s: %v", level, warnings)
		}
	}
}

func TestOptionalTables(t *testing.T) {
	for _, tt := range []struct {
		text          string
		splice, ktls  bool
		immediate     bool
		releaseIdle   bool
		afterBytesSet bool
	}{
		{text: "", immediate: true},
		{text: "[core.proxy.tcp_splice]", splice: true, immediate: true},
		{text: "[core.proxy.tcp_splice]\nafter_bytes = 0", splice: true, afterBytesSet: true},
		{text: "[core.proxy.tcp_splice]\nafter_duration = \"1s\"\nrelease_idle_pipes = true\n[core.proxy.ktls]", splice: true, ktls: true, releaseIdle: true},
	} {
		c, _ := mustLoad(t, tlsTables+tt.text+"\n", nil)
		p := c.Core.Proxy
		if p.TCPSplice.Enabled != tt.splice || p.KTLS.Enabled != tt.ktls || p.TCPSplice.Immediate() != tt.immediate ||
			p.TCPSplice.ReleaseIdlePipes != tt.releaseIdle || (p.TCPSplice.AfterBytes != nil) != tt.afterBytesSet {
			t.Errorf("%q: %+v %+v", tt.text, p.TCPSplice, p.KTLS)
		}
	}
}

func TestDerivedValues(t *testing.T) {
	c, _ := mustLoad(t, tlsTables+"[core.sync]\ndata_dir = \"/data\"\n[core.proxy.timeouts]\nconnect = \"2s\"\n[core.tuning]\ntarget_connections = 500000\n", nil)
	if c.Core.Proxy.PolicyHold != 2*Second || c.Core.Tuning.TargetRate != 5000 {
		t.Errorf("derived: %s, %d", c.Core.Proxy.PolicyHold, c.Core.Tuning.TargetRate)
	}
	c, _ = mustLoad(t, tlsTables+"[core.proxy]\npolicy_hold = \"0s\"\n", nil)
	if c.Core.Proxy.PolicyHold != 0 {
		t.Errorf("given: %s", c.Core.Proxy.PolicyHold)
	}
	c, _ = mustLoad(t, tlsTables+"[core.proxy]\npolicy_hold = \"\"\n", nil)
	if c.Core.Proxy.PolicyHold != 5*Second {
		t.Errorf("empty: %s", c.Core.Proxy.PolicyHold)
	}
}

func TestTheCheckFailsOnlyForErrorsAndUnknownKeys(t *testing.T) {
	for _, tt := range []struct {
		warnings []Warning
		err      error
		ok       bool
	}{
		{nil, nil, true},
		{[]Warning{{Kind: Legacy}, {Kind: Insecure}, {Kind: Suspicious}, {Kind: Unavailable}}, nil, true},
		{[]Warning{{Kind: Unknown}}, nil, false},
		{nil, errors.New("x"), false},
	} {
		var b strings.Builder
		if ok, err := WriteCheck(&b, tt.warnings, tt.err); ok != tt.ok || err != nil {
			t.Errorf("%v, %v: %v, %v\n%s", tt.warnings, tt.err, ok, err, b.String())
		}
	}
}

// TestPrintLoadsBack: what Print shows means the same again, for every file that loads.
func TestPrintLoadsBack(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.*")
	loaded := 0
	for _, file := range files {
		c, _, err := Load(LoadOptions{Path: file, EtcDir: t.TempDir()})
		if err != nil {
			continue
		}
		loaded++
		var out strings.Builder
		if err := Print(&out, c); err != nil {
			t.Fatal(err)
		}
		again, warnings, err := load(t, strings.NewReplacer(
			`auth_token = "`+redacted+`"`, `auth_token = `+tomlString(c.Core.Admin.AuthToken),
			`private_key = "`+redacted+`"`, `private_key = `+tomlString(c.Core.WG.PrivateKey),
			"https://redacted@", "https://op:hunter2@",
			"https://redacted@auth", "https://user:hunter2@auth",
		).Replace(out.String()), nil)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if hasWarning(warnings, Unknown, "") || hasWarning(warnings, Legacy, "key of") {
			t.Errorf("%s: Print wrote keys that Load does not know: %v", file, warnings)
		}
		c.origin, again.origin = nil, nil
		c.Core.Auth.URL = strings.Replace(c.Core.Auth.URL, "user:", "op:", 1)
		if !reflect.DeepEqual(*c, *again) {
			t.Errorf("%s:\n%+v\n%+v", file, *c, *again)
		}
	}
	if loaded < 8 {
		t.Errorf("only %d files load", loaded)
	}
}

func TestPrintShowsNoSecret(t *testing.T) {
	const marker = "a-secret-nobody-must-see"
	c := Default()
	marked := 0
	for _, s := range table(c) {
		for _, k := range s.keys {
			if to, ok := k.to.(*string); ok && k.secret {
				*to = marker
				marked++
			}
		}
	}
	var out strings.Builder
	if err := Print(&out, c); err != nil {
		t.Fatal(err)
	}
	if marked < 2 || strings.Contains(out.String(), marker) || strings.Count(out.String(), redacted) != marked {
		t.Errorf("%d secrets set:\n%s", marked, out.String())
	}
}

func TestPrintShowsNoUserinfo(t *testing.T) {
	for in, want := range map[string]string{
		"https://h/p":        "https://h/p",
		"https://u:p@h/p":    "https://redacted@h/p",
		"https://token@h":    "https://redacted@h",
		"http://h:1/%zz?a@b": redacted,
		"":                   "",
	} {
		if got := withoutUserinfo(in); got != want {
			t.Errorf("withoutUserinfo(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestNearest(t *testing.T) {
	known := (&loader{sections: table(new(Config))}).names()
	for in, want := range map[string]string{
		"core.proxy.conect_top_n":      "core.proxy.connect_top_n",
		"core.proxy.lisetn_port":       "core.proxy.listen_port",
		"core.proxy.LISTEN_PORT":       "core.proxy.listen_port",
		"core.proxy.handshake_stale":   "core.proxy.timeouts.handshake_stale",
		"wg":                           "core.wg",
		"core.prxy":                    "core.proxy",
		"core.sync.nodeid":             "core.sync.node_id",
		"core.proxy.timeouts.idel":     "core.proxy.timeouts.idle",
		"core.completely_different":    "",
		"core.proxi.timeouts.dns_reso": "core.proxy.timeouts.dns_resolve",
	} {
		if got := nearest(in, known); got != want {
			t.Errorf("nearest(%q) = %q, want %q", in, got, want)
		}
	}
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "acb", 1}, {"kitten", "sitting", 3}, {"a-b", "A_B", 0}} {
		if got := distance(tt.a, tt.b); got != tt.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestListenersOnOneAddress(t *testing.T) {
	for _, tt := range []struct {
		text string
		ok   bool
	}{
		{"address = \"127.0.0.1:8443\"\n", false}, // the proxy has 0.0.0.0:8443
		{"address = \"[::1]:8443\"\n", true},
		{"address = \"unix:/s\"\n", true},
		{"address = \"127.0.0.1:8011\"\n", true}, // admin is off
		{"address = \"127.0.0.1:8011\"\ncore.admin.enabled = true\ncore.admin.insecure_no_auth = true\n", false},
		{"address = \"127.0.0.2:8011\"\ncore.admin.enabled = true\ncore.admin.insecure_no_auth = true\n", true},
		{"address = \"0.0.0.0:0\"\ncore.proxy.listen_port = 0\n", true},
		{"address = \"[::1]:8443\"\ncore.proxy.listen_addr6 = \"::\"\n", false},
	} {
		if _, _, err := load(t, tt.text+tlsTables, nil); (err == nil) != tt.ok {
			t.Errorf("%q: %v", tt.text, err)
		}
	}
}

func TestDeepFiles(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"deep.json": strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000),
		"list.json": strings.Repeat(`[`, 5000),
		"deep.toml": strings.Repeat("a.", 200) + "a = 1",
	} {
		path := filepath.Join(dir, name)
		write(t, path, text)
		if _, _, err := Load(LoadOptions{Path: path, Dir: dir, EtcDir: dir}); err == nil || !strings.Contains(err.Error(), "deep") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, text := range []string{"", "[]", "1", "{} {}", "{", `{"a"`, `{"a":}`, "null"} {
		path := filepath.Join(dir, "odd.json")
		write(t, path, text)
		if _, _, err := Load(LoadOptions{Path: path, Dir: dir, EtcDir: dir}); err == nil || !strings.Contains(err.Error(), "not valid JSON") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestOverlayErrors(t *testing.T) {
	for _, text := range []string{"%%%", base64.StdEncoding.EncodeToString([]byte("a = "))} {
		if _, _, err := load(t, tlsTables, map[string]string{overlayEnv: text}); err == nil || !strings.Contains(err.Error(), "$DSTACK_GW_CONFIG") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestIPIsUsableAsIs: the types of the address plan are what netip makes of them, so that users need no conversion.
func TestIPIsUsableAsIs(t *testing.T) {
	c := Default()
	if c.Core.WG.IP.Addr() != netip.MustParseAddr("10.0.0.1") || c.Core.WG.IP.Masked() != netip.MustParsePrefix("10.0.0.0/24") {
		t.Errorf("ip %s", c.Core.WG.IP)
	}
}
