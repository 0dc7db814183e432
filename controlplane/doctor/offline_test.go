package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// checkCases change one thing and look at what one check says about it.
var checkCases = []struct {
	name   string
	conf   string // appended to base
	setup  func(t *testing.T, h *Host)
	check  string
	status finding.Status
	says   string
	hint   string
}{
	{name: "config fine", check: "configuration", status: finding.OK, says: "loads"},
	{name: "unknown key", conf: "[core.proxy]\nconect_top_n = 2\n", check: "configuration", status: finding.Warn, says: "remark", hint: "config print"},
	{name: "old key only", conf: "[core.proxy]\ntls_crypto_provider = \"ring\"\n", check: "configuration", status: finding.OK},

	{name: "pair fine", check: "rpc certificate", status: finding.OK, says: "for gw.example, *.apps.example, valid until 2026-07-03"},
	{name: "no chain", setup: func(t *testing.T, h *Host) { h.remove("etc/gw/rpc.crt") }, check: "rpc certificate", status: finding.Fail, says: "/etc/gw/rpc.crt cannot be read: file does not exist", hint: "create /etc/gw/rpc.crt"},
	{name: "no key", setup: func(t *testing.T, h *Host) { h.remove("etc/gw/rpc.key") }, check: "rpc certificate", status: finding.Fail, says: "private key /etc/gw/rpc.key cannot be read", hint: "create"},
	{name: "wrong key", setup: func(t *testing.T, h *Host) {
		_, key := pair(t, now, now.Add(time.Hour), "x")
		h.put("etc/gw/rpc.key", string(key))
	}, check: "rpc certificate", status: finding.Fail, says: "are no certificate and its key"},
	{name: "expired", setup: func(t *testing.T, h *Host) { h.Now = func() time.Time { return now.Add(61 * 24 * time.Hour) } }, check: "rpc certificate", status: finding.Fail, says: "expired 24h ago", hint: "replace"},
	{name: "expires soon", setup: func(t *testing.T, h *Host) { h.Now = func() time.Time { return now.Add(55 * 24 * time.Hour) } }, check: "rpc certificate", status: finding.Warn, says: "expires in 5d"},
	{name: "not yet valid", setup: func(t *testing.T, h *Host) { h.Now = func() time.Time { return now.Add(-31 * 24 * time.Hour) } }, check: "rpc certificate", status: finding.Fail, says: "valid only from", hint: "clock"},
	{name: "readable key", setup: func(t *testing.T, h *Host) { h.FS.(fstest.MapFS)["etc/gw/rpc.key"].Mode = 0o640 }, check: "rpc certificate", status: finding.Warn, says: "mode 0640", hint: "chmod 600 /etc/gw/rpc.key"},
	{name: "no CA", setup: func(t *testing.T, h *Host) { h.put("etc/gw/ca.crt", "hello") }, check: "rpc certificate", status: finding.Fail, says: "no certificate in it"},
	{name: "broken CA", setup: func(t *testing.T, h *Host) {
		h.put("etc/gw/ca.crt", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
	}, check: "rpc certificate", status: finding.Fail, says: "certificate 1:"},
	{name: "from the agent", conf: "[core]\nrpc_domain = \"gw.example\"\n", setup: func(t *testing.T, h *Host) { h.remove("etc/gw/rpc.crt") }, check: "rpc certificate", status: finding.OK, says: "the guest agent gives one"},
	{name: "from the agent, nowhere to write", conf: "[core]\nrpc_domain = \"gw.example\"\n", setup: func(t *testing.T, h *Host) {
		h.remove("etc/gw/rpc.crt")
		h.TryWrite = func(string) error { return fs.ErrPermission }
	}, check: "rpc certificate", status: finding.Fail, says: "/etc/gw cannot be written", hint: "create the directory"},
	{name: "static", conf: "[core.proxy]\nbase_domain = \"apps.example\"\ncert_chain = \"/etc/gw/rpc.crt\"\ncert_key = \"/etc/gw/rpc.key\"\n", check: "static certificate", status: finding.OK},
	{name: "static for another", conf: "[core.proxy]\nbase_domain = \"other.example\"\ncert_chain = \"/etc/gw/rpc.crt\"\ncert_key = \"/etc/gw/rpc.key\"\n", check: "static certificate", status: finding.Fail, says: "not for *.other.example"},
	{name: "htpasswd", conf: "[core.admin]\nenabled = true\nhtpasswd_file = \"/etc/gw/none\"\n", check: "admin users", status: finding.Fail, says: "/etc/gw/none cannot be read"},
	{name: "htpasswd empty", conf: "[core.admin]\nenabled = true\nhtpasswd_file = \"/etc/gw/token\"\n", setup: func(t *testing.T, h *Host) { h.put("etc/gw/token", "") }, check: "admin users", status: finding.Fail, says: "is empty"},
	{name: "htpasswd readable", conf: "[core.admin]\nenabled = true\nhtpasswd_file = \"/etc/gw/token\"\n", setup: func(t *testing.T, h *Host) { h.FS.(fstest.MapFS)["etc/gw/token"].Mode = 0o644 }, check: "admin users", status: finding.Warn, hint: "chmod 600"},
	{name: "peer file", check: "peer file", status: finding.OK},
	{name: "peer file without directory", conf: "[core.wg]\nconfig_path = \"/nowhere/wg0.conf\"\n", check: "peer file", status: finding.Warn, hint: "mkdir -p /nowhere"},
	{name: "peer file read-only", setup: func(t *testing.T, h *Host) { h.TryWrite = func(string) error { return unix.EROFS } }, check: "peer file", status: finding.Warn, says: "read-only file system"},

	{name: "clock", check: "clock", status: finding.OK},
	{name: "clock of 1970", setup: func(t *testing.T, h *Host) { h.Now = func() time.Time { return time.Unix(100, 0) } }, check: "clock", status: finding.Fail, says: "1970-01-01"},
	{name: "clock alone", setup: func(t *testing.T, h *Host) { h.ClockSynced = func() (bool, error) { return false, nil } }, check: "clock", status: finding.Warn, hint: "chrony"},
	{name: "clock unknown", setup: func(t *testing.T, h *Host) { h.ClockSynced = func() (bool, error) { return false, unix.EPERM } }, check: "clock", status: finding.Warn, says: "cannot be found out"},

	// F of ops spec 6.4: ceil((C*(2+4S) + 64W + 8192)/65536)*65536
	{name: "files", check: "open files", status: finding.OK, says: "enough for 100000 connections"},
	{name: "files for 10000", conf: "[core.tuning]\ntarget_connections = 10000\n", setup: func(t *testing.T, h *Host) {
		h.FileLimit = func() (uint64, uint64, error) { return 1024, 65535, nil }
	}, check: "open files", status: finding.Fail, says: "10000 connections need 65536", hint: "LimitNOFILE=65536"},
	{name: "files for 100000", setup: func(t *testing.T, h *Host) {
		h.FileLimit = func() (uint64, uint64, error) { return 1024, 262143, nil }
	}, check: "open files", status: finding.Fail, says: "need 262144"},
	{name: "files for 200000 with splice", conf: "[core.tuning]\ntarget_connections = 200000\n[core.proxy.tcp_splice]\n", setup: func(t *testing.T, h *Host) {
		h.FileLimit = func() (uint64, uint64, error) { return 1024, 1048576, nil }
	}, check: "open files", status: finding.Fail, says: "need 1245184", hint: "fs.nr_open=1245184"},
	{name: "files, soft limit", conf: "[core]\nset_ulimit = false\n", check: "open files", status: finding.Fail, says: "the limit is 1024", hint: "core.set_ulimit = true"},
	{name: "files unlimited", setup: func(t *testing.T, h *Host) {
		h.FileLimit = func() (uint64, uint64, error) { return 1024, math.MaxUint64, nil }
	}, check: "open files", status: finding.OK, says: "unlimited"},
	{name: "files unknown", setup: func(t *testing.T, h *Host) {
		h.FileLimit = func() (uint64, uint64, error) { return 0, 0, unix.EINVAL }
	}, check: "open files", status: finding.Warn, says: "cannot be read"},

	{name: "backlog", setup: func(t *testing.T, h *Host) { h.put("proc/sys/net/core/somaxconn", "128\n") }, check: "accept queue", status: finding.Warn, hint: "net.core.somaxconn=4096"},
	{name: "backlog unknown", setup: func(t *testing.T, h *Host) { h.remove("proc/sys/net/core/somaxconn") }, check: "accept queue", status: finding.Skip, says: "/proc/sys/net/core/somaxconn"},
	{name: "backlog nonsense", setup: func(t *testing.T, h *Host) { h.put("proc/sys/net/core/somaxconn", "many") }, check: "accept queue", status: finding.Skip, says: `"many" is not a number`},

	{name: "conntrack off", setup: func(t *testing.T, h *Host) { h.remove("proc/sys/net/netfilter/nf_conntrack_max") }, check: "conntrack", status: finding.OK, says: "not tracked"},
	{name: "conntrack small", setup: func(t *testing.T, h *Host) { h.put("proc/sys/net/netfilter/nf_conntrack_max", "16384") }, check: "conntrack", status: finding.Warn, says: "16384 entries only"},
	{name: "conntrack 79 %", setup: func(t *testing.T, h *Host) {
		h.put("proc/sys/net/netfilter/nf_conntrack_count", "209714")
	}, check: "conntrack", status: finding.OK},
	{name: "conntrack 80 %", setup: func(t *testing.T, h *Host) {
		h.put("proc/sys/net/netfilter/nf_conntrack_count", "209716")
	}, check: "conntrack", status: finding.Warn, says: "80 % full"},
	{name: "conntrack 95 %", setup: func(t *testing.T, h *Host) {
		h.put("proc/sys/net/netfilter/nf_conntrack_count", "249037")
	}, check: "conntrack", status: finding.Fail, says: "dropped", hint: "nf_conntrack_max=1048576"},
	{name: "conntrack count unknown", setup: func(t *testing.T, h *Host) { h.remove("proc/sys/net/netfilter/nf_conntrack_count") }, check: "conntrack", status: finding.Skip},

	{name: "pipes of root", check: "pipes", status: finding.OK, says: "does not apply"},
	{name: "pipes without limit", setup: func(t *testing.T, h *Host) { h.put("proc/sys/fs/pipe-user-pages-soft", "0") }, check: "pipes", status: finding.OK, says: "no limit"},
	{name: "pipes of a user", setup: noCaps, check: "pipes", status: finding.OK, says: "about 512 connections", hint: "pipe-user-pages-soft=0"},
	{name: "pipes of a user who splices", conf: "[core.proxy.tcp_splice]\n", setup: noCaps, check: "pipes", status: finding.Warn, hint: "CAP_SYS_RESOURCE"},

	{name: "ktls there", check: "kernel TLS", status: finding.OK},
	{name: "ktls missing, not wanted", setup: noULP, check: "kernel TLS", status: finding.OK, says: "not set"},
	{name: "ktls missing", conf: "[core.proxy.ktls]\n", setup: noULP, check: "kernel TLS", status: finding.Warn, hint: "modprobe tls"},
	{name: "ktls set", conf: "[core.proxy.ktls]\n", check: "kernel TLS", status: finding.OK, says: "core.proxy.ktls is set"},

	{name: "ipv6 not used", check: "ipv6", status: finding.OK},
	{name: "ipv6 used", conf: "[core.proxy]\nlisten_addr6 = \"::\"\n", check: "ipv6", status: finding.OK, says: "listen_addr6 is ::"},
	{name: "ipv6 disabled", conf: "[core.proxy]\nlisten_addr6 = \"::\"\n", setup: func(t *testing.T, h *Host) {
		h.put("proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
	}, check: "ipv6", status: finding.Fail, says: "disable_ipv6 is set"},
	{name: "ipv6 missing", conf: "[core.proxy]\nlisten_addr6 = \"::\"\n", setup: func(t *testing.T, h *Host) {
		h.remove("proc/sys/net/ipv6/conf/all/disable_ipv6")
	}, check: "ipv6", status: finding.Fail, says: "the kernel has none here"},
	{name: "ipv6 missing, not used", setup: func(t *testing.T, h *Host) {
		h.remove("proc/sys/net/ipv6/conf/all/disable_ipv6")
	}, check: "ipv6", status: finding.OK, says: "not configured"},

	{name: "caps", conf: "[core.proxy]\nlisten_port = 443\n", check: "capabilities", status: finding.OK, says: "CAP_NET_ADMIN, CAP_NET_BIND_SERVICE"},
	{name: "caps high ports", check: "capabilities", status: finding.OK, says: "are held: CAP_NET_ADMIN"},
	{name: "no caps", conf: "[core.proxy]\nlisten_port = 443\n", setup: noCaps, check: "capabilities", status: finding.Fail, says: "CAP_NET_BIND_SERVICE is missing: port 443 cannot be bound", hint: "AmbientCapabilities"},
	{name: "no caps, lowered", conf: "[core.wg]\nmode = \"none\"\n[core.proxy]\nlisten_port = 443\n", setup: func(t *testing.T, h *Host) {
		noCaps(t, h)
		h.put("proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
	}, check: "capabilities", status: finding.OK, says: "none is needed"},
	{name: "caps unknown", setup: func(t *testing.T, h *Host) { h.put("proc/self/status", "Name: x\n") }, check: "capabilities", status: finding.Skip, says: "no line CapEff"},

	{name: "wg none", conf: "[core.wg]\nmode = \"none\"\n", check: "wireguard backend", status: finding.Skip},
	{name: "wg loaded", check: "wireguard backend", status: finding.OK, says: "kernel's WireGuard (loaded)"},
	{name: "wg built in", setup: func(t *testing.T, h *Host) {
		h.remove("sys/module/wireguard")
		h.put("lib/modules/6.1.0/modules.builtin", "kernel/drivers/net/wireguard/wireguard.ko\n")
	}, check: "wireguard backend", status: finding.OK, says: "(built in)"},
	{name: "wg loadable", setup: func(t *testing.T, h *Host) {
		h.remove("sys/module/wireguard")
		h.put("lib/modules/6.1.0/modules.dep", "kernel/drivers/net/wireguard/wireguard.ko: a b\n")
	}, check: "wireguard backend", status: finding.OK, says: "(to be loaded)"},
	{name: "wg in user space", setup: func(t *testing.T, h *Host) { h.remove("sys/module/wireguard") }, check: "wireguard backend", status: finding.Warn, says: "in user space", hint: "modprobe wireguard"},
	{name: "wg wants the kernel", conf: "[core.wg]\nmode = \"kernel\"\n", setup: func(t *testing.T, h *Host) { h.remove("sys/module/wireguard") }, check: "wireguard backend", status: finding.Fail},
	{name: "wg wants user space", conf: "[core.wg]\nmode = \"userspace\"\n", check: "wireguard backend", status: finding.OK, says: "/dev/net/tun"},
	{name: "wg without tun", conf: "[core.wg]\nmode = \"userspace\"\n", setup: func(t *testing.T, h *Host) { h.remove("dev/net/tun") }, check: "wireguard backend", status: finding.Fail, hint: "modprobe tun"},
	{name: "wg without anything", setup: func(t *testing.T, h *Host) { h.remove("sys/module/wireguard"); h.remove("dev/net/tun") }, check: "wireguard backend", status: finding.Fail, says: "neither", hint: "docker run --device"},
	{name: "wg adopted", setup: func(t *testing.T, h *Host) {
		h.put("sys/class/net/wg0/uevent", "DEVTYPE=wireguard\nINTERFACE=wg0\n")
	}, check: "wireguard backend", status: finding.OK, says: "wg0 exists and is WireGuard"},
	{name: "wg tun adopted", setup: func(t *testing.T, h *Host) { h.put("sys/class/net/wg0/tun_flags", "0x1001\n") }, check: "wireguard backend", status: finding.OK, says: "TUN"},
	{name: "wg dummy", setup: func(t *testing.T, h *Host) { h.put("sys/class/net/wg0/uevent", "INTERFACE=wg0\n") }, check: "wireguard backend", status: finding.Fail, says: "is not WireGuard", hint: "ip link delete wg0"},

	{name: "data", check: "data directory", status: finding.OK, says: "50 GiB free"},
	{name: "data to be made", conf: "", setup: func(t *testing.T, h *Host) { h.remove("data") }, check: "data directory", status: finding.OK, says: "it will be made"},
	{name: "data cannot be made", setup: func(t *testing.T, h *Host) {
		h.remove("data")
		h.TryWrite = func(d string) error { return unix.EROFS }
	}, check: "data directory", status: finding.Fail, says: "cannot be made in /: read-only"},
	{name: "data is a file", setup: func(t *testing.T, h *Host) { h.put("data", "x") }, check: "data directory", status: finding.Fail, says: "not a directory"},
	{name: "data read-only", setup: func(t *testing.T, h *Host) { h.TryWrite = func(string) error { return unix.ENOSPC } }, check: "data directory", status: finding.Fail, says: "no space left"},
	{name: "data full", setup: free(Space{Free: 10 << 20, Total: 100 << 30}), check: "data directory", status: finding.Fail, says: "only 10 MiB left"},
	{name: "data low", setup: free(Space{Free: 900 << 20, Total: 2 << 30}), check: "data directory", status: finding.Warn, says: "900 MiB of 2048 MiB"},
	{name: "data low in percent", setup: free(Space{Free: 4 << 30, Total: 100 << 30}), check: "data directory", status: finding.Warn},
	{name: "data inodes", setup: free(Space{Free: 50 << 30, Total: 100 << 30, TotalInodes: 1e6, FreeInodes: 10}), check: "data directory", status: finding.Fail, says: "10 inodes"},
	{name: "data in memory", setup: free(Space{Free: 50 << 30, Total: 100 << 30, Kind: "tmpfs"}), check: "data directory", status: finding.Warn, says: "tmpfs"},
	{name: "data in a container", setup: free(Space{Free: 50 << 30, Total: 100 << 30, Kind: "overlay"}), check: "data directory", status: finding.Warn, hint: "mount a volume at /data"},
	{name: "data open", setup: func(t *testing.T, h *Host) { h.FS.(fstest.MapFS)["data"].Mode = fs.ModeDir | 0o755 }, check: "data directory", status: finding.Warn, says: "mode is 0755", hint: "chmod 700 /data"},
	{name: "data space unknown", setup: func(t *testing.T, h *Host) { h.Space = func(string) (Space, error) { return Space{}, unix.EIO } }, check: "data directory", status: finding.Warn},

	{name: "resolvers", check: "resolvers", status: finding.OK, says: "2 resolvers in /etc/resolv.conf"},
	{name: "resolvers configured", conf: "[core.proxy]\napp_address_dns_servers = [\"192.0.2.1:53\"]\n", check: "resolvers", status: finding.OK, says: "1 resolver in core.proxy.app_address_dns_servers"},
	{name: "one resolver", setup: func(t *testing.T, h *Host) {
		h.AskResolver = func(_ context.Context, s netip.AddrPort) error {
			if s.Addr().String() == "192.0.2.54" {
				return errors.New("i/o timeout")
			}
			return nil
		}
	}, check: "resolvers", status: finding.Warn, says: "1 of 2 resolvers"},
	{name: "no resolver", setup: func(t *testing.T, h *Host) {
		h.AskResolver = func(context.Context, netip.AddrPort) error { return errDown }
	}, check: "resolvers", status: finding.Fail, says: "no resolver", hint: "port 53"},
	{name: "no resolv.conf", setup: func(t *testing.T, h *Host) { h.remove("etc/resolv.conf") }, check: "resolvers", status: finding.Fail, says: "/etc/resolv.conf cannot be read"},
	{name: "empty resolv.conf", setup: func(t *testing.T, h *Host) {
		h.put("etc/resolv.conf", "search example\n")
		h.AskResolver = func(_ context.Context, s netip.AddrPort) error { return fmt.Errorf("asked %s", s) }
	}, check: "resolvers", status: finding.Fail},
	{name: "bad resolv.conf", setup: func(t *testing.T, h *Host) { h.put("etc/resolv.conf", "nameserver dns.example\n") }, check: "resolvers", status: finding.Fail, says: "is no address"},

	{name: "agent", check: "guest agent", status: finding.OK, says: "app abcd"},
	{name: "agent not needed", conf: "[core.debug]\ninsecure_skip_attestation = true\n", check: "guest agent", status: finding.Skip},
	{name: "agent down", setup: noAgent, check: "guest agent", status: finding.Fail, says: "own app id", hint: "insecure_skip_attestation = true"},
	{name: "agent down, rpc_domain", conf: "[core.debug]\ninsecure_skip_attestation = true\n[core]\nrpc_domain = \"gw.example\"\n", setup: noAgent, check: "guest agent", status: finding.Fail, says: "core.rpc_domain gw.example"},

	{name: "webhook", conf: "[core.auth]\nenabled = true\nurl = \"http://u:secret@auth.example/app-auth\"\n", check: "auth webhook", status: finding.OK, says: "http://auth.example takes"},
	{name: "webhook down", conf: "[core.auth]\nenabled = true\nurl = \"http://auth.example/app-auth\"\n", setup: func(t *testing.T, h *Host) {
		h.Dial = func(_ context.Context, _, a string) (net.Conn, error) {
			return nil, fmt.Errorf("dial %s: %w", a, errDown)
		}
	}, check: "auth webhook", status: finding.Fail, says: "dial auth.example:80", hint: "core.auth.url"},
	{name: "webhook without TLS", conf: "[core.auth]\nenabled = true\nurl = \"https://auth.example/app-auth\"\n", check: "auth webhook", status: finding.Fail, says: "cannot be reached"},

	{name: "etcd", conf: "[core.store]\nmode = \"external\"\nendpoints = [\"http://10.0.0.1:2379\", \"http://10.0.0.2\", \"http://10.0.0.3:2379\"]\n", check: "etcd endpoints", status: finding.OK, says: "3 of 3 members"},
	{name: "etcd minority", conf: "[core.store]\nmode = \"external\"\nendpoints = [\"http://10.0.0.1:2379\", \"http://10.0.0.2:2379\", \"http://10.0.0.3:2379\"]\n", setup: only("10.0.0.1:2379"), check: "etcd endpoints", status: finding.Fail, says: "no majority"},
	{name: "etcd majority", conf: "[core.store]\nmode = \"external\"\nendpoints = [\"http://10.0.0.1:2379\", \"http://10.0.0.2:2379\", \"http://10.0.0.3:2379\"]\n", setup: only("10.0.0.1:2379", "10.0.0.3:2379"), check: "etcd endpoints", status: finding.Warn, says: "2 of 3"},
}

func noCaps(t *testing.T, h *Host) { h.put("proc/self/status", "CapEff:\t0000000000000000\n") }
func noULP(t *testing.T, h *Host)  { h.TLSULP = func() error { return unix.ENOENT } }
func noAgent(t *testing.T, h *Host) {
	h.AgentInfo = func(context.Context, string) ([]byte, error) { return nil, errDown }
}

func free(s Space) func(*testing.T, *Host) {
	return func(t *testing.T, h *Host) { h.Space = func(string) (Space, error) { return s, nil } }
}

func only(up ...string) func(*testing.T, *Host) {
	return func(t *testing.T, h *Host) {
		dial := h.Dial
		h.Dial = func(ctx context.Context, n, a string) (net.Conn, error) {
			for _, u := range up {
				if a == u {
					return dial(ctx, n, a)
				}
			}
			return nil, errDown
		}
	}
}

func TestOfflineChecks(t *testing.T) {
	for _, tt := range checkCases {
		t.Run(tt.name, func(t *testing.T) {
			h := machineOf(t)
			if tt.setup != nil {
				tt.setup(t, h)
			}
			s := setup(t, base+tt.conf)
			if s.Err != nil {
				t.Fatal(s.Err)
			}
			for _, c := range Offline(s, h) {
				if c.Name != tt.check {
					continue
				}
				r := c.Run(t.Context())
				if r.Status != tt.status || !strings.Contains(r.Text, tt.says) || !strings.Contains(hints(r), tt.hint) {
					t.Errorf("%+v; want %s, %q, hint %q", r, tt.status, tt.says, tt.hint)
				}
				if r.Status == finding.Fail && len(r.Hints) == 0 {
					t.Error("a failure without a remedy")
				}
				if strings.Contains(fmt.Sprintf("%+v", r), "secret@") {
					t.Error("a password in the result")
				}
				return
			}
			t.Errorf("no check %q", tt.check)
		})
	}
}

func TestPorts(t *testing.T) {
	const conf = base + "[core.admin]\nenabled = true\nauth_token = \"x\"\n[core.proxy]\nlisten_port = \"443-445\"\nlisten_addr6 = \"::\"\n"
	const total = 9 // main, admin, 3 x 2 proxy, wireguard
	denied := func(err error, ports ...uint16) func(string, netip.AddrPort) error {
		return func(_ string, at netip.AddrPort) error {
			for _, p := range ports {
				if at.Port() == p {
					return err
				}
			}
			return nil
		}
	}
	// 443 is held by nginx (pid 12), 444 by the gateway (pid 13), 8010 by nobody that can be seen.
	procs := func(h *Host) {
		h.put("proc/net/tcp", "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"+
			"   0: 00000000:01BB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1001 1 0\n"+
			"   1: 00000000:01BC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1002 1 0\n"+
			"   2: 0100007F:01BB 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 1003 1 0\n"+
			"   3: 0100007F:1F4A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1004 1 0\n")
		h.put("proc/net/tcp6", "header\n   0: 00000000000000000000000000000000:01BB 0:0 0A 0:0 00:0 0 0 0 1005 1 0\n")
		h.link("proc/12/fd/4", "socket:[1001]")
		h.link("proc/12/fd/5", "socket:[1005]")
		h.link("proc/12/exe", "/usr/sbin/nginx")
		h.put("proc/12/comm", "nginx\n")
		h.link("proc/13/fd/4", "socket:[1002]")
		h.link("proc/13/exe", "/usr/bin/dstack-gw (deleted)")
		h.put("proc/13/comm", "dstack-gw\n")
	}
	for _, tt := range []struct {
		name    string
		conf    string
		bind    func(string, netip.AddrPort) error
		setup   func(*Host)
		running bool
		status  finding.Status
		says    string
		row     string
		hint    string
	}{
		{name: "free", bind: denied(nil), status: finding.OK, says: "all 9 addresses are free"},
		{name: "nginx", bind: denied(unix.EADDRINUSE, 443), status: finding.Fail, says: "2 of 9 addresses cannot be bound", row: "proxy 0.0.0.0:443/tcp held by nginx (pid 12)", hint: "stop nginx (pid 12) or change core.proxy.listen_port"},
		{name: "running gateway", bind: denied(unix.EADDRINUSE, 444), running: true, status: finding.OK, says: "1 of 9 addresses are held by the running gateway", setup: func(h *Host) {
			h.Bind = func(_ string, at netip.AddrPort) error {
				if at.Port() == 444 && at.Addr().Is4() {
					return unix.EADDRINUSE
				}
				return nil
			}
		}},
		{name: "silent gateway", bind: denied(unix.EADDRINUSE, 444), status: finding.Warn, says: "a dstack-gw that does not answer", row: "held by dstack-gw (pid 13)", hint: "data_dir"},
		{name: "invisible", bind: denied(unix.EADDRINUSE, 8010), status: finding.Fail, row: "main 127.0.0.1:8010/tcp held by another process (run as root to see which)"},
		{name: "forbidden", bind: denied(unix.EACCES, 443), status: finding.Fail, row: "forbidden: permission denied", hint: "ports below 1024 need CAP_NET_BIND_SERVICE"},
		{name: "no such address", bind: denied(unix.EADDRNOTAVAIL, 8011), status: finding.Fail, row: "does not have the address", hint: "core.admin.address"},
		{name: "no ipv6", bind: denied(unix.EAFNOSUPPORT, 445), status: finding.Fail, row: "no IPv6"},
		{name: "odd", bind: denied(unix.EINVAL, 445), status: finding.Fail, row: "invalid argument"},
		{name: "wireguard held by nobody known", bind: denied(unix.EADDRINUSE, 51820), status: finding.Fail, row: "wireguard 0.0.0.0:51820/udp held by another process"},
		{name: "wireguard held by its interface", bind: denied(unix.EADDRINUSE, 51820), setup: func(h *Host) { h.put("sys/class/net/wg0/uevent", "DEVTYPE=wireguard\n") }, status: finding.OK},
		{name: "socket without directory", conf: base + "[core.admin]\nenabled = true\nauth_token = \"x\"\naddress = \"unix:/run/none/admin.sock\"\n", bind: denied(nil), status: finding.Fail, row: "unix socket /run/none/admin.sock its directory is missing", hint: "mkdir -p /run/none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := machineOf(t)
			procs(h)
			h.Bind = tt.bind
			if tt.setup != nil {
				tt.setup(h)
			}
			text := tt.conf
			if text == "" {
				text = conf
			}
			r := h.checkPorts(configOf(t, text), tt.running)
			rows := ""
			if r.Table != nil {
				for _, row := range r.Table.Rows {
					rows += strings.Join(row, " ") + "\n"
				}
			}
			if r.Status != tt.status || !strings.Contains(r.Text, tt.says) || !strings.Contains(rows, tt.row) || !strings.Contains(hints(r), tt.hint) {
				t.Errorf("%s %q, hints %q, rows:\n%s", r.Status, r.Text, r.Hints, rows)
			}
		})
	}
	if list, _ := endpoints(configOf(t, conf)); len(list) != total {
		t.Errorf("%d endpoints, want %d", len(list), total)
	}
}

func TestParseProcAddr(t *testing.T) {
	for in, want := range map[string]string{
		"0100007F:01BB": "127.0.0.1:443", "00000000:1F90": "0.0.0.0:8080",
		"00000000000000000000000001000000:0050": "[::1]:80", "B80D01200000000000000000010000FF:0050": "[2001:db8::ff00:1]:80",
		"": "", "0100007F": "", "XX00007F:01BB": "", "0100:01BB": "", "0100007F:1FFFF": "",
	} {
		got, ok := parseProcAddr(in)
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%q: %s, %v", in, got, ok)
		}
	}
}

// TestRealPorts finds this very process as the holder of a port.
func TestRealPorts(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	at := netip.MustParseAddrPort(l.Addr().String())
	h := NewHost("")
	if err := h.Bind("tcp", at); !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("bind of a port that is listened on: %v", err)
	}
	e := &endpoint{"main", "address", "tcp", at}
	if who := h.holder(e, h.sockets()); !who.own || who.pid == 0 || who.comm == "" {
		t.Errorf("holder %+v", who)
	}
	l.Close()
	if err := h.Bind("tcp", at); err != nil {
		t.Errorf("bind of a port that is free: %v", err)
	}
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	uat := netip.MustParseAddrPort(u.LocalAddr().String())
	if err := h.Bind("udp", uat); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("bind of a UDP port that is in use: %v", err)
	}
	if who := h.holder(&endpoint{"wireguard", "", "udp", uat}, h.sockets()); !who.own {
		t.Errorf("holder %+v", who)
	}
}

func TestOfflineGolden(t *testing.T) {
	h := machineOf(t)
	var text bytes.Buffer
	if err := fixed(Run(t.Context(), Offline(setup(t, base), h))).WriteText(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "healthy.txt", text.Bytes())

	// A container on a strange host, half configured.
	noCaps(t, h)
	noAgent(t, h)
	h.remove("sys/module/wireguard")
	h.remove("dev/net/tun")
	h.FS.(fstest.MapFS)["etc/gw/rpc.key"].Mode = 0o644
	h.FileLimit = func() (uint64, uint64, error) { return 1024, 4096, nil }
	h.Space = func(string) (Space, error) { return Space{Free: 1 << 20, Total: 1 << 30, Kind: "overlay"}, nil }
	h.Bind = func(_ string, at netip.AddrPort) error {
		if at.Port() == 443 {
			return unix.EACCES
		}
		return nil
	}
	h.AskResolver = func(_ context.Context, s netip.AddrPort) error { return fmt.Errorf("read udp %s: i/o timeout", s) }
	h.put("proc/sys/net/netfilter/nf_conntrack_count", "262100")
	text.Reset()
	r := fixed(Run(t.Context(), Offline(setup(t, base+"[core.proxy]\nlisten_port = 443\nconect_top_n = 1\nlisten_addr6 = \"::\"\n"), h)))
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "broken.txt", text.Bytes())
	if r.ExitCode() != 2 {
		t.Errorf("exit code %d", r.ExitCode())
	}
}

// Without a configuration the machine is still looked at.
func TestNoConfig(t *testing.T) {
	s := setup(t, "[core.wg]\nip = \"10.0.0.1/24\"\nclient_ip_range = \"10.9.0.0/25\"\nreserved_net = [\"10.8.0.1/32\"]\n")
	if s.Err == nil {
		t.Fatal("the configuration loads")
	}
	r := Run(t.Context(), Offline(s, machineOf(t)))
	c := find(r, "configuration")
	if c.Status != finding.Fail || !strings.Contains(c.Text, "reasons") || c.Table == nil || len(c.Table.Rows) < 2 || r.ExitCode() != 2 {
		t.Errorf("%+v", c)
	}
	if find(r, "clock") == nil || find(r, "data directory") != nil {
		t.Error("the wrong checks are made without a configuration")
	}
}

// The real machine is looked at without a bug of the checks themselves.
func TestRealMachine(t *testing.T) {
	s := setup(t, strings.Replace(base, "/data", t.TempDir(), 1)+"[core.debug]\ninsecure_skip_attestation = true\n")
	r := Run(t.Context(), Offline(s, NewHost("unix:/nonexistent/dstack.sock")))
	for _, c := range r.Checks {
		if strings.Contains(c.Text, "the check itself failed") || c.Text == "" {
			t.Errorf("%+v", c)
		}
	}
	if d := find(r, "data directory"); d.Status == finding.Fail || !strings.Contains(d.Text, "can be written") && !strings.Contains(d.Text, "left") && d.Status != finding.Warn {
		t.Errorf("%+v", d)
	}
	if _, err := NewHost("").AgentInfo(t.Context(), "unix:/nonexistent/dstack.sock"); err == nil {
		t.Error("an agent that is not there answered")
	}
}
