package registry

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Instance is one registered CVM. Values are immutable: the registry replaces them, it never changes one in place.
type Instance struct {
	// ID is the instance id: lowercase hex on the main server, any accepted text on the debug server.
	ID string
	// AppID is the app the instance belongs to; it never changes during the life of an instance.
	AppID string
	// IP is the address in the overlay, IPv4.
	IP netip.Addr
	// PublicKey is the WireGuard key, 44 characters of padded base64.
	PublicKey string
	// RegTime is when the current key or address was given, seconds since the epoch.
	RegTime uint64
	// Policy is what the guest reported, nil while unknown.
	Policy *PortPolicy
	// PolicyHash is the compose hash for which Policy was reported.
	PolicyHash string
	// AdminPolicy is the operator's override, nil without one. It survives every registration.
	AdminPolicy *PortPolicy
}

// PolicySource says where an effective policy comes from; the texts are those of GetInstancePortPolicy.
type PolicySource string

const (
	SourceAdmin    PolicySource = "admin"
	SourceInstance PolicySource = "instance"
	SourceNone     PolicySource = "none"
)

// Effective returns the policy that applies (gateway spec 5.9): the override, else the reported one, else nil.
func (i Instance) Effective() (*PortPolicy, PolicySource) {
	switch {
	case i.AdminPolicy != nil:
		return i.AdminPolicy, SourceAdmin
	case i.Policy != nil:
		return i.Policy, SourceInstance
	}
	return nil, SourceNone
}

// Equal compares two records field by field, policies by meaning.
func (i Instance) Equal(o Instance) bool {
	return i.ID == o.ID && i.AppID == o.AppID && i.IP == o.IP && i.PublicKey == o.PublicKey && i.RegTime == o.RegTime &&
		i.PolicyHash == o.PolicyHash && i.Policy.Equal(o.Policy) && i.AdminPolicy.Equal(o.AdminPolicy)
}

// byAge is the order in which claims to one key or address are decided: the older registration, then the smaller id.
func byAge(a, b *Instance) int {
	return cmp.Or(cmp.Compare(a.RegTime, b.RegTime), cmp.Compare(a.ID, b.ID))
}

const (
	// maxIDLen bounds ids in bytes. Real ones are 40 hex digits.
	maxIDLen = 128
	// maxFuture is how far ahead of this node's clock a record may have been registered.
	maxFuture = 5 * time.Minute
)

// checkID enforces the id rule of gateway spec 6.3; what names the field.
func checkID(what, id string) error {
	if id == "" {
		return fmt.Errorf("%s is empty", what)
	}
	if len(id) > maxIDLen {
		return fmt.Errorf("%s has %d bytes, at most %d are accepted", what, len(id), maxIDLen)
	}
	if !utf8.ValidString(id) || strings.ContainsFunc(id, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
		return fmt.Errorf("%s %q contains white space, control characters or invalid UTF-8", what, id)
	}
	return nil
}

var errOwnKey = errors.New("it is this gateway's own WireGuard key")

// checkKey accepts only the canonical text of a key: two texts for one key would defeat the uniqueness rule.
func checkKey(key, own string) error {
	if len(key) != 44 {
		return fmt.Errorf("want 44 characters (padded standard base64 of 32 bytes), have %d", len(key))
	}
	raw, err := base64.StdEncoding.Strict().DecodeString(key)
	if err != nil {
		return fmt.Errorf("not padded standard base64: %w", err)
	}
	if len(raw) != 32 {
		return fmt.Errorf("want 32 bytes, have %d", len(raw))
	}
	if own != "" && key == own {
		return errOwnKey
	}
	return nil
}

// notUnicast are the ranges no CVM can have: this host, loopback, link-local (a record there would aim the proxy at
// cloud metadata services), multicast, reserved and limited broadcast.
func notUnicast() []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{0}), 8),
		netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8),
		netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254}), 16),
		netip.PrefixFrom(netip.AddrFrom4([4]byte{224}), 3),
	}
}

// checkRecord applies the rules of gateway spec 6.3 that concern one record alone. The address need not lie in this
// node's network: other nodes may use networks of their own.
func (r *Registry) checkRecord(i *Instance) error {
	if err := checkID("instance id", i.ID); err != nil {
		return err
	}
	if err := checkID("app id", i.AppID); err != nil {
		return err
	}
	if err := checkKey(i.PublicKey, r.cfg.OwnKey); err != nil {
		return fmt.Errorf("invalid public key: %w", err)
	}
	switch {
	case !i.IP.Is4():
		return fmt.Errorf("address %s is not IPv4", i.IP)
	case i.IP == r.cfg.Network.Addr():
		return fmt.Errorf("address %s is this gateway's own", i.IP)
	}
	for _, p := range notUnicast() {
		if p.Contains(i.IP) {
			return fmt.Errorf("address %s is not plain unicast (inside %s)", i.IP, p)
		}
	}
	for _, p := range r.cfg.Reserved {
		if p.Contains(i.IP) {
			return fmt.Errorf("address %s is inside the reserved net %s", i.IP, p)
		}
	}
	// A clock before 1970 gives limit 0: nothing can be judged to lie in the future then.
	if limit := r.now().Add(maxFuture).Unix(); limit > 0 && i.RegTime > uint64(limit) {
		return fmt.Errorf("registered %d s in the future (at most %d s are accepted; check the clocks of the nodes)",
			i.RegTime-uint64(limit)+uint64(maxFuture/time.Second), int(maxFuture/time.Second))
	}
	return nil
}
