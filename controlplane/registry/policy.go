package registry

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// PortFlags are the attributes of one declared port.
type PortFlags struct {
	// PP: send a PROXY protocol header towards this port.
	PP bool
}

// PortPolicy says which ports of an instance are reachable (gateway spec 5.9). A nil *PortPolicy means "not known",
// which denies everything; the zero value means "known, no restriction". Treat a policy as immutable once it was
// handed to or received from the registry.
type PortPolicy struct {
	Ports    map[uint16]PortFlags
	Restrict bool
}

// PortAttr is one port as it stands in a request or an answer, before it was checked to fit 16 bits.
type PortAttr struct {
	Port uint32
	PP   bool
}

var errPortZero = errors.New("port must be between 1 and 65535")

// ParsePolicy checks a policy reported by a guest (gateway spec 3.2 step 4). Of two entries for one port the later wins.
func ParsePolicy(ports []PortAttr, restrict bool) (*PortPolicy, error) {
	return parsePolicy(ports, restrict, false)
}

// ParseAdminPolicy checks an operator's override (gateway spec 3.5). It differs from ParsePolicy in accepting port 0,
// which upstream's admin tools may send and which no connection can ever ask for.
func ParseAdminPolicy(ports []PortAttr, restrict bool) (*PortPolicy, error) {
	return parsePolicy(ports, restrict, true)
}

func parsePolicy(ports []PortAttr, restrict, zeroOK bool) (*PortPolicy, error) {
	p := &PortPolicy{Restrict: restrict, Ports: make(map[uint16]PortFlags, min(len(ports), 1<<16))}
	for _, a := range ports {
		if a.Port > 0xffff {
			return nil, fmt.Errorf("port %d out of u16 range", a.Port)
		}
		if a.Port == 0 && !zeroOK {
			return nil, errPortZero
		}
		p.Ports[uint16(a.Port)] = PortFlags{PP: a.PP}
	}
	return p, nil
}

// Allows reports whether a connection to port may pass. A nil policy allows nothing.
func (p *PortPolicy) Allows(port uint16) bool {
	if p == nil {
		return false
	}
	if !p.Restrict {
		return true
	}
	_, listed := p.Ports[port]
	return listed
}

// Flags returns the attributes of port, the zero value for an undeclared one.
func (p *PortPolicy) Flags(port uint16) PortFlags {
	if p == nil {
		return PortFlags{}
	}
	return p.Ports[port]
}

// List returns the declared ports in ascending order, the form of every answer.
func (p *PortPolicy) List() []PortAttr {
	if p == nil {
		return nil
	}
	out := make([]PortAttr, 0, len(p.Ports))
	for _, port := range slices.Sorted(maps.Keys(p.Ports)) {
		out = append(out, PortAttr{Port: uint32(port), PP: p.Ports[port].PP})
	}
	return out
}

// Equal compares by meaning: a nil and an empty port map are the same, an unknown policy equals only an unknown one.
func (p *PortPolicy) Equal(o *PortPolicy) bool {
	if p == nil || o == nil {
		return p == o
	}
	return p.Restrict == o.Restrict && maps.Equal(p.Ports, o.Ports)
}

// clone protects the registry's state from later changes to the caller's map.
func (p *PortPolicy) clone() *PortPolicy {
	if p == nil {
		return nil
	}
	return &PortPolicy{Ports: maps.Clone(p.Ports), Restrict: p.Restrict}
}
