package wireguard

import (
	"errors"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// ErrNotWireGuard is returned when the adopted interface cannot hold peers
// because it is not WireGuard (or was not found). Peers stay wanted and are
// applied as soon as a WireGuard interface has the name.
var ErrNotWireGuard = errors.New("not a WireGuard interface")

// backend speaks to one WireGuard implementation. Its methods are safe for
// concurrent use; apply is called by one goroutine only.
type backend interface {
	// dump reads the configuration and every peer, O(peers).
	dump() (*devState, error)
	// apply carries out c in order. After an error the device may hold any
	// part of c.
	apply(c change) error
	// close releases what the backend holds. A kernel interface stays.
	close() error
}

// devState is what a device says about itself.
type devState struct {
	privateKey wgtypes.Key
	listenPort int
	peers      []devPeer
}

type devPeer struct {
	key       wgtypes.Key
	endpoint  netip.AddrPort // invalid: never heard of
	handshake time.Time      // zero: never
	rx, tx    uint64
	keepalive time.Duration
	allowed   netip.Prefix // the first of the allowed addresses
	nAllowed  int
}

// holds reports whether the peer is as this package configures it: one address,
// and keepalives from the moment its own address is known.
func (p *devPeer) holds(ip netip.Addr) bool {
	return p.nAllowed == 1 && p.allowed.Addr() == ip && p.allowed.Bits() == ip.BitLen() &&
		(p.keepalive == keepalive || p.keepalive == 0 && !p.endpoint.IsValid())
}

// change is one reconfiguration: interface settings, then peers in order.
type change struct {
	privateKey *wgtypes.Key // nil: leave
	listenPort *int         // nil: leave
	peers      []peerChange // no key occurs twice
}

func (c *change) empty() bool {
	return c.privateKey == nil && c.listenPort == nil && len(c.peers) == 0
}

// peerChange removes a peer, or creates it if need be and makes ip its only
// allowed address.
type peerChange struct {
	key       wgtypes.Key
	remove    bool
	ip        netip.Addr
	keepalive bool           // switch keepalives on; they are never switched off
	endpoint  netip.AddrPort // set if valid
}
