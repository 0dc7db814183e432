package proxyproto

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Family is the kind of the two addresses of a header.
type Family uint8

const (
	// Unspec: the header carries no addresses this package can express. That is
	// UNKNOWN in version 1, UNSPEC and UNIX in version 2.
	Unspec Family = iota
	TCP4
	TCP6
	// UDP4 and UDP6 exist in version 2 only.
	UDP4
	UDP6
)

// String returns the name of f as version 1 writes it.
func (f Family) String() string {
	switch f {
	case Unspec:
		return "UNKNOWN"
	case TCP4:
		return "TCP4"
	case TCP6:
		return "TCP6"
	case UDP4:
		return "UDP4"
	case UDP6:
		return "UDP6"
	}
	return fmt.Sprintf("family(%d)", uint8(f))
}

// Header is one PROXY header. The zero value is written as a version 2 header
// without addresses.
type Header struct {
	Version uint8 // 1 or 2
	// Local is set when the proxy talks on its own behalf (version 2 LOCAL). The
	// addresses are then kept for Append but mean nothing: those of the socket
	// count.
	Local  bool
	Family Family
	// Src and Dst are valid unless Family is Unspec.
	Src, Dst netip.AddrPort
}

const (
	// MaxSize is the number of bytes Parse looks at.
	MaxSize = maxSize2

	maxSize1 = 107 // the longest line that the format allows, with its CRLF
	maxSize2 = 2048
)

// Errors of Parse. ErrNotProxy comes wrapped with the reason where there is more
// to say than that the first bytes differ. Only ErrIncomplete can be cured by
// more bytes.
var (
	ErrIncomplete = errors.New("proxy protocol header is incomplete")
	ErrNotProxy   = errors.New("no valid proxy protocol header detected")
	ErrTooLong    = errors.New("v2 proxy protocol header is too long")
)

// New returns the version 2 header for a TCP connection from src to dst.
// IPv4-mapped IPv6 addresses become IPv4; when only one of the two is IPv4 it is
// written in mapped form; when either is invalid the header has no addresses.
func New(src, dst netip.AddrPort) Header {
	if !src.IsValid() || !dst.IsValid() {
		return Header{Version: 2}
	}
	s, d := src.Addr().Unmap().WithZone(""), dst.Addr().Unmap().WithZone("")
	family := TCP4
	if !s.Is4() || !d.Is4() {
		family = TCP6
		s, d = netip.AddrFrom16(s.As16()), netip.AddrFrom16(d.As16())
	}
	return Header{
		Version: 2,
		Family:  family,
		Src:     netip.AddrPortFrom(s, src.Port()),
		Dst:     netip.AddrPortFrom(d, dst.Port()),
	}
}

// FromAddrs is New for the addresses of a [net.Conn]: src is the peer, dst the
// local one. Addresses that are not TCP give a header without addresses.
func FromAddrs(src, dst net.Addr) Header {
	return New(addrPort(src), addrPort(dst))
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok && t != nil {
		return t.AddrPort()
	}
	return netip.AddrPort{}
}

// Parse reads the header at the start of b, all the bytes received so far, and
// returns it with its length n in bytes. A version 1 header is at most 107 bytes
// long, a version 2 header at most 2048 including vectors (gateway spec 4.7).
//
// The errors are ErrIncomplete, ErrNotProxy and ErrTooLong.
func Parse(b []byte) (h Header, n int, err error) {
	switch {
	case len(b) == 0:
		return Header{}, 0, ErrIncomplete
	case b[0] == prefix1[0]:
		return parse1(b)
	case b[0] == signature2[0]:
		return parse2(b)
	}
	return Header{}, 0, ErrNotProxy
}

// Append appends the header in the format of its version to dst and returns the
// result. Addresses that do not fit the family, or a family that the version
// does not have, are written as unspecified.
func (h Header) Append(dst []byte) []byte {
	if h.Version == 1 {
		return h.append1(dst)
	}
	return h.append2(dst)
}

// fits tells whether the addresses can be written as h.Family.
func (h Header) fits() bool {
	s, d := h.Src.Addr(), h.Dst.Addr()
	switch h.Family {
	case TCP4, UDP4:
		return s.Is4() && d.Is4()
	case TCP6, UDP6:
		return s.Is6() && d.Is6()
	}
	return false
}

func notProxy(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrNotProxy}, args...)...)
}
