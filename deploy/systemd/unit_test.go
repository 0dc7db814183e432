// Package systemd_test checks the unit against what the gateway needs and the
// configuration that comes with it.
package systemd_test

import (
	"bytes"
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
)

const unitFile = "dstack-gw.service"

// unit reads the directives of a unit file; one that is repeated has several values.
func unit(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	directives := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == '[' {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			t.Errorf("%s: %q is no directive", unitFile, line)
		}
		directives[key] = append(directives[key], value)
	}
	return directives
}

// TestNeeds: what the gateway cannot do without survives the hardening.
func TestNeeds(t *testing.T) {
	u := unit(t)
	for _, tt := range []struct{ directive, value, why string }{
		{"AmbientCapabilities", "CAP_NET_ADMIN CAP_NET_BIND_SERVICE", "WireGuard interfaces, port 443"},
		{"CapabilityBoundingSet", "CAP_NET_ADMIN CAP_NET_BIND_SERVICE", "nothing more"},
		{"DeviceAllow", "/dev/net/tun rw", "userspace WireGuard"},
		{"RestrictAddressFamilies", "AF_INET AF_INET6 AF_NETLINK AF_UNIX", "clients, WireGuard's configuration, the guest agent"},
		{"LimitNOFILE", "1048576", "two descriptors a connection"},
		{"Restart", "always", "an operator's Exit call ends with 0"},
		{"StartLimitIntervalSec", "0", "it never gives up"},
		{"StateDirectory", "dstack-gw", "the store"},
		{"RuntimeDirectory", "wireguard", "control sockets of userspace WireGuard"},
	} {
		if got := u[tt.directive]; !slices.Equal(got, []string{tt.value}) {
			t.Errorf("%s is %q, want %q: %s", tt.directive, got, tt.value, tt.why)
		}
	}
	for _, d := range []string{"PrivateDevices", "PrivateNetwork", "ProcSubset"} {
		if _, set := u[d]; set {
			t.Errorf("%s is set: it hides what the gateway needs", d)
		}
	}
}

// TestConfiguration: gateway.toml fits the unit and loads.
func TestConfiguration(t *testing.T) {
	u := unit(t)
	text, err := os.ReadFile("gateway.toml")
	if err != nil {
		t.Fatal(err)
	}
	key := make([]byte, 32)
	key[0] = 8
	for from, to := range map[string]string{"<output of: wg genkey>": base64.StdEncoding.EncodeToString(key), "<public IPv4 address>": "203.0.113.7"} {
		if bytes.Count(text, []byte(from)) != 1 {
			t.Errorf("gateway.toml does not ask for %q once", from)
		}
		text = bytes.ReplaceAll(text, []byte(from), []byte(to))
	}
	path := filepath.Join(t.TempDir(), "gateway.toml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"DSTACK_GATEWAY_ADMIN_TOKEN": "0123456789abcdef"}
	c, warnings, err := config.Load(config.LoadOptions{Path: path, Dir: t.TempDir(), EtcDir: t.TempDir(), Env: func(name string) string { return env[name] }})
	if err != nil || len(warnings) > 0 {
		t.Fatalf("gateway.toml: %v, warnings %v", err, warnings)
	}
	state := "/var/lib/" + u["StateDirectory"][0]
	for name, path := range map[string]string{
		"tls.key": c.Server.TLS.Key, "tls.certs": c.Server.TLS.Certs, "tls.mutual.ca_certs": c.Server.TLS.Mutual.CACerts,
		"core.sync.data_dir": c.Core.Sync.DataDir, "core.wg.config_path": c.Core.WG.ConfigPath,
	} {
		if path != state && !strings.HasPrefix(path, state+"/") {
			t.Errorf("%s is %s, where the service cannot write: it may write in %s", name, path, state)
		}
	}
	if !c.Core.Admin.Server.Address.Local() || !c.Core.Metrics.Addr.Local() {
		t.Error("the admin server or the metrics can be reached from other machines")
	}
	users, err := os.ReadFile("dstack-gw.sysusers")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(users), "\nu "+u["User"][0]+" - ") || u["Group"][0] != u["User"][0] {
		t.Errorf("the unit runs as %s:%s, which dstack-gw.sysusers does not make", u["User"], u["Group"])
	}
}

// TestAnalyze asks systemd.
func TestAnalyze(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed (Debian package systemd)")
	}
	text, err := os.ReadFile(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	const program = "/usr/bin/dstack-gw"
	if !bytes.Contains(text, []byte("\nExecStart="+program+" ")) {
		t.Errorf("the unit does not start %s", program)
	}
	// systemd-analyze wants the program to exist, and this one may not be installed.
	path := filepath.Join(t.TempDir(), unitFile)
	if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte(program), []byte("/bin/true")), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", "--man=no", path).CombinedOutput()
	if err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	// 0 is everything locked, 100 nothing; an unhardened service has 96.
	out, err = exec.Command(analyze, "security", "--offline=true", "--threshold=25", path).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}
