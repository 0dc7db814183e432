package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"github.com/dstack-gw/dstack-gw/dataplane/clienthello"
)

// input is what somebody typed or pasted.
type input struct {
	name   string // ASCII, folded, without the trailing dot; as typed for a bare id
	bare   bool   // an id rather than a host name
	scheme string // lower case, "" without one
	port   uint16 // 0 without one
	// folded and unicode tell what was changed on the way to name.
	folded, unicode bool
}

// parseInput takes host names, URLs and ids as people have them at hand. What it
// refuses is no server name that a TLS client would send.
func parseInput(text string) (input, error) {
	var in input
	s := strings.Trim(text, " \t\r\n\"'`<>")
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		in.scheme, s = strings.ToLower(scheme), rest
	}
	if i := strings.IndexAny(s, `/?#\`); i >= 0 {
		s = s[:i]
	}
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		s = s[i+1:]
	}
	if strings.HasPrefix(s, "[") || isAddress(s) {
		return in, errors.New("it is an IP address: a TLS client names no server then (RFC 6066 3), and there is nothing to route by")
	}
	if host, port, ok := strings.Cut(s, ":"); ok {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return in, fmt.Errorf("%q behind the colon is not a port from 1 to 65535", port)
		}
		s, in.port = host, uint16(n)
	}
	if isAddress(s) {
		return in, errors.New("it is an IP address: a TLS client names no server then (RFC 6066 3), and there is nothing to route by")
	}
	s = strings.TrimSuffix(s, ".")
	switch {
	case s == "":
		return in, errors.New("there is no host name in it")
	case !utf8.ValidString(s):
		return in, errors.New("it is not UTF-8")
	case strings.HasPrefix(s, "*"):
		return in, errors.New("a wildcard stands for many names; clients send one of them, so ask about one of them")
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return in, fmt.Errorf("it has a space or control character (%q)", s[i])
		}
	}
	if !strings.Contains(s, ".") {
		in.name, in.bare = s, true
		return in, nil
	}
	if !isASCII(s) {
		a, err := idna.Lookup.ToASCII(s)
		if err != nil {
			return in, fmt.Errorf("browsers cannot turn it into an ASCII name: %w", err)
		}
		s, in.unicode = a, true
	}
	if len(s) > clienthello.MaxNameSize {
		return in, fmt.Errorf("it has %d bytes, a server name at most %d", len(s), clienthello.MaxNameSize)
	}
	in.name = strings.ToLower(s)
	in.folded = in.name != s
	return in, nil
}

func isAddress(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
