package proxyproto

import (
	"encoding/binary"
	"net/netip"
)

const (
	signature2 = "\r\n\r\n\x00\r\nQUIT\n"
	fixedSize2 = len(signature2) + 4

	version2     = 0x2 // high half of the byte after the signature
	commandLocal = 0x0 // low half
	commandProxy = 0x1

	familyUnspec = 0x0 // high half of the byte after that
	familyInet   = 0x1
	familyInet6  = 0x2
	familyUnix   = 0x3
	protoUnspec  = 0x0 // low half
	protoStream  = 0x1
	protoDgram   = 0x2

	inetSize  = 2*4 + 2*2
	inet6Size = 2*16 + 2*2
	unixSize  = 2 * 108
)

func parse2(b []byte) (Header, int, error) {
	if !agree(b, signature2) {
		return Header{}, 0, ErrNotProxy
	}
	h := Header{Version: 2}
	rest := b[min(len(b), len(signature2)):]
	if len(rest) > 0 {
		command := rest[0] & 0xf
		if rest[0]>>4 != version2 || command > commandProxy {
			return Header{}, 0, notProxy("v2 header with version and command 0x%02x", rest[0])
		}
		h.Local = command == commandLocal
	}
	need := 0 // bytes of addresses
	if len(rest) > 1 {
		family, proto := rest[1]>>4, rest[1]&0xf
		switch {
		case family > familyUnix || proto > protoDgram:
			// The format tells to ignore this byte when the command is LOCAL.
			if !h.Local {
				return Header{}, 0, notProxy("v2 header with family and protocol 0x%02x", rest[1])
			}
		case family == familyInet:
			h.Family, need = [...]Family{Unspec, TCP4, UDP4}[proto], inetSize
		case family == familyInet6:
			h.Family, need = [...]Family{Unspec, TCP6, UDP6}[proto], inet6Size
		case family == familyUnix:
			need = unixSize
		}
	}
	if len(rest) < 4 {
		return Header{}, 0, ErrIncomplete
	}
	n := int(binary.BigEndian.Uint16(rest[2:4]))
	switch {
	case fixedSize2+n > maxSize2:
		return Header{}, 0, ErrTooLong
	case n < need && h.Local:
		h.Family = Unspec
	case n < need:
		return Header{}, 0, notProxy("v2 header with %d bytes of addresses, its family needs %d", n, need)
	}
	if len(rest) < 4+n {
		return Header{}, 0, ErrIncomplete
	}
	addrs := rest[4 : 4+n]
	switch h.Family {
	case TCP4, UDP4:
		h.Src = addrPort4(addrs[0:4], addrs[8:10])
		h.Dst = addrPort4(addrs[4:8], addrs[10:12])
	case TCP6, UDP6:
		h.Src = addrPort6(addrs[0:16], addrs[32:34])
		h.Dst = addrPort6(addrs[16:32], addrs[34:36])
	}
	return h, fixedSize2 + n, nil
}

func addrPort4(addr, port []byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr)), binary.BigEndian.Uint16(port))
}

func addrPort6(addr, port []byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(addr)), binary.BigEndian.Uint16(port))
}

func (h Header) append2(dst []byte) []byte {
	command := byte(commandProxy)
	if h.Local {
		command = commandLocal
	}
	dst = append(dst, signature2...)
	dst = append(dst, version2<<4|command)
	if !h.fits() {
		return append(dst, familyUnspec<<4|protoUnspec, 0, 0)
	}
	proto := byte(protoStream)
	if h.Family == UDP4 || h.Family == UDP6 {
		proto = protoDgram
	}
	if h.Src.Addr().Is4() {
		s, d := h.Src.Addr().As4(), h.Dst.Addr().As4()
		dst = append(dst, familyInet<<4|proto, 0, inetSize)
		dst = append(append(dst, s[:]...), d[:]...)
	} else {
		s, d := h.Src.Addr().As16(), h.Dst.Addr().As16()
		dst = append(dst, familyInet6<<4|proto, 0, inet6Size)
		dst = append(append(dst, s[:]...), d[:]...)
	}
	dst = binary.BigEndian.AppendUint16(dst, h.Src.Port())
	return binary.BigEndian.AppendUint16(dst, h.Dst.Port())
}
