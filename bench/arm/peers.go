package arm

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// The peers listen on one port a mode and service. Ours decides by name on one port; giving each of theirs its own
// spares them a second hop inside the program.
var peerPorts = map[Mode]map[Service]uint16{
	Passthrough: {Requests: 443, Bulk: 443},
	Terminate:   {Requests: 8443, Bulk: 8444},
}

func peerEntry(m Mode, s Service) netip.AddrPort {
	return netip.AddrPortFrom(rig.GatewayAddr.Addr(), peerPorts[m][s])
}

func backendAt(m Mode, s Service) string {
	return netip.AddrPortFrom(rig.BackendAddr.Addr(), port(m, s)).String()
}

// startTimeout bounds how long a peer may take to listen.
const startTimeout = 10 * time.Second

// peerLacks is what both peers cannot do.
func peerLacks(n Need, pq bool) string {
	switch {
	case n.Control:
		return "has no registrations"
	case n.Mode == Terminate && n.PostQuantum && !pq:
		return "its OpenSSL is older than 3.5 and has no X25519MLKEM768"
	}
	return ""
}

// groups is the list of key exchanges a peer offers, in OpenSSL's names.
func groups(pq bool) string {
	if pq {
		return "X25519MLKEM768:X25519"
	}
	return "X25519"
}

var opensslVersion = regexp.MustCompile(`(?:Running on|built with) OpenSSL(?: version : OpenSSL)? (\d+)\.(\d+)\.`)

// postQuantum reports whether the OpenSSL a program says it uses has X25519MLKEM768 (3.5 and later).
func postQuantum(ctx context.Context, argv ...string) bool {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return false // Check says that the program is missing
	}
	return modernOpenSSL(string(out))
}

func modernOpenSSL(text string) bool {
	m := opensslVersion.FindStringSubmatch(text)
	if m == nil {
		return false
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return major > 3 || major == 3 && minor >= 5
}

// HAProxy as the distribution packages it. With Splice every connection is moved with splice(2): "splice-auto" never
// judges one-way bulk worth it, so it is forced in both directions.
type HAProxy struct {
	Splice      bool
	PostQuantum bool // its OpenSSL has X25519MLKEM768
}

// Name implements Arm.
func (h HAProxy) Name() string {
	if h.Splice {
		return "haproxy-splice"
	}
	return "haproxy"
}

// Check implements Arm.
func (HAProxy) Check() error { return packaged("haproxy", "haproxy") }

// Version implements Arm.
func (HAProxy) Version(ctx context.Context) (string, error) { return firstLine(ctx, "haproxy", "-v") }

// Lacks implements Arm.
func (h HAProxy) Lacks(n Need) string {
	if h.Splice && n.Mode == Terminate {
		return "splicing cannot move TLS it encrypts itself"
	}
	return peerLacks(n, h.PostQuantum)
}

// Config implements Arm.
func (h HAProxy) Config() string { return h.config("/RIG") }

func (h HAProxy) config(dir string) string {
	splice := ""
	if h.Splice {
		splice = "    option splice-request\n    option splice-response\n"
	}
	return `global
    nbthread 2
    # Two descriptors a connection and two a pipe must fit the 20,000 a process may have.
    maxconn 9500
    maxpipes 400
    stats socket ` + dir + `/haproxy.sock mode 600
    ssl-default-bind-options ssl-min-ver TLSv1.3
    # The cipher crypto/tls and nginx agree on by themselves; HAProxy would choose AES-256.
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256

defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
` + splice + `
frontend passthrough
    bind ` + peerEntry(Passthrough, Requests).String() + `
    tcp-request inspect-delay 5s
    tcp-request content accept if { req.ssl_hello_type 1 }
    use_backend requests if { req.ssl_sni -i ` + Host(Passthrough, Requests) + ` }
    use_backend bulk if { req.ssl_sni -i ` + Host(Passthrough, Bulk) + ` }

backend requests
    server app ` + backendAt(Passthrough, Requests) + `

backend bulk
    server app ` + backendAt(Passthrough, Bulk) + `

listen terminate-requests
    bind ` + peerEntry(Terminate, Requests).String() + ` ssl crt ` + dir + `/haproxy.pem curves ` + groups(h.PostQuantum) + `
    server app ` + backendAt(Terminate, Requests) + `

listen terminate-bulk
    bind ` + peerEntry(Terminate, Bulk).String() + ` ssl crt ` + dir + `/haproxy.pem curves ` + groups(h.PostQuantum) + `
    server app ` + backendAt(Terminate, Bulk) + `
`
}

// Start implements Arm.
func (h HAProxy) Start(_ context.Context, r *rig.Rig, c Certificate) (Running, error) {
	if _, err := write(r.Dir, "haproxy.pem", append(append([]byte{}, c.Chain...), c.Key...)); err != nil {
		return Running{}, err
	}
	path, err := write(r.Dir, "haproxy.cfg", []byte(h.config(r.Dir)))
	if err != nil {
		return Running{}, err
	}
	p, err := r.Start(rig.Gateway, []string{"haproxy", "-db", "-f", path}, rig.Options{})
	if err != nil {
		return Running{}, err
	}
	if err := r.WaitListening(rig.Gateway, p, startTimeout, 443, 8443, 8444); err != nil {
		return Running{}, err
	}
	return Running{
		Entry: peerEntry, PID: p.PID(), Process: p,
		Facts: func(ctx context.Context) (map[string]string, error) {
			text, err := haproxyInfo(ctx, filepath.Join(r.Dir, "haproxy.sock"))
			if err != nil {
				return nil, err
			}
			return pick(text,
				"TotalBytesOut", "TotalSplicdedBytesOut", "TotalSplicedBytesOut", // the former is how 2.6 spells it
				"PipesUsed", "PipesFree", "Maxpipes"), nil
		},
	}, nil
}

// haproxyInfo asks HAProxy's statistics socket for "show info".
func haproxyInfo(ctx context.Context, socket string) (string, error) {
	c, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", socket)
	if err != nil {
		return "", fmt.Errorf("asking HAProxy for its counters: %w", err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.WriteString(c, "show info\n"); err != nil {
		return "", fmt.Errorf("asking HAProxy for its counters: %w", err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return "", fmt.Errorf("asking HAProxy for its counters: %w", err)
	}
	return string(b), nil
}

// pick returns the named lines of a "Name: value" text.
func pick(text string, names ...string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(text) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		for _, n := range names {
			if ok && n == name {
				out[name] = strings.TrimSpace(value)
			}
		}
	}
	return out
}

// Nginx as the distribution packages it, with its stream module.
type Nginx struct {
	PostQuantum bool // its OpenSSL has X25519MLKEM768
}

const nginxStream = "/usr/lib/nginx/modules/ngx_stream_module.so"

// Name implements Arm.
func (Nginx) Name() string { return "nginx" }

// Check implements Arm.
func (Nginx) Check() error {
	if err := packaged("nginx", "nginx-light"); err != nil {
		return err
	}
	if _, err := os.Stat(nginxStream); err != nil {
		return fmt.Errorf("nginx has no stream module (%w): install the Debian package libnginx-mod-stream", err)
	}
	return nil
}

// Version implements Arm.
func (Nginx) Version(ctx context.Context) (string, error) { return firstLine(ctx, "nginx", "-v") }

// Lacks implements Arm.
func (n Nginx) Lacks(need Need) string { return peerLacks(need, n.PostQuantum) }

// Config implements Arm.
func (n Nginx) Config() string { return n.config("/RIG") }

func (n Nginx) config(dir string) string {
	return `load_module ` + nginxStream + `;
daemon off;
user root;
pid ` + dir + `/nginx.pid;
error_log stderr warn;
worker_processes 2;
worker_rlimit_nofile 20000;
events { worker_connections 20000; }

stream {
    # Without it nginx closes both sides at the first end of stream and cuts answers off.
    proxy_half_close on;
    proxy_timeout 60s;
    ssl_certificate ` + dir + `/chain.pem;
    ssl_certificate_key ` + dir + `/key.pem;
    ssl_protocols TLSv1.3;
    ssl_ecdh_curve ` + groups(n.PostQuantum) + `;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;

    map_hash_bucket_size 128;
    map $ssl_preread_server_name $app {
        ` + Host(Passthrough, Requests) + ` ` + backendAt(Passthrough, Requests) + `;
        ` + Host(Passthrough, Bulk) + ` ` + backendAt(Passthrough, Bulk) + `;
    }
    server { listen ` + peerEntry(Passthrough, Requests).String() + ` backlog=4096; ssl_preread on; proxy_pass $app; }
    server { listen ` + peerEntry(Terminate, Requests).String() + ` ssl backlog=4096; proxy_pass ` + backendAt(Terminate, Requests) + `; }
    server { listen ` + peerEntry(Terminate, Bulk).String() + ` ssl backlog=4096; proxy_pass ` + backendAt(Terminate, Bulk) + `; }
}
`
}

// Start implements Arm.
func (n Nginx) Start(_ context.Context, r *rig.Rig, c Certificate) (Running, error) {
	for name, text := range map[string][]byte{"chain.pem": c.Chain, "key.pem": c.Key} {
		if _, err := write(r.Dir, name, text); err != nil {
			return Running{}, err
		}
	}
	path, err := write(r.Dir, "nginx.conf", []byte(n.config(r.Dir)))
	if err != nil {
		return Running{}, err
	}
	p, err := r.Start(rig.Gateway, []string{"nginx", "-c", path, "-p", r.Dir}, rig.Options{})
	if err != nil {
		return Running{}, err
	}
	if err := r.WaitListening(rig.Gateway, p, startTimeout, 443, 8443, 8444); err != nil {
		return Running{}, err
	}
	return Running{Entry: peerEntry, PID: p.PID(), Process: p}, nil
}
