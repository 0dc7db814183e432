package customdomain

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Answer is the content of a record: an app id or instance id, not looked at but
// for being UTF-8 without a colon, and a port, never 0.
type Answer struct {
	ID   string
	Port uint16
}

const (
	legacyLabel    = "_tapp-address"
	wildcardSuffix = "-wildcard"

	maxNameSize  = 253 // RFC 1035 2.3.4, without the root label
	maxLabelSize = 63
)

// kind is one of the records that may hold the address of an app.
type kind uint8

const (
	primary  kind = iota // P.S
	legacy               // _tapp-address.S
	wildcard             // P-wildcard.<S without its first label>
	kinds
)

// key identifies a record. It is not the name of the record, so that nothing has
// to be concatenated to look into the cache.
type key struct {
	kind kind
	base string // what follows the label that kind stands for
}

// records are the records of one host name: none, one or more of each kind, in
// the order in which they count.
type records struct {
	keys [kinds]key
	n    int
}

func (k *records) add(key key, label string) {
	// A name too long to exist needs no query.
	if len(label)+1+len(key.base) <= maxNameSize {
		k.keys[k.n] = key
		k.n++
	}
}

// records returns the keys to ask for the canonical name.
func (r *Resolver) records(name string) (k records) {
	k.add(key{primary, name}, r.labels[primary])
	if r.labels[legacy] != "" {
		k.add(key{legacy, name}, r.labels[legacy])
	}
	if _, parent, ok := strings.Cut(name, "."); ok {
		k.add(key{wildcard, parent}, r.labels[wildcard])
	}
	return k
}

// recordName returns the absolute name of the record.
func (r *Resolver) recordName(k key) string {
	return r.labels[k.kind] + "." + k.base + "."
}

// canonical brings a host name into the form that keys are made of: lower case,
// without a trailing dot. It reports false for what cannot be the name of a TLS
// server: RFC 6066 3 excludes anything but ASCII DNS names, literal addresses in
// particular. Underscores are let through because they occur in the wild.
func canonical(name string) (string, bool) {
	name = strings.TrimSuffix(name, ".")
	if len(name) > maxNameSize {
		return "", false
	}
	fold := false
	label, digits := 0, true // of the current label: size, nothing but digits
	for i := range len(name) {
		c := name[i]
		switch {
		case c == '.':
			if label == 0 {
				return "", false
			}
			label, digits = 0, true
			continue
		case '0' <= c && c <= '9':
		case 'a' <= c && c <= 'z', c == '-', c == '_':
			digits = false
		case 'A' <= c && c <= 'Z':
			digits, fold = false, true
		default:
			return "", false
		}
		if label++; label > maxLabelSize {
			return "", false
		}
	}
	if label == 0 || digits {
		return "", false
	}
	if fold {
		name = strings.ToLower(name)
	}
	return name, true
}

// parseValue reads "<id>:<port>".
func parseValue(s string) (Answer, error) {
	id, port, ok := strings.Cut(s, ":")
	switch {
	case !utf8.ValidString(s):
		return Answer{}, errors.New("it is not UTF-8")
	case !ok:
		return Answer{}, errors.New("it has no colon")
	case id == "":
		return Answer{}, errors.New("the id is empty")
	}
	// The parser of the peers we replace takes a plus sign; records that worked
	// there go on working.
	n, err := strconv.ParseUint(strings.TrimPrefix(port, "+"), 10, 16)
	if err != nil || n == 0 {
		return Answer{}, fmt.Errorf("the port %q is not a number from 1 to 65535", port)
	}
	return Answer{ID: id, Port: uint16(n)}, nil
}

// unescape undoes the presentation format in which the dns library hands out
// character-strings (RFC 1035 5.1).
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+1 == len(s) {
			out = append(out, s[i])
			continue
		}
		if i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 10, 8); err == nil {
				out = append(out, byte(n))
				i += 3
				continue
			}
		}
		i++
		out = append(out, s[i])
	}
	return string(out)
}
