package dev

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The network of an environment:
//
//	this machine                                  namespace of CVM i
//	+--------------------------------------+      +-----------------------+
//	| <name>-wg   overlay.1  (dstack-gw)   | ==== | dstack-wg0  overlay.n |
//	| <name>-br   uplink.1                 |      |                       |
//	|    +- <name>-v<i>  -------------------veth--- eth0  uplink.(9+i)    |
//	+--------------------------------------+      +-----------------------+
//
// There is no forwarding and no firewall rule.

const (
	// namespaceDir is where ip-netns(8) keeps its names.
	namespaceDir = "/run/netns"
	// wireguardDir is where wg(8) looks for userspace devices.
	wireguardDir = "/run/wireguard"
)

// checkNetworks refuses networks that this machine uses already.
func checkNetworks(o *Options) error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list the routes of this machine: %w", err)
	}
	ours := map[int]bool{}
	for _, name := range []string{o.bridge(), o.tunnel()} {
		if l, err := netlink.LinkByName(name); err == nil {
			ours[l.Attrs().Index] = true
		}
	}
	for _, r := range routes {
		if r.Dst == nil || ours[r.LinkIndex] {
			continue
		}
		ones, _ := r.Dst.Mask.Size()
		a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		if !ok || ones == 0 {
			continue
		}
		taken := netip.PrefixFrom(a, ones)
		for _, n := range []struct {
			net  netip.Prefix
			flag string
		}{{o.Uplink, "--uplink"}, {o.Overlay, "--overlay"}} {
			if taken.Overlaps(n.net) {
				return fmt.Errorf("this machine has a route to %v, which overlaps %v: choose another network with %s", taken, n.net, n.flag)
			}
		}
	}
	return nil
}

// checkForeign refuses names that somebody else uses. It is asked before the
// environment exists.
func checkForeign(o *Options, cvms []instance) error {
	names := []string{o.bridge(), o.tunnel()}
	for _, c := range cvms {
		names = append(names, o.veth(c.index))
	}
	for _, name := range names {
		l, err := linkByName(name)
		if err != nil {
			return err
		}
		if l != nil && l.Attrs().Alias != o.owner() {
			return fmt.Errorf("there is an interface %s that dstack dev did not make: remove it, or choose another --name", name)
		}
	}
	for _, c := range cvms {
		path := filepath.Join(namespaceDir, o.namespace(c.name))
		if _, err := os.Lstat(path); err == nil && !ownNamespace(o, c) {
			return fmt.Errorf("there is a network namespace %s that dstack dev did not make: remove it (ip netns delete), or choose another --name", o.namespace(c.name))
		}
	}
	return nil
}

// ownNamespace says whether a namespace is connected to one of our interfaces.
func ownNamespace(o *Options, c instance) bool {
	l, err := linkByName(o.veth(c.index))
	return err == nil && l != nil && l.Attrs().Alias == o.owner()
}

// linkByName is nil without an error if there is no such interface.
func linkByName(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up interface %s: %w", name, err)
	}
	return l, nil
}

// ensureBridge makes the bridge with its address.
func ensureBridge(o *Options) error {
	name := o.bridge()
	l, err := linkByName(name)
	if err != nil {
		return err
	}
	if l == nil {
		b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
		if err := netlink.LinkAdd(b); err != nil {
			return fmt.Errorf("create bridge %s: %w", name, explain(err, "bridge"))
		}
		if l, err = linkByName(name); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetAlias(l, o.owner()); err != nil {
		return fmt.Errorf("mark %s as ours: %w", name, err)
	}
	addr := netip.PrefixFrom(o.hostUplink(), o.Uplink.Bits())
	if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: ipNet(addr)}); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, addr, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// ensureCVMNetwork makes the namespace of a CVM and its cable.
func ensureCVMNetwork(o *Options, c instance) error {
	name := o.namespace(c.name)
	if err := ensureNamespace(name); err != nil {
		return err
	}
	ns, err := netns.GetFromName(name)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", name, err)
	}
	defer ns.Close()
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("enter network namespace %s: %w", name, err)
	}
	defer inside.Close()

	outer, err := linkByName(o.veth(c.index))
	if err != nil {
		return err
	}
	if _, ierr := inside.LinkByName("eth0"); outer != nil && ierr != nil {
		// A cable whose other end is elsewhere.
		if err := netlink.LinkDel(outer); err != nil {
			return fmt.Errorf("remove %s: %w", o.veth(c.index), err)
		}
		outer = nil
	}
	bridge, err := netlink.LinkByName(o.bridge())
	if err != nil {
		return fmt.Errorf("look up %s: %w", o.bridge(), err)
	}
	if outer == nil {
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: o.veth(c.index), MasterIndex: bridge.Attrs().Index},
			PeerName:      "eth0",
			PeerNamespace: netlink.NsFd(ns),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("create the veth pair %s: %w", o.veth(c.index), explain(err, "veth"))
		}
		if outer, err = netlink.LinkByName(o.veth(c.index)); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetAlias(outer, o.owner()); err != nil {
		return fmt.Errorf("mark %s as ours: %w", o.veth(c.index), err)
	}
	if err := netlink.LinkSetUp(outer); err != nil {
		return fmt.Errorf("set %s up: %w", o.veth(c.index), err)
	}
	for link, addr := range map[string]netip.Prefix{
		"lo":   netip.MustParsePrefix("127.0.0.1/8"),
		"eth0": netip.PrefixFrom(o.guestUplink(c.index), o.Uplink.Bits()),
	} {
		l, err := inside.LinkByName(link)
		if err == nil {
			err = inside.AddrReplace(l, &netlink.Addr{IPNet: ipNet(addr)})
		}
		if err == nil {
			err = inside.LinkSetUp(l)
		}
		if err != nil {
			return fmt.Errorf("set up %s in namespace %s: %w", link, name, err)
		}
	}
	return nil
}

// ensureNamespace makes a named network namespace, as ip-netns(8) does.
func ensureNamespace(name string) error {
	path := filepath.Join(namespaceDir, name)
	var fsInfo unix.Statfs_t
	switch err := unix.Statfs(path, &fsInfo); {
	case err == nil && fsInfo.Type == unix.NSFS_MAGIC:
		return nil
	case err == nil:
		// The name outlived its namespace: a crash between the two.
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove the dead network namespace %s: %w", name, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("look up network namespace %s: %w", name, err)
	}
	done := make(chan error)
	go func() {
		// The thread is in the new namespace afterwards. It ends with this
		// goroutine, because it stays locked.
		runtime.LockOSThread()
		ns, err := netns.NewNamed(name)
		if err == nil {
			err = ns.Close()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("create network namespace %s: %w", name, err)
	}
	return nil
}

// inNamespace runs f on a thread in the named namespace; what f starts is there
// as well. An empty name is the namespace of this process.
func inNamespace(name string, f func() error) error {
	if name == "" {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good, see ensureNamespace
		ns, err := netns.GetFromName(name)
		if err == nil {
			err = netns.Set(ns)
			ns.Close()
		}
		if err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// removeNetwork takes away what ensure made, as far as it is there.
func removeNetwork(o *Options, cvms []instance) error {
	var failed []error
	for _, c := range cvms {
		if err := netns.DeleteNamed(o.namespace(c.name)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOENT) {
			if errors.Is(err, unix.EINVAL) { // no longer mounted, the name alone is left
				err = os.Remove(filepath.Join(namespaceDir, o.namespace(c.name)))
			}
			if err != nil {
				failed = append(failed, fmt.Errorf("remove network namespace %s: %w", o.namespace(c.name), err))
			}
		}
	}
	links := []string{o.tunnel(), o.bridge()}
	for _, c := range cvms {
		links = append(links, o.veth(c.index))
	}
	for _, name := range links {
		l, err := linkByName(name)
		if err == nil && l != nil {
			err = netlink.LinkDel(l)
			// The kernel takes a veth away with its namespace, in its own time.
			if errors.Is(err, unix.ENODEV) {
				err = nil
			}
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("remove interface %s: %w", name, err))
		}
	}
	// A gateway that was killed leaves the socket of its userspace WireGuard.
	if err := os.Remove(filepath.Join(wireguardDir, o.tunnel()+".sock")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		failed = append(failed, fmt.Errorf("remove the socket of interface %s: %w", o.tunnel(), err))
	}
	return errors.Join(failed...)
}

// leftovers lists what is still there of an environment's network.
func leftovers(o *Options, cvms []instance) []string {
	var left []string
	links := []string{o.tunnel(), o.bridge()}
	for _, c := range cvms {
		links = append(links, o.veth(c.index))
		if _, err := os.Lstat(filepath.Join(namespaceDir, o.namespace(c.name))); err == nil {
			left = append(left, "network namespace "+o.namespace(c.name))
		}
	}
	for _, name := range links {
		if l, err := linkByName(name); err == nil && l != nil {
			left = append(left, "interface "+name)
		}
	}
	return left
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// explain adds what to do about a kernel that lacks a kind of interface.
func explain(err error, module string) error {
	if errors.Is(err, unix.EOPNOTSUPP) || strings.Contains(err.Error(), "not supported") {
		return fmt.Errorf("%w (this kernel has no %s interfaces: load the module with \"modprobe %s\", or use a kernel that has it)", err, module, module)
	}
	return err
}
