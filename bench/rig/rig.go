package rig

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/bench/cpu"
)

// Side is one of the three namespaces.
type Side string

// Sides.
const (
	Client  Side = "client"
	Gateway Side = "gateway"
	Backend Side = "backend"
)

// Names of the gateway's two links. Whoever wants a "WireGuard interface" takes BackendLink.
const (
	ClientLink  = "gwc"
	BackendLink = "gwb"
)

// Addresses of the rig. BackendAddr is the first one a gateway with the pool Pool hands out.
var (
	ClientAddr  = netip.MustParsePrefix("10.98.0.2/24")
	GatewayAddr = netip.MustParsePrefix("10.98.0.1/24")
	TunnelAddr  = netip.MustParsePrefix("10.99.0.1/16")
	BackendAddr = netip.MustParsePrefix("10.99.0.2/16")
	Pool        = netip.MustParsePrefix("10.99.0.0/16")
)

// Setting is a sysctl of the rig's namespaces.
type Setting struct {
	Name, Value string
	// Wish says that the rig makes do without: the kernel lets a namespace choose its congestion control only among
	// net.ipv4.tcp_allowed_congestion_control of the host, which the bench does not change.
	Wish bool
}

// Sysctls are set in every namespace, the same for all arms. The set-up cases need the first two: a closed connection
// keeps its port for a minute otherwise and a second of load uses the default range up. The others are the kernel's
// own defaults: a host tuned for something else (BBR paces, and costs more CPU) should not change what is compared.
var Sysctls = []Setting{
	{Name: "net.ipv4.ip_local_port_range", Value: "1024 65535"},
	{Name: "net.ipv4.tcp_tw_reuse", Value: "1"},
	{Name: "net.ipv4.tcp_rmem", Value: "4096 131072 6291456"},
	{Name: "net.ipv4.tcp_wmem", Value: "4096 16384 4194304"},
	{Name: "net.ipv4.tcp_congestion_control", Value: "cubic", Wish: true},
}

const (
	prefix = "dgwbench-"
	// netnsDir is where ip(8) keeps named namespaces.
	netnsDir = "/run/netns"
)

// Rig is a set of namespaces and a directory for files.
type Rig struct {
	Dir string // temporary, removed by Close

	name  string
	procs []*Process
}

// Host makes rigs, one after the other or several at once, under names that tell which harness they belong to.
type Host struct {
	Log *slog.Logger
	seq atomic.Int64
}

// owner identifies this process as long as the machine runs: the process id alone may be reused.
func owner() (string, error) {
	p, err := cpu.ReadProcess("/proc", os.Getpid())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s%d-%d", prefix, p.PID, p.Start), nil
}

// TempDir makes a directory that Sweep removes if the harness dies before its owner does.
func (h *Host) TempDir(what string) (string, error) {
	own, err := owner()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", own+"-"+what+"-")
	if err != nil {
		return "", fmt.Errorf("making a directory for %s: %w", what, err)
	}
	return dir, nil
}

// New builds a rig. Errors say what is missing on this machine. The caller must Close it.
func (h *Host) New() (*Rig, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("building network namespaces needs root: run the bench as root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		return nil, errors.New("program ip not found: install the Debian package iproute2")
	}
	own, err := owner()
	if err != nil {
		return nil, err
	}
	seq := fmt.Sprint(h.seq.Add(1))
	r := &Rig{name: own + "-" + seq}
	if r.Dir, err = h.TempDir(seq); err != nil {
		return nil, err
	}
	if err := r.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("building the rig: %w", err), r.Close())
	}
	return r, nil
}

func (r *Rig) netns(s Side) string { return r.name + "-" + string(s) }

func (r *Rig) build() error {
	for _, s := range []Side{Client, Gateway, Backend} {
		if err := ip("", "netns", "add", r.netns(s)); err != nil {
			return err
		}
	}
	g := []string{
		"link set lo up",
		"link add " + ClientLink + " type veth peer name eth0 netns " + r.netns(Client),
		"link add " + BackendLink + " type veth peer name eth0 netns " + r.netns(Backend),
		"addr add " + GatewayAddr.String() + " dev " + ClientLink,
		"addr add " + TunnelAddr.Addr().String() + "/32 dev " + BackendLink,
		"link set " + ClientLink + " up",
		"link set " + BackendLink + " up",
		// A WireGuard interface has no neighbours. With the pool on the link each of 10,000
		// instances would be one, and the kernel keeps 1,024.
		"route add " + BackendAddr.Addr().String() + "/32 dev " + BackendLink,
		"route add " + Pool.String() + " via " + BackendAddr.Addr().String() + " dev " + BackendLink,
	}
	c := []string{
		"link set lo up",
		"addr add " + ClientAddr.String() + " dev eth0",
		"link set eth0 up",
		"route add default via " + GatewayAddr.Addr().String(),
	}
	b := []string{
		"link set lo up",
		"addr add " + BackendAddr.String() + " dev eth0",
		"link set eth0 up",
		"route add default via " + TunnelAddr.Addr().String(),
	}
	// All of the pool from the backend's address on belongs to the backend, so that a newly registered instance
	// answers: one prefix for each power of two, which leaves out the gateway's own address.
	for i := 1; i < 16; i++ {
		b = append(b, fmt.Sprintf("route add local 10.99.%d.%d/%d dev lo", 1<<i>>8, 1<<i&0xff, 32-i))
	}
	for _, x := range []struct {
		side  Side
		batch []string
	}{{Gateway, g}, {Client, c}, {Backend, b}} {
		if err := ip(strings.Join(x.batch, "\n")+"\n", "-n", r.netns(x.side), "-batch", "-"); err != nil {
			return err
		}
		err := r.In(x.side, func() error {
			if x.side == Gateway {
				if err := setSysctl("net.ipv4.ip_forward", "1"); err != nil {
					return err
				}
			}
			for _, s := range Sysctls {
				if err := setSysctl(s.Name, s.Value); err != nil && !s.Wish {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func setSysctl(name, value string) error {
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("setting %s to %q: %w", name, value, err)
	}
	return nil
}

// Sysctl reads a setting of one side, with blanks folded.
func (r *Rig) Sysctl(s Side, name string) (string, error) {
	var text []byte
	err := r.In(s, func() (err error) {
		text, err = os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("reading %s of the %s: %w", name, s, err)
	}
	return strings.Join(strings.Fields(string(text)), " "), nil
}

// Tracked returns the number of connection tracking entries of one side.
func (r *Rig) Tracked(s Side) (int, error) {
	text, err := r.Sysctl(s, "net.netfilter.nf_conntrack_count")
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // the kernel has no connection tracking
	}
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

// ip runs ip(8) with stdin and returns its complaint as the error.
func ip(stdin string, args ...string) error {
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// In runs f on a thread inside one side's network namespace. The thread ends with f.
func (r *Rig) In(s Side, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread must not serve others in that namespace
		done <- func() error {
			ns, err := os.Open(filepath.Join(netnsDir, r.netns(s)))
			if err != nil {
				return fmt.Errorf("entering the namespace of the %s: %w", s, err)
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("entering the namespace of the %s: %w", s, err)
			}
			return f()
		}()
	}()
	return <-done
}

// Dial connects to addr (host:port, numeric) from one side.
func (r *Rig) Dial(s Side, addr string) (net.Conn, error) {
	var c net.Conn
	err := r.In(s, func() (err error) {
		c, err = net.DialTimeout("tcp4", addr, 5*time.Second)
		return err
	})
	return c, err
}

// Listening reports whether something listens on TCP port p of one side.
func (r *Rig) Listening(s Side, p uint16) (bool, error) {
	found := false
	err := r.In(s, func() error {
		for _, file := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("listing sockets: %w", err)
			}
			found = found || listens(string(b), p)
		}
		return nil
	})
	return found, err
}

// listens looks for a socket in state LISTEN (0A) with local port p in the text of /proc/net/tcp or tcp6.
func listens(text string, p uint16) bool {
	want := fmt.Sprintf(":%04X", p)
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 3 && f[3] == "0A" && strings.HasSuffix(f[1], want) {
			return true
		}
	}
	return false
}

// Close stops all programs and removes namespaces and files.
func (r *Rig) Close() error {
	var errs []error
	var wg sync.WaitGroup
	for _, p := range r.procs {
		wg.Go(func() { p.Stop() })
	}
	wg.Wait()
	for _, s := range []Side{Client, Gateway, Backend} {
		if _, err := os.Lstat(filepath.Join(netnsDir, r.netns(s))); err == nil {
			errs = append(errs, ip("", "netns", "del", r.netns(s)))
		}
	}
	errs = append(errs, os.RemoveAll(r.Dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("removing the rig: %w", err)
	}
	return nil
}

// Sweep removes namespaces, programs and files of harnesses that no longer run, and says so in the log.
func (h *Host) Sweep() error {
	var errs []error
	for _, dir := range []string{netnsDir, os.TempDir()} {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("looking for leftovers: %w", err)
		}
		for _, e := range entries {
			if !abandoned(e.Name()) {
				continue
			}
			path := filepath.Join(dir, e.Name())
			h.Log.Warn("removing what a dead run of the bench left behind", "path", path)
			if dir != netnsDir {
				errs = append(errs, os.RemoveAll(path))
				continue
			}
			errs = append(errs, killInside(e.Name()), ip("", "netns", "del", e.Name()))
		}
	}
	return errors.Join(errs...)
}

// abandoned reports whether name belongs to a harness that has ended.
func abandoned(name string) bool {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return false
	}
	f := strings.SplitN(rest, "-", 3)
	if len(f) < 3 {
		return false
	}
	pid, err1 := strconv.Atoi(f[0])
	start, err2 := strconv.ParseUint(f[1], 10, 64)
	if err1 != nil || err2 != nil {
		return false
	}
	p, err := cpu.ReadProcess("/proc", pid)
	return errors.Is(err, fs.ErrNotExist) || err == nil && p.Start != start
}

// killInside ends the processes in a namespace.
func killInside(netns string) error {
	out, err := exec.Command("ip", "netns", "pids", netns).Output()
	if err != nil {
		return fmt.Errorf("listing processes in %s: %w", netns, err)
	}
	for _, f := range strings.Fields(string(out)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return fmt.Errorf("listing processes in %s: %q", netns, f)
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("ending process %d in %s: %w", pid, netns, err)
		}
	}
	return nil
}
