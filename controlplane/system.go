package controlplane

import (
	"fmt"
	"log/slog"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

// raiseFileLimit lifts the soft descriptor limit to the hard one: two descriptors a
// connection add up.
func raiseFileLimit(log *slog.Logger) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Cur == l.Max {
		return
	}
	old := l.Cur
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		log.Warn("the descriptor limit could not be raised", "soft", old, "hard", l.Max, "error", err)
		return
	}
	log.Info("raised the descriptor limit", "from", old, "to", l.Max)
}

// probeKTLS asks the kernel for the TLS upper layer protocol on a loopback connection.
func probeKTLS() error {
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
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) { optErr = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_ULP, "tls") }); err != nil {
		return err
	}
	if optErr != nil {
		return fmt.Errorf("the kernel has no TLS ULP (module tls): %w", optErr)
	}
	return nil
}

// spliceGate turns [core.proxy.tcp_splice] into the data plane's form. Without the
// table each direction decides by its traffic.
func spliceGate(p *config.Proxy) relay.Gate {
	if !p.TCPSplice.Enabled {
		return relay.Gate{Auto: true}
	}
	var g relay.Gate
	if b := p.TCPSplice.AfterBytes; b != nil {
		g.AfterBytes = *b
	}
	if d := p.TCPSplice.AfterDuration; d != nil {
		g.AfterDuration = int64(d.Std())
	}
	return g
}
