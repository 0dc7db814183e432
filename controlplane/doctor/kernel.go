package doctor

import (
	"fmt"
	"math"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// backlog is what the proxy's listeners ask for (gateway spec 5.7).
const backlog = 4096

// earliest is before this release was made; a clock that is behind it is wrong.
var earliest = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (h *Host) checkClock() Result {
	now := h.Now()
	if now.Before(earliest) {
		return fail("set the clock and start a time service", "the clock says %s, which is in the past: certificates would count as not yet valid", now.UTC().Format(time.RFC3339))
	}
	synced, err := h.ClockSynced()
	switch {
	case err != nil:
		return warn("see whether a time service runs", "whether the clock is synchronised cannot be found out: %v", err)
	case !synced:
		return warn("start chrony or systemd-timesyncd (in a virtual machine that of the host may do); certificates and attestation depend on the time",
			"the kernel does not think that the clock is synchronised; it says %s", now.UTC().Format(time.RFC3339))
	}
	return ok("synchronised")
}

// checkFileLimit computes as ops spec 6.4 does: two descriptors a connection, four
// more for the pipes where splice is asked for, and some for everything else.
func (h *Host) checkFileLimit(cfg *config.Config) Result {
	soft, hard, err := h.FileLimit()
	if err != nil {
		return warn("see ulimit -n", "the limit on open files cannot be read: %v", err)
	}
	per := uint64(2)
	if cfg.Core.Proxy.TCPSplice.Enabled {
		per += 4
	}
	target := cfg.Core.Tuning.TargetConnections
	need := (target*per + 64*uint64(cfg.Core.Proxy.Workers) + 8192 + 65535) / 65536 * 65536
	limit := hard
	if !cfg.Core.SetUlimit {
		limit = soft
	}
	r := ok("%s, enough for %d connections", limitText(limit), target)
	r.Details = map[string]string{"soft": limitText(soft), "hard": limitText(hard), "needed": fmt.Sprintf("%d for core.tuning.target_connections = %d", need, target)}
	nrOpen, err := h.number("/proc/sys/fs/nr_open")
	if err == nil {
		r.Details["fs.nr_open"] = strconv.FormatUint(nrOpen, 10)
	}
	if limit < need {
		r.Status = finding.Fail
		r.Text = fmt.Sprintf("the limit is %s, %d connections need %d: more than about %d are refused", limitText(limit), target, need, (limit-min(limit, 512))/per)
		r.Hints = []string{fmt.Sprintf("set LimitNOFILE=%d in the systemd unit (docker run --ulimit nofile=%d), or lower core.tuning.target_connections to what is expected", need, need)}
		if err == nil && nrOpen < need {
			r.Hints = append(r.Hints, fmt.Sprintf("sysctl -w fs.nr_open=%d, which bounds that limit", need))
		}
		if !cfg.Core.SetUlimit && hard >= need {
			r.Hints = []string{"set core.set_ulimit = true: the hard limit would do"}
		}
	}
	return r
}

func limitText(n uint64) string {
	if n == math.MaxUint64 {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}

func (h *Host) checkBacklog() Result {
	n, err := h.number("/proc/sys/net/core/somaxconn")
	switch {
	case err != nil:
		return skip("not known: %v", err)
	case n < backlog:
		return warn(fmt.Sprintf("sysctl -w net.core.somaxconn=%d, before the gateway starts", backlog), "net.core.somaxconn is %d and cuts the accept queues of the proxy, which ask for %d: bursts of clients stall", n, backlog)
	}
	return ok("net.core.somaxconn is %d, the proxy asks for %d", n, backlog)
}

func (h *Host) checkConntrack() Result {
	const dir = "/proc/sys/net/netfilter/"
	most, err := h.number(dir + "nf_conntrack_max")
	if err != nil {
		return ok("connections are not tracked in this network namespace")
	}
	count, err := h.number(dir + "nf_conntrack_count")
	if err != nil || most == 0 {
		return skip("the fill of the table is not known: %v", err)
	}
	percent := count * 100 / most
	r := ok("the table is %d %% full (%d of %d)", percent, count, most)
	hint := fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d (and a quarter of it as buckets), or exempt the gateway's flows with notrack rules", most*4)
	switch {
	case count*100 >= most*95:
		r = fail(hint, "the table is %d %% full (%d of %d): new connections are dropped or about to be", percent, count, most)
	case count*100 >= most*80:
		r = warn(hint, "the table is %d %% full (%d of %d)", percent, count, most)
	case most < 65536:
		r = warn(hint, "the table holds %d entries only; every proxied connection takes two, for minutes after its end", most)
	}
	return r
}

func (h *Host) checkPipes(cfg *config.Config) Result {
	const file = "/proc/sys/fs/pipe-user-pages-soft"
	n, err := h.number(file)
	if err != nil {
		return skip("not known: %v", err)
	}
	caps, capErr := h.capabilities()
	switch {
	case n == 0:
		return ok("fs.pipe-user-pages-soft is 0: no limit")
	case capErr == nil && (caps.has(unix.CAP_SYS_RESOURCE) || caps.has(unix.CAP_SYS_ADMIN)):
		return ok("fs.pipe-user-pages-soft does not apply to this process")
	}
	// Each spliced connection has two pipes, of 16 pages by default.
	conns := n / 32
	text := fmt.Sprintf("fs.pipe-user-pages-soft is %d pages: after about %d connections in splice mode new pipes get one page each, and throughput drops", n, conns)
	if !cfg.Core.Proxy.TCPSplice.Enabled {
		r := ok("%s; only connections that move much data get there", text)
		r.Hints = []string{"sysctl -w fs.pipe-user-pages-soft=0, or CAP_SYS_RESOURCE, if they are many"}
		return r
	}
	return warn("sysctl -w fs.pipe-user-pages-soft=0, or grant CAP_SYS_RESOURCE", "%s", text)
}

func (h *Host) checkTLSULP(cfg *config.Config) Result {
	err := h.TLSULP()
	want := cfg.Core.Proxy.KTLS.Enabled
	switch {
	case err == nil && want:
		return ok("core.proxy.ktls is set and the kernel has the TLS ULP")
	case err == nil:
		return ok("the kernel has the TLS ULP (core.proxy.ktls is not set)")
	case want:
		return warn("modprobe tls, or remove [core.proxy.ktls]", "core.proxy.ktls is set, but the kernel has no TLS ULP (%v): TLS stays in user space", err)
	}
	return ok("the kernel has no TLS ULP, which core.proxy.ktls would need; it is not set")
}

func (h *Host) checkIPv6(cfg *config.Config) Result {
	const file = "/proc/sys/net/ipv6/conf/all/disable_ipv6"
	n, err := h.number(file)
	want := cfg.Core.Proxy.ListenAddr6
	switch {
	case err == nil && n == 0 && want.IsValid():
		return ok("available, and core.proxy.listen_addr6 is %s", want)
	case err == nil && n == 0:
		return ok("available, not used (core.proxy.listen_addr6 is empty)")
	case want.IsValid():
		cause := "disable_ipv6 is set"
		if err != nil {
			cause = "the kernel has none here"
		}
		return fail("sysctl -w net.ipv6.conf.all.disable_ipv6=0, or clear core.proxy.listen_addr6", "core.proxy.listen_addr6 is %s, but this network namespace has no IPv6: %s", want, cause)
	}
	return ok("not available, and not configured")
}

// capSet is a set of Linux capabilities.
type capSet uint64

func (c capSet) has(n int) bool { return c&(1<<n) != 0 }

// capabilities are those that this process can use.
func (h *Host) capabilities() (capSet, error) {
	b, err := h.read("/proc/self/status")
	if err != nil {
		return 0, fmt.Errorf("read /proc/self/status: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err != nil {
				return 0, fmt.Errorf("read /proc/self/status: %q is no capability set", strings.TrimSpace(v))
			}
			return capSet(n), nil
		}
	}
	return 0, fmt.Errorf("read /proc/self/status: it has no line CapEff")
}

func (h *Host) checkCapabilities(cfg *config.Config) Result {
	caps, err := h.capabilities()
	if err != nil {
		return skip("not known: %v", err)
	}
	r := ok("")
	var have, miss []string
	need := func(n int, name, why string) {
		if caps.has(n) {
			have = append(have, name)
			return
		}
		miss = append(miss, fmt.Sprintf("%s is missing: %s", name, why))
		r.Status = finding.Fail
	}
	if cfg.Core.WG.Mode != config.WGNone {
		need(unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "the WireGuard interface cannot be set up")
	}
	if low := lowPort(cfg, h); low != 0 {
		need(unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE", fmt.Sprintf("port %d cannot be bound", low))
	}
	r.Text = "those needed are held: " + strings.Join(have, ", ")
	if len(have) == 0 {
		r.Text = "none is needed"
	}
	if len(miss) > 0 {
		r.Text = strings.Join(miss, "; ")
		r.Hints = []string{"run as root, or grant it: AmbientCapabilities= in the systemd unit, docker run --cap-add, setcap"}
	}
	bpf := "held"
	if !caps.has(unix.CAP_BPF) && !caps.has(unix.CAP_SYS_ADMIN) {
		bpf = "not held: acceleration by eBPF is not possible"
	}
	r.Details = map[string]string{"CAP_BPF": bpf}
	return r
}

// lowPort is the first configured port that needs a privilege, 0 if there is none.
func lowPort(cfg *config.Config, h *Host) uint16 {
	first, err := strconv.ParseUint(h.firstUnprivileged(), 10, 16)
	if err != nil {
		first = 1024
	}
	list, _ := endpoints(cfg)
	for _, e := range list {
		if uint64(e.at.Port()) < first && e.at.Port() != 0 {
			return e.at.Port()
		}
	}
	return 0
}

// checkWireGuard finds out what would run the tunnels.
func (h *Host) checkWireGuard(cfg *config.Config) Result {
	w := &cfg.Core.WG
	if w.Mode == config.WGNone {
		return skip("core.wg.mode is none: the gateway has no tunnels of its own")
	}
	dir := "/sys/class/net/" + w.Interface
	if h.exists(dir) {
		b, _ := h.read(dir + "/uevent") // hardware has none of interest
		switch {
		case strings.Contains(string(b), "DEVTYPE=wireguard"):
			return ok("%s exists and is WireGuard", w.Interface)
		case h.exists(dir + "/tun_flags"):
			return ok("%s exists and is a TUN interface: WireGuard in user space", w.Interface)
		}
		return fail(fmt.Sprintf("ip link delete %s, so that the gateway makes its own, or set core.wg.interface", w.Interface),
			"%s exists and is not WireGuard: peers cannot be set, so no app can be reached", w.Interface)
	}
	kernel := h.kernelWireGuard()
	tun := h.exists("/dev/net/tun")
	state := func(b bool, yes, no string) string {
		if b {
			return yes
		}
		return no
	}
	var r Result
	switch {
	case w.Mode == config.WGUserspace && tun:
		r = ok("user space, as core.wg.mode demands, on /dev/net/tun")
	case w.Mode == config.WGUserspace:
		r = fail("modprobe tun; docker run --device /dev/net/tun", "core.wg.mode is userspace and there is no /dev/net/tun")
	case kernel != "":
		r = ok("the kernel's WireGuard (%s)", kernel)
	case w.Mode == config.WGKernel:
		r = fail("modprobe wireguard (Linux 5.6 or the module), or set core.wg.mode = \"auto\"", "core.wg.mode is kernel and no WireGuard module is loaded or found")
	case tun:
		r = warn("modprobe wireguard, which is several times faster", "no WireGuard module is loaded or found; the gateway will run WireGuard in user space on /dev/net/tun")
	default:
		r = fail("modprobe wireguard or tun; in a container: load the module on the host, or docker run --device /dev/net/tun", "there is neither a WireGuard module nor /dev/net/tun, so there can be no tunnels")
	}
	r.Details = map[string]string{"kernel module": state(kernel != "", kernel, "not found"), "/dev/net/tun": state(tun, "there", "missing"), "interface": w.Interface + ", not there yet"}
	return r
}

// kernelWireGuard says where the kernel has WireGuard, "" if it is not found. A
// kernel may have it and not show it: containers see no module directory.
func (h *Host) kernelWireGuard() string {
	if h.exists("/sys/module/wireguard") {
		return "loaded"
	}
	release, err := h.read("/proc/sys/kernel/osrelease")
	if err != nil {
		return ""
	}
	dir := path.Join("/lib/modules", strings.TrimSpace(string(release)))
	for file, how := range map[string]string{"modules.builtin": "built in", "modules.dep": "to be loaded"} {
		if b, err := h.read(path.Join(dir, file)); err == nil && strings.Contains(string(b), "/wireguard.ko") {
			return how
		}
	}
	return ""
}

const (
	minFree   = 64 << 20 // below it the store is not written
	goodFree  = 1 << 30
	minInodes = 1000
)

func (h *Host) checkDataDir(dir string) Result {
	at := h.abs(dir)
	info, err := h.stat(at)
	if err != nil {
		// The gateway makes it; what counts is where.
		parent := at
		for parent != "/" && !h.exists(parent) {
			parent = path.Dir(parent)
		}
		if werr := h.TryWrite(parent); werr != nil {
			return fail(fmt.Sprintf("mkdir -p %s and give it to the gateway's user, or set core.sync.data_dir", at), "%s does not exist and cannot be made in %s: %v", at, parent, werr)
		}
		return ok("%s does not exist yet; it will be made", at)
	}
	if !info.IsDir() {
		return fail("move it away, or set core.sync.data_dir", "%s is not a directory", at)
	}
	if err := h.TryWrite(at); err != nil {
		return fail("give it to the gateway's user; if the file system is read-only or full, see dmesg and df", "%s cannot be written, so registrations and certificates would not survive a restart: %v", at, err)
	}
	s, err := h.Space(at)
	if err != nil {
		return warn("see df "+at, "the free space of %s is not known: %v", at, err)
	}
	r := ok("%s can be written and has %s free", at, bytesText(s.Free))
	r.Details = map[string]string{"free": fmt.Sprintf("%s of %s", bytesText(s.Free), bytesText(s.Total))}
	grow := "make room on the file system of " + at
	switch {
	case s.Free < minFree:
		r = fail(grow, "%s has only %s left: below %s the store stops writing and registrations go to a journal", at, bytesText(s.Free), bytesText(minFree))
	case s.TotalInodes > 0 && s.FreeInodes < minInodes:
		r = fail(grow+": delete many small files", "%s has %d inodes left", at, s.FreeInodes)
	case s.Kind == "tmpfs":
		r = warn("put core.sync.data_dir on a disk", "%s is in memory (tmpfs): registrations, certificates and the ACME account are lost with a reboot", at)
	case s.Kind == "overlay":
		r = warn("mount a volume at "+at, "%s is in the writable layer of a container: registrations, certificates and the ACME account are lost with it", at)
	case s.Free < goodFree || s.Free < s.Total/20:
		r = warn(grow, "%s has %s of %s left", at, bytesText(s.Free), bytesText(s.Total))
	}
	if m := info.Mode().Perm(); m&0o007 != 0 && r.Status == finding.OK {
		r.Status = finding.Warn
		r.Text += fmt.Sprintf("; its mode is %04o, so other users can look into it", m)
		r.Hints = []string{"chmod 700 " + at}
	}
	return r
}

func bytesText(n uint64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
