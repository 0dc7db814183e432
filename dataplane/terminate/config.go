package terminate

import (
	"crypto/tls"
	"fmt"
	"slices"
)

// Versions turns core.proxy.tls_versions ("1.2", "1.3") into a range.
func Versions(list []string) (lo, hi uint16, err error) {
	for _, v := range list {
		var n uint16
		switch v {
		case "1.2":
			n = tls.VersionTLS12
		case "1.3":
			n = tls.VersionTLS13
		default:
			return 0, 0, fmt.Errorf("unknown TLS version %q: use \"1.2\" or \"1.3\"", v)
		}
		if lo == 0 || n < lo {
			lo = n
		}
		hi = max(hi, n)
	}
	if lo == 0 {
		return 0, 0, fmt.Errorf("no TLS version is enabled: core.proxy.tls_versions is empty")
	}
	return lo, hi, nil
}

// noSuchProtocol can be in no client's list (RFC 7301 allows it, nobody sends it),
// so a server that offers only this one answers with no_application_protocol.
const noSuchProtocol = "\x00"

// Configs builds the two acceptors of one base domain (gateway spec 4.6): plain
// offers no ALPN; h2 offers only h2 and refuses a client that sends ALPN without it,
// but accepts one that sends none. keys are the session ticket keys, newest first,
// shared by both so that a session resumes on either.
func Configs(cert *tls.Certificate, lo, hi uint16, keys [][32]byte) (plain, h2 *tls.Config) {
	mk := func(protos ...string) *tls.Config {
		c := &tls.Config{
			Certificates: []tls.Certificate{*cert},
			MinVersion:   lo,
			MaxVersion:   hi,
			NextProtos:   protos,
			// Small first records help a browser's first paint and cost a system call and
			// a record for each 1.4 KB: the gateway relays, it does not know what comes next.
			DynamicRecordSizingDisabled: true,
		}
		if len(keys) > 0 {
			c.SetSessionTicketKeys(keys)
		}
		return c
	}
	plain, h2 = mk(), mk("h2")
	refuse := mk(noSuchProtocol)
	// crypto/tls lets a client that offers only http/1.1 through to an h2-only server.
	h2.GetConfigForClient = func(hi *tls.ClientHelloInfo) (*tls.Config, error) {
		if len(hi.SupportedProtos) > 0 && !slices.Contains(hi.SupportedProtos, "h2") {
			return refuse, nil
		}
		return nil, nil
	}
	return plain, h2
}
