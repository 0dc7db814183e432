package hostname

import (
	"errors"
	"fmt"
	"strings"
)

// Mode tells what happens to the TLS of a connection.
type Mode uint8

const (
	// Terminate: TLS ends at the gateway, no ALPN is offered.
	Terminate Mode = iota
	// TerminateH2: TLS ends at the gateway, ALPN is h2 and nothing else.
	TerminateH2
	// Passthrough: TLS ends in the app.
	Passthrough
)

// String returns the name of m in logs and metrics.
func (m Mode) String() string {
	switch m {
	case Terminate:
		return "terminate"
	case TerminateH2:
		return "terminate-h2"
	case Passthrough:
		return "passthrough"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

const (
	terminatePort   = 80
	passthroughPort = 443
)

// Target is what a label asks for.
type Target struct {
	ID   string // app id, instance id or reserved word; neither empty nor with "-" or "."
	Port uint16 // never 0
	Mode Mode
}

// Errors of ParseLabel, returned as they are.
var (
	ErrEmptyID = errors.New("app id is empty")
	ErrSuffix  = errors.New("invalid sni format: `gs` is not allowed")
	ErrPort    = errors.New("invalid port")
	ErrFormat  = errors.New("invalid sni format")
)

// Split cuts a host name at its first dot into the label that ParseLabel reads
// and the base domain. It reports false when either would be empty.
func Split(name string) (label, base string, ok bool) {
	label, base, ok = strings.Cut(name, ".")
	if !ok || label == "" || base == "" {
		return "", "", false
	}
	return label, base, true
}

// ParseLabel reads a platform label (gateway spec 4.3):
//
//	label = id [ "-" [ port ] [ "s" | "g" ] ]
//
// "s" selects Passthrough, "g" TerminateH2. The port defaults to 443 for
// Passthrough and to 80 otherwise; leading zeros are allowed, 0 and signs are
// not. The ID is a part of label, its letters are left as they are.
//
// The errors are ErrEmptyID, ErrSuffix, ErrPort and ErrFormat; a port error is
// found before a surplus part.
func ParseLabel(label string) (Target, error) {
	id, rest, dash := strings.Cut(label, "-")
	switch {
	case id == "":
		return Target{}, ErrEmptyID
	case strings.IndexByte(id, '.') >= 0:
		return Target{}, ErrFormat
	case !dash:
		return Target{ID: id, Port: terminatePort, Mode: Terminate}, nil
	}
	t := Target{ID: id, Port: terminatePort, Mode: Terminate}
	rest, _, surplus := strings.Cut(rest, "-")
	port, h2 := strings.CutSuffix(rest, "g")
	port, pass := strings.CutSuffix(port, "s")
	switch {
	case h2 && pass:
		return Target{}, ErrSuffix
	case h2:
		t.Mode = TerminateH2
	case pass:
		t.Mode, t.Port = Passthrough, passthroughPort
	}
	if port != "" {
		var ok bool
		if t.Port, ok = parsePort(port); !ok {
			return Target{}, ErrPort
		}
	}
	if surplus {
		return Target{}, ErrFormat
	}
	return t, nil
}

// parsePort reads decimal digits only: strconv would build an error for every
// refused name.
func parsePort(s string) (uint16, bool) {
	n := 0
	for i := range len(s) {
		d := s[i] - '0'
		if d > 9 {
			return 0, false
		}
		if n = n*10 + int(d); n > 65535 {
			return 0, false
		}
	}
	return uint16(n), n != 0
}
