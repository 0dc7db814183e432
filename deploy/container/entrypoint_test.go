// Package container_test holds the entry point of the container to its contract: the
// environment of the official image in, a configuration that loads without a word out
// (gateway spec 1.13, ops spec 4.7).
package container_test

import (
	"bytes"
	"crypto/ecdh"
	"encoding/base64"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
)

var update = flag.Bool("update", false, "write the golden files")

// fixedKey is the private key of the golden files; publicKey belongs to it.
const (
	fixedKey  = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="
	publicKey = "B6N8vBQgk8i3VdwbEOhstCY3StFqqFPtC9/AsrhtHHw="
	token     = "B0Xn3r8tQm5kUe2yWc7aZs1vJf4hLp9dGi6oTx0bNq3uRjYk"
)

// minimal is the least environment that starts a gateway.
var minimal = map[string]string{
	"NODE_ID": "0", "ADMIN_API_TOKEN": token,
	"WG_ENDPOINT": "203.0.113.7:51820", "WG_IP": "10.8.0.1/16", "WG_RESERVED_NET": "10.8.0.1/32", "WG_CLIENT_RANGE": "10.8.0.0/18",
}

// cluster is what the deploy script of upstream passes for the second node of a cluster.
var cluster = map[string]string{
	"NODE_ID": "2", "ADMIN_API_TOKEN": token,
	"WG_ENDPOINT": "203.0.113.7:9202", "WG_IP": "10.8.128.1/16", "WG_RESERVED_NET": "10.8.128.1/32", "WG_CLIENT_RANGE": "10.8.128.0/18",
	"MY_URL": "https://gateway-2.example.com:9202", "BOOTNODE_URL": "https://gateway-1.example.com:9202",
	"RPC_DOMAIN": "gateway.example.com", "PROXY_LISTEN_PORT": "443-446", "INBOUND_PP_ENABLED": "false",
}

// everything sets each variable to something else than its default.
var everything = with(cluster, map[string]string{
	"NODE_ID":           "007",
	"ADMIN_LISTEN_ADDR": "127.0.0.1", "ADMIN_LISTEN_PORT": "9001",
	"PROXY_LISTEN_PORT": "8443", "PROXY_WORKERS": "4", "MAX_CONNECTIONS_PER_APP": "5000", "INBOUND_PP_ENABLED": "true",
	"SYNC_INTERVAL": "2m", "SYNC_TIMEOUT": "20s", "SYNC_PERSIST_INTERVAL": "10m",
	"SYNC_CONNECTIONS_ENABLED": "false", "SYNC_CONNECTIONS_INTERVAL": "45s",
	"TIMEOUT_CONNECT": "1s", "TIMEOUT_HANDSHAKE": "2s", "TIMEOUT_CACHE_TOP_N": "3s", "TIMEOUT_HANDSHAKE_STALE": "4m", "TIMEOUT_DNS_RESOLVE": "6s",
	"TIMEOUT_DATA_ENABLED": "false", "TIMEOUT_IDLE": "7m", "TIMEOUT_WRITE": "8s", "TIMEOUT_SHUTDOWN": "9s", "TIMEOUT_TOTAL": "never", "TIMEOUT_PP_HEADER": "11s",
	"PORT_POLICY_FETCH_TIMEOUT": "12s", "PORT_POLICY_FETCH_MAX_RETRIES": "0", "PORT_POLICY_FETCH_BACKOFF_INITIAL": "13s", "PORT_POLICY_FETCH_BACKOFF_MAX": "14m",
})

// with is base with changes; an empty value is kept, as compose files pass it.
func with(base, changes map[string]string) map[string]string {
	env := map[string]string{}
	for _, m := range []map[string]string{base, changes} {
		for k, v := range m {
			env[k] = v
		}
	}
	return env
}

// shells are those that an image may have as /bin/sh.
func shells(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	for name, argv := range map[string][]string{"dash": {"dash"}, "bash": {"bash", "--posix"}, "busybox": {"busybox", "sh"}} {
		if path, err := exec.LookPath(argv[0]); err == nil {
			found[name] = append([]string{path}, argv[1:]...)
		}
	}
	if len(found) == 0 {
		t.Fatal("no shell to run the entry point with")
	}
	return found
}

// container is the entry point with /data in a temporary directory.
type container struct {
	t     *testing.T
	shell []string
	data  string
	path  string // $PATH
}

func newContainer(t *testing.T, shell []string) *container {
	t.Helper()
	if _, err := exec.LookPath("wg"); err != nil {
		t.Skip("wg is not installed (Debian package wireguard-tools), and the entry point needs it")
	}
	return &container{t: t, shell: shell, data: filepath.Join(t.TempDir(), "data"), path: os.Getenv("PATH")}
}

func (c *container) file(name string) string { return filepath.Join(c.data, name) }

func (c *container) read(name string) string {
	c.t.Helper()
	b, err := os.ReadFile(c.file(name))
	if err != nil {
		c.t.Fatal(err)
	}
	return string(b)
}

// useKey puts the fixed private key onto the volume.
func (c *container) useKey(text string, mode os.FileMode) {
	c.t.Helper()
	if err := os.MkdirAll(c.file("gateway"), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(c.file("gateway/wg.key"), []byte(text), mode); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Chmod(c.file("gateway/wg.key"), mode); err != nil {
		c.t.Fatal(err)
	}
}

// start runs the entry point with a command that it starts at the end.
func (c *container) start(env map[string]string, command ...string) (stdout, stderr string, err error) {
	c.t.Helper()
	script, err := os.ReadFile("entrypoint.sh")
	if err != nil {
		c.t.Fatal(err)
	}
	const at = "\nDATA=/data\n"
	if bytes.Count(script, []byte(at)) != 1 {
		c.t.Fatalf("entrypoint.sh does not set the directory once, as %q", strings.TrimSpace(at))
	}
	script = bytes.Replace(script, []byte(at), []byte("\nDATA="+c.data+"\n"), 1)
	moved := filepath.Join(c.t.TempDir(), "entrypoint.sh")
	if err := os.WriteFile(moved, script, 0o755); err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.Command(c.shell[0], append(append(slices.Clone(c.shell[1:]), moved), command...)...)
	cmd.Env = []string{"PATH=" + c.path}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

func (c *container) mustStart(env map[string]string, command ...string) string {
	c.t.Helper()
	stdout, stderr, err := c.start(env, command...)
	if err != nil || stderr != "" {
		c.t.Fatalf("entry point: %v\n%s", err, stderr)
	}
	return stdout
}

// load reads the rendered file as the gateway does.
func (c *container) load(env map[string]string) (*config.Config, []config.Warning) {
	c.t.Helper()
	conf, warnings, err := config.Load(config.LoadOptions{
		Path: c.file("gateway/gateway.toml"), Dir: c.t.TempDir(), EtcDir: c.t.TempDir(),
		Env: func(name string) string { return env[name] },
	})
	if err != nil {
		c.t.Fatalf("the rendered configuration does not load: %v\n%s", err, c.read("gateway/gateway.toml"))
	}
	return conf, warnings
}

// rendered is the file as it is inside a container.
func (c *container) rendered() string {
	return strings.ReplaceAll(c.read("gateway/gateway.toml"), c.data, "/data")
}

func TestGolden(t *testing.T) {
	for name, shell := range shells(t) {
		for file, env := range map[string]map[string]string{"minimal": minimal, "cluster": cluster, "everything": everything} {
			t.Run(name+"/"+file, func(t *testing.T) {
				c := newContainer(t, shell)
				c.useKey(fixedKey+"\n", 0o600)
				c.mustStart(env, "true")
				got := c.rendered()
				golden := filepath.Join("testdata", file+".toml")
				if *update {
					if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if got != string(want) {
					t.Errorf("rendered file differs from %s:\n%s", golden, got)
				}
				if _, warnings := c.load(env); len(warnings) > 0 {
					t.Errorf("warnings: %v", warnings)
				}
			})
		}
	}
}

// TestSameAsUpstream compares with the file of upstream's entry point that the config
// package keeps, line by line and in its order.
func TestSameAsUpstream(t *testing.T) {
	lines := func(text string) (all []string) {
		for l := range strings.Lines(text) {
			if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "#") {
				all = append(all, l)
			}
		}
		return all
	}
	want, err := os.ReadFile("../../controlplane/config/testdata/container-head.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("testdata/cluster.toml")
	if err != nil {
		t.Fatal(err)
	}
	if g, w := lines(string(got)), lines(string(want)); !slices.Equal(g, w) {
		t.Errorf("the two files differ:\n%s\nwant\n%s", strings.Join(g, "\n"), strings.Join(w, "\n"))
	}
}

func TestRefusals(t *testing.T) {
	var cases []struct {
		name  string
		env   map[string]string
		wants string // in the message
	}
	add := func(name, variable, value, wants string) {
		cases = append(cases, struct {
			name  string
			env   map[string]string
			wants string
		}{name, with(everything, map[string]string{variable: value}), wants})
	}
	for v := range everything {
		add("quote in "+v, v, `1" x="`, v)
		add("line break in "+v, v, "1\n[core.admin]", v)
		add("trailing line break in "+v, v, "1\n", v)
		add("escape in "+v, v, "\x1b[2J", v)
	}
	for _, v := range []string{"NODE_ID", "ADMIN_API_TOKEN", "WG_IP", "WG_RESERVED_NET", "WG_CLIENT_RANGE"} {
		add(v+" empty", v, "", v)
	}
	for _, v := range []string{"NODE_ID", "ADMIN_LISTEN_PORT", "PROXY_WORKERS", "MAX_CONNECTIONS_PER_APP", "PORT_POLICY_FETCH_MAX_RETRIES"} {
		for _, bad := range []string{"x", "-1", "+1", "1.5", "1 ", "0x10", "١"} {
			add(v+" = "+bad, v, bad, v)
		}
	}
	for _, v := range []string{"INBOUND_PP_ENABLED", "SYNC_CONNECTIONS_ENABLED", "TIMEOUT_DATA_ENABLED"} {
		for _, bad := range []string{"yes", "1", "True", "true "} {
			add(v+" = "+bad, v, bad, v)
		}
	}
	full := true // one shell tries everything, the others one variable of each kind
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, shell)
			c.useKey(fixedKey, 0o600)
			c.mustStart(minimal, "true")
			before := c.read("gateway/gateway.toml")
			for _, tc := range cases {
				if !full && !slices.Contains([]string{"ADMIN_API_TOKEN", "NODE_ID", "INBOUND_PP_ENABLED", "MY_URL"}, tc.wants) {
					continue
				}
				stdout, stderr, err := c.start(tc.env, "echo", "started")
				if err == nil || stdout != "" {
					t.Errorf("%s: the gateway was started", tc.name)
				}
				if !strings.Contains(stderr, tc.wants) || strings.Count(stderr, "entrypoint:") != 1 {
					t.Errorf("%s: message %q, want one that names %s", tc.name, stderr, tc.wants)
				}
				if strings.Contains(stderr, token) {
					t.Errorf("%s: the message shows the admin token", tc.name)
				}
			}
			if c.read("gateway/gateway.toml") != before {
				t.Error("a refused environment changed gateway.toml")
			}
		})
		full = false
	}
}

// TestAnyText: what is no quote and no control character arrives as it is.
func TestAnyText(t *testing.T) {
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, shell)
			for _, text := range []string{
				`back\slash\n\u0041\\ and more of it`, "$HOME `id` $(id) ${PATH} long enough", `single ' quotes ' of a token`, "umläut ☃ 🔑 of a token",
				"-n -e not an option of echo", "%s %d %n is not a format", "# not a comment, just a token", "TOML", `x\`, "trailing dollar sign $",
			} {
				env := with(minimal, map[string]string{"ADMIN_API_TOKEN": text})
				c.mustStart(env, "true")
				if conf, _ := c.load(nil); conf.Core.Admin.AuthToken != text {
					t.Errorf("token %q became %q", text, conf.Core.Admin.AuthToken)
				}
			}
		})
	}
}

func TestEmptyIsUnset(t *testing.T) {
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, shell)
			c.useKey(fixedKey, 0o600)
			c.mustStart(minimal, "true")
			want := c.read("gateway/gateway.toml")
			env := with(minimal, nil)
			for v := range everything {
				if _, set := minimal[v]; !set {
					env[v] = ""
				}
			}
			c.mustStart(env, "true")
			if got := c.read("gateway/gateway.toml"); got != want {
				t.Errorf("empty variables changed the file:\n%s", got)
			}
		})
	}
}

func TestTunnelKey(t *testing.T) {
	mode := func(t *testing.T, path string) os.FileMode {
		t.Helper()
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Mode().Perm()
	}
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, shell)
			c.mustStart(minimal, "true")
			key := c.read("gateway/wg.key")
			raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(key))
			if err != nil {
				t.Fatalf("wg.key: %v", err)
			}
			private, err := ecdh.X25519().NewPrivateKey(raw)
			if err != nil {
				t.Fatalf("wg.key: %v", err)
			}
			conf, _ := c.load(nil)
			if want := base64.StdEncoding.EncodeToString(private.PublicKey().Bytes()); conf.Core.WG.PublicKey != want {
				t.Errorf("public key %s, want %s", conf.Core.WG.PublicKey, want)
			}
			if conf.Core.WG.PrivateKey != strings.TrimSpace(key) {
				t.Error("gateway.toml has another private key than wg.key")
			}
			for _, f := range []string{"gateway/wg.key", "gateway/gateway.toml"} {
				if m := mode(t, c.file(f)); m != 0o600 {
					t.Errorf("%s has mode %o, want 600", f, m)
				}
			}

			// The key outlives restarts, and its mode is repaired.
			if err := os.Chmod(c.file("gateway/wg.key"), 0o644); err != nil {
				t.Fatal(err)
			}
			c.mustStart(minimal, "true")
			if got := c.read("gateway/wg.key"); got != key {
				t.Error("a restart changed the key")
			}
			if m := mode(t, c.file("gateway/wg.key")); m != 0o600 {
				t.Errorf("wg.key has mode %o after a restart, want 600", m)
			}

			// An empty file is what a crash on a full disk leaves: a new key is made.
			c.useKey("", 0o600)
			c.mustStart(minimal, "true")
			if c.read("gateway/wg.key") == "" {
				t.Error("an empty wg.key was kept")
			}

			// Anything else might be a key worth saving: it is not replaced.
			for _, bad := range []string{"no key\n", fixedKey[:20], fixedKey + "\n" + fixedKey + "\n"} {
				c.useKey(bad, 0o600)
				stdout, stderr, err := c.start(minimal, "echo", "started")
				if err == nil || stdout != "" || !strings.Contains(stderr, "wg.key") {
					t.Errorf("key file %q: started %q, message %q", bad, stdout, stderr)
				}
				if got := c.read("gateway/wg.key"); got != bad {
					t.Errorf("key file %q was replaced", bad)
				}
			}
		})
	}
}

func TestCommand(t *testing.T) {
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, shell)
			out := c.mustStart(with(minimal, map[string]string{"DSTACK_GW_CONFIG": "eA=="}), "sh", "-c", `printf '%s|' "$0" "$@" "$DSTACK_GW_CONFIG"`, "a b", "", "*")
			if want := "a b||*|eA==|"; out != want {
				t.Errorf("the command saw %q, want %q", out, want)
			}

			// Without a command the gateway itself is started, under upstream's name. It takes
			// the place of the shell: process 1 is the one that gets a container's SIGTERM.
			bin := t.TempDir()
			fake := "#!/bin/sh\nprintf '%s ' \"$@\"\necho pid=$PPID\n"
			if err := os.WriteFile(filepath.Join(bin, "dstack-gateway"), []byte(fake), 0o755); err != nil {
				t.Fatal(err)
			}
			c.path = bin + ":" + c.path
			out = c.mustStart(minimal)
			if want := fmt.Sprintf("-c %s pid=%d\n", c.file("gateway/gateway.toml"), os.Getpid()); out != want {
				t.Errorf("default command ran with %q, want %q", out, want)
			}
		})
	}
}

// TestSecretsAreNoArguments records what every program is called with: arguments are
// readable by everybody on the machine.
func TestSecretsAreNoArguments(t *testing.T) {
	for name, shell := range shells(t) {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, shell)
			c.useKey(fixedKey, 0o600)
			bin, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
			spied := []string{"wg", "sed", "cat", "tr", "mv", "chmod", "mkdir"}
			for _, tool := range spied {
				path, err := exec.LookPath(tool)
				if err != nil {
					t.Fatal(err)
				}
				spy := fmt.Sprintf("#!/bin/sh\nprintf '%%s\\n' \"%s $*\" >>%s\nexec %s \"$@\"\n", tool, log, path)
				if err := os.WriteFile(filepath.Join(bin, tool), []byte(spy), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			c.path = bin + ":" + c.path
			c.mustStart(everything, "true")
			calls, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(calls), "wg pubkey\n") {
				t.Fatalf("the spies saw nothing of interest:\n%s", calls)
			}
			for _, secret := range []string{token, fixedKey} {
				if strings.Contains(string(calls), secret) {
					t.Errorf("a secret is among the arguments:\n%s", calls)
				}
			}
		})
	}
}

// TestPublicKey keeps the two constants above together.
func TestPublicKey(t *testing.T) {
	raw, err := base64.StdEncoding.DecodeString(fixedKey)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	if got := base64.StdEncoding.EncodeToString(private.PublicKey().Bytes()); got != publicKey {
		t.Errorf("public key %s, want %s", got, publicKey)
	}
	golden, err := os.ReadFile("testdata/cluster.toml")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(golden), publicKey) {
		t.Error("the golden file was made with another key")
	}
}
