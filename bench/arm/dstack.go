package arm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// Dstack is a dstack gateway: ours, or upstream's from the same configuration.
type Dstack struct {
	Label  string // name of the arm
	Binary string // path of the program
	// Extra is TOML appended to the configuration; its tables must not repeat those of the rig's file.
	Extra string
	// Admin is more lines of the table [core.admin].
	Admin string
}

// Ports of the dstack gateways in the rig. The control interfaces listen on loopback of the gateway's namespace.
const (
	proxyPort = 443
	mainPort  = 8010
	adminPort = 8011
	debugPort = 8012
)

// Name implements Arm.
func (d Dstack) Name() string { return d.Label }

// Check implements Arm.
func (d Dstack) Check() error {
	if d.Binary == "" {
		return fmt.Errorf("arm %s: no program given", d.Label)
	}
	if info, err := os.Stat(d.Binary); err != nil {
		return fmt.Errorf("arm %s: %w", d.Label, err)
	} else if info.Mode()&0o111 == 0 {
		return fmt.Errorf("arm %s: %s is not executable", d.Label, d.Binary)
	}
	return nil
}

// Version implements Arm.
func (d Dstack) Version(ctx context.Context) (string, error) {
	return firstLine(ctx, d.Binary, "--version")
}

// Lacks implements Arm.
func (Dstack) Lacks(Need) string { return "" }

// Config implements Arm.
func (d Dstack) Config() string { return d.config("/RIG", "SECRET") }

func (d Dstack) config(dir, token string) string {
	own := rig.TunnelAddr.Addr().String() + "/32"
	return `workers = 2
address = "127.0.0.1"
port = ` + fmt.Sprint(mainPort) + `

[tls]
key = "` + dir + `/key.pem"
certs = "` + dir + `/chain.pem"

[tls.mutual]
ca_certs = "` + dir + `/chain.pem"

[core.admin]
enabled = true
address = "127.0.0.1:` + fmt.Sprint(adminPort) + `"
auth_token = "` + token + `"
` + d.Admin + `
[core.debug]
address = "127.0.0.1:` + fmt.Sprint(debugPort) + `"
insecure_enable_debug_rpc = true
insecure_skip_attestation = true

[core.sync]
node_id = 1
data_dir = "` + dir + `/data"

# An existing link is adopted whatever its type (gateway spec 6.2), so the tunnel is a plain veth pair here: the
# gateway's own cost is measured, not WireGuard's.
[core.wg]
interface = "` + rig.BackendLink + `"
config_path = "` + dir + `/wg.conf"
ip = "` + rig.TunnelAddr.String() + `"
reserved_net = ["` + own + `"]
client_ip_range = "` + rig.Pool.String() + `"

[core.proxy]
listen_addr = "` + rig.GatewayAddr.Addr().String() + `"
listen_port = ` + fmt.Sprint(proxyPort) + `
workers = 2
tls_versions = ["1.2", "1.3"]
max_connections_per_app = 0
base_domain = "` + Base + `"
cert_chain = "` + dir + `/chain.pem"
cert_key = "` + dir + `/key.pem"
` + d.Extra
}

// Start implements Arm.
func (d Dstack) Start(ctx context.Context, r *rig.Rig, c Certificate) (Running, error) {
	for name, text := range map[string][]byte{"chain.pem": c.Chain, "key.pem": c.Key} {
		if _, err := write(r.Dir, name, text); err != nil {
			return Running{}, err
		}
	}
	if err := os.Mkdir(filepath.Join(r.Dir, "data"), 0o700); err != nil {
		return Running{}, fmt.Errorf("arm %s: %w", d.Label, err)
	}
	var raw [24]byte
	rand.Read(raw[:])
	token := hex.EncodeToString(raw[:])
	path, err := write(r.Dir, "gateway.toml", []byte(d.config(r.Dir, token)))
	if err != nil {
		return Running{}, err
	}
	p, err := r.Start(rig.Gateway, []string{d.Binary, "-c", path}, rig.Options{Env: []string{"RUST_LOG=warn"}})
	if err != nil {
		return Running{}, err
	}
	if err := r.WaitListening(rig.Gateway, p, startTimeout, debugPort, adminPort, proxyPort); err != nil {
		return Running{}, err
	}
	ctl := newControl(token, func(addr string) (net.Conn, error) { return r.Dial(rig.Gateway, addr) })
	// The backend must get its own address: the first one of the pool.
	ip, err := ctl.Register(ctx, App, Instance)
	if err == nil && ip != rig.BackendAddr.Addr() {
		err = fmt.Errorf("the first instance got address %s, the rig's backend has %s", ip, rig.BackendAddr.Addr())
	}
	if err == nil {
		err = ctl.Open(ctx, Instance)
	}
	if err != nil {
		ctl.Close()
		return Running{}, errors.Join(fmt.Errorf("arm %s: %w", d.Label, err), p.Failed("preparing the instance"))
	}
	return Running{
		Entry: func(Mode, Service) netip.AddrPort {
			return netip.AddrPortFrom(rig.GatewayAddr.Addr(), proxyPort)
		},
		PID: p.PID(), Process: p, Control: ctl, Facts: ctl.accel,
	}, nil
}

// Known returns the names of arms that need nothing but this machine.
func Known() []string { return []string{"l3", "haproxy", "haproxy-splice", "nginx"} }

// Peer returns the arm of a name in Known.
func Peer(ctx context.Context, name string) (Arm, error) {
	switch name {
	case "l3":
		return L3{}, nil
	case "haproxy", "haproxy-splice":
		return HAProxy{Splice: name == "haproxy-splice", PostQuantum: postQuantum(ctx, "haproxy", "-vv")}, nil
	case "nginx":
		return Nginx{PostQuantum: postQuantum(ctx, "nginx", "-V")}, nil
	}
	return nil, fmt.Errorf("no arm %q: there are %s, ours and upstream", name, strings.Join(slices.Sorted(slices.Values(Known())), ", "))
}

// callTimeout bounds one control call.
const callTimeout = 10 * time.Second
