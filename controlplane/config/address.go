package config

import (
	"fmt"
	"net/netip"
	"strings"
)

// defaultPort is what upstream's HTTP framework listens on when neither address nor port names one.
const defaultPort = 8000

// Address is where a server listens: an IP address with a port, or the path of a unix socket (gateway spec 1.3).
// The zero Address is no address.
type Address struct {
	addrPort netip.AddrPort
	hasPort  bool
	path     string
}

// ParseAddress reads "ip", "ip:port", "tcp:ip", "tcp:ip:port" or "unix:/path". IPv6 with a port is written "[::1]:8000".
// Host names are refused: which address they mean is not decided at start.
func ParseAddress(s string) (Address, error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" || strings.ContainsRune(path, 0) {
			return Address{}, fmt.Errorf("invalid address %q: unix: needs the path of a socket", s)
		}
		return Address{path: path}, nil
	}
	rest := strings.TrimPrefix(s, "tcp:")
	if ip, err := netip.ParseAddr(rest); err == nil {
		return Address{addrPort: netip.AddrPortFrom(ip, defaultPort)}, nil
	}
	ap, err := netip.ParseAddrPort(rest)
	if err != nil {
		return Address{}, fmt.Errorf("invalid address %q: want ip, ip:port, tcp:ip:port or unix:/path (host names are not looked up)", s)
	}
	return Address{addrPort: ap, hasPort: true}, nil
}

// IsZero says that there is no address.
func (a Address) IsZero() bool { return a == Address{} }

// IsUnix says that it is a unix socket.
func (a Address) IsUnix() bool { return a.path != "" }

// AddrPort is the IP address and port; invalid for a unix socket.
func (a Address) AddrPort() netip.AddrPort { return a.addrPort }

// Local says that only this machine can connect: a unix socket or a loopback address.
func (a Address) Local() bool { return a.IsUnix() || a.addrPort.Addr().Unmap().IsLoopback() }

// Listen gives the two arguments of net.Listen.
func (a Address) Listen() (network, address string) {
	if a.IsUnix() {
		return "unix", a.path
	}
	return "tcp", a.addrPort.String()
}

// String is the notation that ParseAddress reads.
func (a Address) String() string {
	switch {
	case a.IsZero():
		return ""
	case a.IsUnix():
		return "unix:" + a.path
	case !a.hasPort:
		return a.addrPort.Addr().String()
	}
	return a.addrPort.String()
}

// withPort replaces the port; a unix socket has none and stays as it is.
func (a Address) withPort(port uint16) Address {
	if a.IsUnix() {
		return a
	}
	return Address{addrPort: netip.AddrPortFrom(a.addrPort.Addr(), port), hasPort: true}
}
