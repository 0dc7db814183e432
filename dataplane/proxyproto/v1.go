package proxyproto

import (
	"bytes"
	"net/netip"
	"strconv"
)

const prefix1 = "PROXY "

// parse1 reads
//
//	"PROXY" SP ( "TCP4" | "TCP6" ) SP src SP dst SP sport SP dport CRLF
//	"PROXY" SP "UNKNOWN" [ anything ] CRLF
func parse1(b []byte) (Header, int, error) {
	window := b[:min(len(b), maxSize1)]
	end := bytes.Index(window, []byte("\r\n"))
	line := window
	if end >= 0 {
		line = window[:end]
	}
	if !agree(line, prefix1) {
		return Header{}, 0, ErrNotProxy
	}
	h := Header{Version: 1}
	rest := line[min(len(line), len(prefix1)):]
	switch {
	case agree(rest, "TCP4 "):
		h.Family = TCP4
	case agree(rest, "TCP6 "):
		h.Family = TCP6
	case agree(rest, "UNKNOWN"):
	default:
		return Header{}, 0, notProxy("v1 header of an unknown family: %q", line)
	}
	if end < 0 {
		if len(b) >= maxSize1 {
			return Header{}, 0, notProxy("v1 header has no line end within %d bytes", maxSize1)
		}
		return Header{}, 0, ErrIncomplete
	}

	// The line is complete, so agreeing with less than a whole word is a mismatch.
	if h.Family == Unspec || len(rest) < len("TCP4 ") {
		if !bytes.HasPrefix(rest, []byte("UNKNOWN")) {
			return Header{}, 0, notProxy("v1 header ends early: %q", line)
		}
		return h, end + 2, nil
	}
	src, rest, _ := bytes.Cut(rest[len("TCP4 "):], []byte(" "))
	dst, rest, _ := bytes.Cut(rest, []byte(" "))
	sport, dport, _ := bytes.Cut(rest, []byte(" "))
	var ok1, ok2 bool
	h.Src, ok1 = parseAddrPort(src, sport)
	h.Dst, ok2 = parseAddrPort(dst, dport)
	if !ok1 || !ok2 || !h.fits() {
		return Header{}, 0, notProxy("v1 header with unusable addresses: %q", line)
	}
	return h, end + 2, nil
}

// agree tells whether b starts with word, as far as both of them go.
func agree(b []byte, word string) bool {
	n := min(len(b), len(word))
	return string(b[:n]) == word[:n]
}

func parseAddrPort(addr, port []byte) (netip.AddrPort, bool) {
	a, err := netip.ParseAddr(string(addr))
	if err != nil || a.Zone() != "" {
		return netip.AddrPort{}, false
	}
	p, err := strconv.ParseUint(string(port), 10, 16)
	return netip.AddrPortFrom(a, uint16(p)), err == nil
}

func (h Header) append1(dst []byte) []byte {
	dst = append(dst, prefix1...)
	if h.Family != TCP4 && h.Family != TCP6 || !h.fits() {
		return append(dst, "UNKNOWN\r\n"...)
	}
	dst = append(dst, h.Family.String()...)
	dst = append(dst, ' ')
	dst = h.Src.Addr().WithZone("").AppendTo(dst)
	dst = append(dst, ' ')
	dst = h.Dst.Addr().WithZone("").AppendTo(dst)
	dst = append(dst, ' ')
	dst = strconv.AppendUint(dst, uint64(h.Src.Port()), 10)
	dst = append(dst, ' ')
	dst = strconv.AppendUint(dst, uint64(h.Dst.Port()), 10)
	return append(dst, "\r\n"...)
}
