package wireguard

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkInfo is what the network stack says about the interface.
type linkInfo struct {
	kind                 string // rtnetlink kind: "wireguard", "tun", "dummy", ...; "" for hardware
	up                   bool
	rxDropped, txDropped uint64
}

var errNoLink = errors.New("no such interface")

// links is the part of rtnetlink this package uses; tests replace it.
type links interface {
	// get returns errNoLink if there is no interface of that name.
	get(name string) (linkInfo, error)
	// addWireGuard creates a kernel WireGuard interface, down.
	addWireGuard(name string, mtu int) error
	// bringUp gives the interface its address and sets it up.
	bringUp(name string, addr netip.Prefix) error
	remove(name string) error
}

// rtnl is links on the network namespace of the calling thread.
type rtnl struct{}

func (rtnl) get(name string) (linkInfo, error) {
	l, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return linkInfo{}, errNoLink
	}
	if err != nil {
		return linkInfo{}, fmt.Errorf("look up interface %s: %w", name, err)
	}
	a := l.Attrs()
	// The administrative state: a tunnel has no carrier to lose.
	info := linkInfo{kind: l.Type(), up: a.Flags&net.FlagUp != 0}
	if s := a.Statistics; s != nil {
		info.rxDropped, info.txDropped = s.RxDropped, s.TxDropped
	}
	return info, nil
}

func (rtnl) addWireGuard(name string, mtu int) error {
	return netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}})
}

func (rtnl) bringUp(name string, addr netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up interface %s: %w", name, err)
	}
	n := ipNet(addr)
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: &n}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add address %s to %s: %w", addr, name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func (rtnl) remove(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

// explainNoKernel says why a kernel WireGuard interface could not be made.
func explainNoKernel(err error) string {
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return "this kernel has no WireGuard (module wireguard is missing or may not be loaded)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "creating a WireGuard interface needs CAP_NET_ADMIN"
	}
	return fmt.Sprintf("creating a kernel WireGuard interface failed: %v", err)
}
