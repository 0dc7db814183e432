package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/controlplane/agent"
)

// Host is the machine that checks look at. NewHost gives the real one.
type Host struct {
	// FS is the file system from "/": files that the configuration names, /proc and /sys.
	FS fs.FS
	// WorkDir is what relative paths are relative to.
	WorkDir string
	Now     func() time.Time
	Dial    func(ctx context.Context, network, address string) (net.Conn, error)
	// Bind tries to bind a "tcp" or "udp" address and lets go of it, without listening.
	Bind func(network string, at netip.AddrPort) error
	// FileLimit returns the limits of this process on open files.
	FileLimit func() (soft, hard uint64, err error)
	// Space describes the file system that holds a directory.
	Space func(dir string) (Space, error)
	// TryWrite creates and removes a file in a directory.
	TryWrite func(dir string) error
	// TLSULP asks the kernel for TLS as an upper layer protocol.
	TLSULP func() error
	// ClockSynced tells whether the kernel believes that its clock is synchronised.
	ClockSynced func() (bool, error)
	// AskResolver sends a query that every recursive resolver can answer.
	AskResolver func(ctx context.Context, server netip.AddrPort) error
	// AgentInfo asks the guest agent at an address for the app id of this CVM.
	AgentInfo func(ctx context.Context, address string) (appID []byte, err error)
	// AgentAddress is where the guest agent is (agent.Address).
	AgentAddress string
}

// Space is a file system's size.
type Space struct {
	Free, Total             uint64 // bytes, for this user
	FreeInodes, TotalInodes uint64 // 0 of 0 where there is no such limit
	// Kind is "tmpfs", "overlay" or empty.
	Kind string
}

// NewHost returns the machine that the process runs on. agentAddress is that of the
// guest agent (agent.Address).
func NewHost(agentAddress string) *Host {
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	return &Host{
		FS: os.DirFS("/"), WorkDir: dir, Now: time.Now, Dial: new(net.Dialer).DialContext, Bind: bind, FileLimit: fileLimit, Space: space, TryWrite: tryWrite,
		TLSULP: tlsULP, ClockSynced: clockSynced, AskResolver: askResolver, AgentInfo: agentInfo, AgentAddress: agentAddress,
	}
}

// abs makes a path of the configuration absolute.
func (h *Host) abs(path string) string {
	if !filepath.IsAbs(path) {
		path = filepath.Join(h.WorkDir, path)
	}
	return filepath.Clean(path)
}

// in turns a path into one of FS.
func (h *Host) in(path string) string {
	if p := strings.TrimPrefix(h.abs(path), "/"); p != "" {
		return p
	}
	return "."
}

func (h *Host) read(path string) ([]byte, error) {
	b, err := fs.ReadFile(h.FS, h.in(path))
	return b, plain(err)
}

func (h *Host) stat(path string) (fs.FileInfo, error) {
	i, err := fs.Stat(h.FS, h.in(path))
	return i, plain(err)
}

func (h *Host) exists(path string) bool {
	_, err := h.stat(path)
	return err == nil
}

// plain strips the path of FS from an error: the caller names the real one.
func plain(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

// number reads a file with one number, such as those below /proc/sys.
func (h *Host) number(path string) (uint64, error) {
	b, err := h.read(path)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %q is not a number", path, strings.TrimSpace(string(b)))
	}
	return n, nil
}

// ---- the real machine ----

func bind(network string, at netip.AddrPort) error {
	fam, typ := unix.AF_INET, unix.SOCK_STREAM
	if at.Addr().Is6() {
		fam = unix.AF_INET6
	}
	if network == "udp" {
		typ = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(fam, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if network == "tcp" {
		// As the gateway's listeners: a port in TIME_WAIT is free, one that is listened on is not.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(at.Port()), Addr: [4]byte{}}
	if at.Addr().Is6() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		sa = &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	} else {
		sa.(*unix.SockaddrInet4).Addr = at.Addr().As4()
	}
	return os.NewSyscallError("bind", unix.Bind(fd, sa))
}

func fileLimit() (soft, hard uint64, err error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, 0, os.NewSyscallError("getrlimit", err)
	}
	return l.Cur, l.Max, nil
}

func space(dir string) (Space, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return Space{}, os.NewSyscallError("statfs", err)
	}
	out := Space{Free: s.Bavail * uint64(s.Bsize), Total: s.Blocks * uint64(s.Bsize), FreeInodes: s.Ffree, TotalInodes: s.Files}
	switch int64(s.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		out.Kind = "tmpfs"
	case unix.OVERLAYFS_SUPER_MAGIC:
		out.Kind = "overlay"
	}
	return out, nil
}

func tryWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err != nil {
		return plain(err)
	}
	_, err = f.Write(make([]byte, 4096)) // an empty file needs no space
	if err == nil {
		err = f.Sync()
	}
	return plain(errors.Join(err, f.Close(), os.Remove(f.Name())))
}

func tlsULP() error {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var opt error
	if err := raw.Control(func(fd uintptr) { opt = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_ULP, "tls") }); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt TCP_ULP", opt)
}

func clockSynced() (bool, error) {
	var t unix.Timex // no mode: only read
	if _, err := unix.Adjtimex(&t); err != nil {
		return false, os.NewSyscallError("adjtimex", err)
	}
	return t.Status&unix.STA_UNSYNC == 0, nil
}

// askResolver asks for the name servers of the root: whoever recurses knows them. A
// resolver of a closed network may say that there are none; that is an answer too.
func askResolver(ctx context.Context, server netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c := &dns.Client{Net: "udp", Timeout: 2 * time.Second}
	m, _, err := c.ExchangeContext(ctx, new(dns.Msg).SetQuestion(".", dns.TypeNS), server.String())
	if err != nil {
		return err
	}
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return fmt.Errorf("it answers %s", dns.RcodeToString[m.Rcode])
	}
	if !m.RecursionAvailable {
		return errors.New("it does not recurse")
	}
	return nil
}

func agentInfo(ctx context.Context, address string) ([]byte, error) {
	c, err := agent.New(address, nil)
	if err != nil {
		return nil, err
	}
	defer c.CloseIdleConnections()
	info, err := c.Info(ctx)
	if err != nil {
		return nil, err
	}
	return info.GetAppId(), nil
}
