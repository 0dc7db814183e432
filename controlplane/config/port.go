package config

import (
	"fmt"
	"iter"
	"strconv"
	"strings"
)

// PortSpec is one port or an inclusive range of ports.
type PortSpec struct {
	First, Last uint16
}

// ParsePortSpec reads "443" or "443-543"; spaces around the numbers are allowed.
func ParsePortSpec(s string) (PortSpec, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	var p PortSpec
	for _, end := range []struct {
		text string
		to   *uint16
	}{{first, &p.First}, {last, &p.Last}} {
		text := strings.TrimSpace(end.text)
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || !isDecimal(text) {
			return PortSpec{}, fmt.Errorf("invalid port range: %q is not a port in %q (want \"443\" or \"443-543\", ports 0 to 65535)", text, s)
		}
		*end.to = uint16(n)
	}
	if p.First > p.Last {
		return PortSpec{}, fmt.Errorf("invalid port range: %q starts after its end", s)
	}
	return p, nil
}

// String is "443" or "443-543".
func (p PortSpec) String() string {
	if p.First == p.Last {
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d-%d", p.First, p.Last)
}

// Len is the number of ports.
func (p PortSpec) Len() int { return int(p.Last) - int(p.First) + 1 }

// Contains says whether port is one of them.
func (p PortSpec) Contains(port uint16) bool { return p.First <= port && port <= p.Last }

// All iterates over the ports in ascending order.
func (p PortSpec) All() iter.Seq[uint16] {
	return func(yield func(uint16) bool) {
		for i := range p.Len() {
			if !yield(p.First + uint16(i)) {
				return
			}
		}
	}
}
