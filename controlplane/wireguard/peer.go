package wireguard

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// keepalive is sent to every peer whose address is known (gateway spec 6.3).
// Guests use the same value, so a tunnel in use re-handshakes about every two
// minutes and its NAT mapping stays open from both ends.
//
// A peer that has not called in yet gets none: WireGuard would compute a
// handshake for it every 5 s and find nowhere to send it. With 10,000 such
// peers that took two thirds of the CPU of a userspace device, and 64 KiB each.
const keepalive = 25 * time.Second

// maxIDLen bounds an instance id (gateway spec 6.3).
const maxIDLen = 128

// zeroKey stands for "no key".
var zeroKey wgtypes.Key

// Peer is one registered instance as WireGuard sees it.
type Peer struct {
	ID        string      // instance id, at most 128 bytes, no white space
	PublicKey wgtypes.Key // the instance's WireGuard key
	IP        netip.Addr  // its only allowed address, IPv4
}

// ErrInvalidPeer is wrapped by the error of a peer that must not reach the
// device: one bad entry would otherwise cost other instances their tunnel.
var ErrInvalidPeer = errors.New("invalid WireGuard peer")

// checkPeer applies the record rules of gateway spec 6.3 that need no registry
// state, and returns the peer with its address in plain IPv4 form.
func (d *Device) checkPeer(p Peer) (Peer, error) {
	bad := func(format string, args ...any) (Peer, error) {
		return p, fmt.Errorf("%w: instance %q: %s", ErrInvalidPeer, p.ID, fmt.Sprintf(format, args...))
	}
	switch {
	case p.ID == "":
		return bad("the instance id is empty")
	case len(p.ID) > maxIDLen:
		return bad("the instance id has %d bytes, at most %d are allowed", len(p.ID), maxIDLen)
	case !utf8.ValidString(p.ID):
		return bad("the instance id is not UTF-8")
	}
	for _, r := range p.ID {
		if unicode.IsSpace(r) || unicode.IsControl(r) {
			return bad("the instance id contains white space or a control character")
		}
	}
	if p.PublicKey == zeroKey {
		return bad("the public key is all zero")
	}
	if p.PublicKey == d.ownKey {
		return bad("the public key is the gateway's own")
	}
	p.IP = p.IP.Unmap()
	if !p.IP.Is4() || !p.IP.IsGlobalUnicast() {
		return bad("%v is not a plain IPv4 unicast address", p.IP)
	}
	if p.IP == d.opt.Address.Addr() {
		return bad("%v is the gateway's own address", p.IP)
	}
	return p, nil
}

// peerSet is the wanted peer set with its three unique keys. It is not safe for
// concurrent use.
type peerSet struct {
	byID  map[string]Peer
	byKey map[wgtypes.Key]string
	byIP  map[netip.Addr]string
}

func newPeerSet(n int) *peerSet {
	return &peerSet{
		byID:  make(map[string]Peer, n),
		byKey: make(map[wgtypes.Key]string, n),
		byIP:  make(map[netip.Addr]string, n),
	}
}

// want returns the address wanted for key, false if the key is not wanted.
func (s *peerSet) want(key wgtypes.Key) (netip.Addr, bool) {
	id, ok := s.byKey[key]
	if !ok {
		return netip.Addr{}, false
	}
	return s.byID[id].IP, true
}

// conflict returns the id of another instance that holds p's key or address.
func (s *peerSet) conflict(p Peer) (id string, what string, found bool) {
	if id, ok := s.byKey[p.PublicKey]; ok && id != p.ID {
		return id, "public key", true
	}
	if id, ok := s.byIP[p.IP]; ok && id != p.ID {
		return id, "address", true
	}
	return "", "", false
}

// put stores p in place of whatever had its id. The caller has resolved
// conflicts.
func (s *peerSet) put(p Peer) {
	if _, ok := s.byID[p.ID]; ok {
		s.drop(p.ID)
	}
	s.byID[p.ID] = p
	s.byKey[p.PublicKey] = p.ID
	s.byIP[p.IP] = p.ID
}

func (s *peerSet) drop(id string) {
	p := s.byID[id]
	delete(s.byID, id)
	delete(s.byKey, p.PublicKey)
	delete(s.byIP, p.IP)
}
