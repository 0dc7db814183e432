package doctor

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// endpoint is an address that the gateway wants to have.
type endpoint struct {
	name    string // of the server
	key     string // of the configuration
	network string // tcp, udp
	at      netip.AddrPort
}

// endpoints are all addresses of cfg, and the paths of its unix sockets.
func endpoints(cfg *config.Config) (list []endpoint, sockets []string) {
	c := &cfg.Core
	server := func(name, key string, a config.Address) {
		switch {
		case a.IsZero():
		case a.IsUnix():
			_, p := a.Listen()
			sockets = append(sockets, p)
		default:
			list = append(list, endpoint{name, key, "tcp", a.AddrPort()})
		}
	}
	server("main", "address", cfg.Server.Address)
	if c.Admin.Enabled {
		server("admin", "core.admin.address", c.Admin.Server.Address)
	}
	if c.Debug.InsecureEnableDebugRPC {
		server("debug", "core.debug.address", c.Debug.Server.Address)
	}
	server("metrics", "core.metrics.addr", c.Metrics.Addr)
	for port := range c.Proxy.ListenPort.All() {
		if c.Proxy.ListenAddr.IsValid() {
			list = append(list, endpoint{"proxy", "core.proxy.listen_port", "tcp", netip.AddrPortFrom(c.Proxy.ListenAddr, port)})
		}
		if c.Proxy.ListenAddr6.IsValid() {
			list = append(list, endpoint{"proxy", "core.proxy.listen_port", "tcp", netip.AddrPortFrom(c.Proxy.ListenAddr6, port)})
		}
	}
	if c.WG.Mode != config.WGNone {
		list = append(list, endpoint{"wireguard", "core.wg.listen_port", "udp", netip.AddrPortFrom(netip.IPv4Unspecified(), c.WG.ListenPort)})
	}
	return list, sockets
}

// checkPorts tries every address of the configuration. running tells that a gateway
// answered at the control socket.
func (h *Host) checkPorts(cfg *config.Config, running bool) Result {
	want, sockets := endpoints(cfg)
	r := Result{Status: finding.OK, Table: &finding.Table{Columns: []string{"server", "address", "state"}}}
	var hints []string
	held, strange, bad := 0, 0, 0
	note := func(e *endpoint, s finding.Status, state, hint string) {
		r.Status = finding.Worst(r.Status, s)
		if len(r.Table.Rows) < 20 {
			r.Table.Add(e.name, e.at.String()+"/"+e.network, state)
		}
		if s == finding.Fail {
			bad++
		}
		if hint != "" && !slices.Contains(hints, hint) {
			hints = append(hints, hint)
		}
	}
	var socks []socket
	for i := range want {
		e := &want[i]
		err := h.Bind(e.network, e.at)
		switch {
		case err == nil:
		case errors.Is(err, unix.EADDRINUSE):
			if e.network == "udp" && h.exists("/sys/class/net/"+cfg.Core.WG.Interface) {
				if running {
					held++
				}
				continue // by the interface, which is adopted
			}
			if socks == nil {
				socks = h.sockets()
			}
			who := h.holder(e, socks)
			if who.own && running {
				held++
				continue
			}
			if who.own {
				strange++
				note(e, finding.Warn, "held by "+who.String(), "it runs with another data_dir, is still starting, or hangs: look at "+who.String()+" and its log")
				continue
			}
			note(e, finding.Fail, "held by "+who.String(), fmt.Sprintf("stop %s or change %s", who.String(), e.key))
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			note(e, finding.Fail, "forbidden: "+err.Error(), fmt.Sprintf("ports below %s need CAP_NET_BIND_SERVICE: grant it, or lower net.ipv4.ip_unprivileged_port_start", h.firstUnprivileged()))
		case errors.Is(err, unix.EADDRNOTAVAIL):
			note(e, finding.Fail, "this machine does not have the address", fmt.Sprintf("correct %s, or use 0.0.0.0", strings.TrimSuffix(e.key, "_port")))
		case errors.Is(err, unix.EAFNOSUPPORT):
			note(e, finding.Fail, "this machine has no IPv6", "clear core.proxy.listen_addr6, or enable IPv6")
		default:
			note(e, finding.Fail, err.Error(), "see whether the address makes sense")
		}
	}
	for _, s := range sockets {
		dir := filepath.Dir(h.abs(s))
		if !h.exists(dir) {
			r.Status = finding.Fail
			bad++
			r.Table.Add("unix socket", s, "its directory is missing")
			hints = append(hints, "mkdir -p "+dir)
		}
	}
	r.Hints = hints
	total := len(want) + len(sockets)
	switch {
	case bad > 0:
		r.Text = fmt.Sprintf("%d of %d addresses cannot be bound", bad, total)
	case strange > 0:
		r.Text = fmt.Sprintf("%d of %d addresses are held by a dstack-gw that does not answer at the control socket", strange, total)
	case held == total:
		r.Text = fmt.Sprintf("all %d addresses are held by the running gateway", total)
	case held > 0:
		r.Text = fmt.Sprintf("%d of %d addresses are held by the running gateway, the rest is free", held, total)
	default:
		r.Text = fmt.Sprintf("all %d addresses are free", total)
	}
	if len(r.Table.Rows) == 0 {
		r.Table = nil
	}
	return r
}

func (h *Host) firstUnprivileged() string {
	n, err := h.number("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		return "1024"
	}
	return strconv.FormatUint(n, 10)
}

// socket is one line of /proc/net/tcp and its like.
type socket struct {
	network string
	at      netip.AddrPort
	inode   string
}

// sockets lists the listening TCP and bound UDP sockets of this network namespace.
func (h *Host) sockets() []socket {
	var all []socket
	for _, f := range []string{"tcp", "tcp6", "udp", "udp6"} {
		b, err := h.read("/proc/net/" + f)
		if err != nil {
			continue // no IPv6, most likely; the holder is then not found
		}
		all = append(all, parseSockets(string(b), strings.TrimSuffix(f, "6"))...)
	}
	return all
}

// parseSockets reads the columns local_address, st and inode (proc_net_tcp(5)).
func parseSockets(text, network string) []socket {
	const listening = "0A"
	var all []socket
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 10 || network == "tcp" && f[3] != listening {
			continue
		}
		at, ok := parseProcAddr(f[1])
		if !ok {
			continue
		}
		all = append(all, socket{network, at, f[9]})
	}
	return all
}

// parseProcAddr reads "0100007F:01BB": 32-bit words in the machine's order, which is
// little-endian wherever this runs.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	p, err := strconv.ParseUint(port, 16, 16)
	raw, err2 := hex.DecodeString(host)
	if !ok || err != nil || err2 != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.BigEndian.PutUint32(raw[i:], binary.LittleEndian.Uint32(raw[i:]))
	}
	addr, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr, uint16(p)), true
}

// process is who holds a socket.
type process struct {
	pid  int
	comm string
	own  bool // runs the program that this is
}

func (p process) String() string {
	switch {
	case p.pid == 0:
		return "another process (run as root to see which)"
	case p.comm == "":
		return fmt.Sprintf("pid %d", p.pid)
	}
	return fmt.Sprintf("%s (pid %d)", p.comm, p.pid)
}

// holder finds the process that keeps e from being bound.
func (h *Host) holder(e *endpoint, all []socket) process {
	inodes := map[string]bool{}
	for _, s := range all {
		if s.network == e.network && s.at.Port() == e.at.Port() &&
			(s.at.Addr() == e.at.Addr() || s.at.Addr().IsUnspecified() || e.at.Addr().IsUnspecified()) {
			inodes["socket:["+s.inode+"]"] = true
		}
	}
	if len(inodes) == 0 {
		return process{}
	}
	self := h.exe("self")
	procs, err := fs.ReadDir(h.FS, "proc")
	if err != nil {
		return process{}
	}
	for _, d := range procs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		dir := path.Join("proc", d.Name(), "fd")
		fds, err := fs.ReadDir(h.FS, dir)
		if err != nil {
			continue // gone, or not ours to see
		}
		for _, fd := range fds {
			to, err := fs.ReadLink(h.FS, path.Join(dir, fd.Name()))
			if err != nil || !inodes[to] {
				continue
			}
			comm, _ := h.read("/proc/" + d.Name() + "/comm") // without it the pid has to do
			exe := h.exe(d.Name())
			return process{pid: pid, comm: strings.TrimSpace(string(comm)), own: exe != "" && exe == self}
		}
	}
	return process{}
}

// exe is the program of a process, also after it was replaced on disk by a newer one.
func (h *Host) exe(pid string) string {
	to, err := fs.ReadLink(h.FS, path.Join("proc", pid, "exe"))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(to, " (deleted)")
}
