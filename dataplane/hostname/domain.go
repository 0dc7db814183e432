package hostname

import (
	"errors"
	"strings"
)

// Errors of NormalizeDomain, returned as they are.
var (
	ErrDomain      = errors.New("domain must be a non-empty ASCII DNS name of at most 253 bytes")
	ErrDomainLabel = errors.New("domain contains an invalid DNS label")
)

const (
	maxDomainSize = 253 // RFC 1035 2.3.4, without the root label
	maxLabelSize  = 63
)

// NormalizeDomain brings a base domain as an operator types it into the form in
// which it is stored and compared: no surrounding space, no trailing dots, no
// leading "*.", ASCII lower case. What remains must be a DNS name of 1 to 253
// bytes, else ErrDomain, made of labels of 1 to 63 letters, digits and inner
// hyphens, else ErrDomainLabel (gateway spec 3.4).
func NormalizeDomain(domain string) (string, error) {
	d := strings.TrimRight(strings.TrimSpace(domain), ".")
	d = strings.TrimPrefix(d, "*.")
	if d == "" || len(d) > maxDomainSize || !isASCII(d) {
		return "", ErrDomain
	}
	for label := range strings.SplitSeq(d, ".") {
		if !isLabel(label) {
			return "", ErrDomainLabel
		}
	}
	return strings.ToLower(d), nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

func isLabel(s string) bool {
	if s == "" || len(s) > maxLabelSize || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-') {
			return false
		}
	}
	return true
}
