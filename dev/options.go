package dev

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"time"

	"github.com/dstack-gw/dstack-gw/dev/cvm"
)

// Options are what can be chosen. Defaults makes a complete set.
type Options struct {
	// StateDir holds everything, absolute. It is removed by Down.
	StateDir string `json:"state_dir"`
	// Name begins the names of interfaces and network namespaces.
	Name string `json:"name"`
	// BaseDomain is the domain of the apps.
	BaseDomain string `json:"base_domain"`
	// CustomDomain is led to an app by a TXT record.
	CustomDomain string `json:"custom_domain"`
	// Proxy is where the gateway takes connections to apps.
	Proxy netip.AddrPort `json:"proxy"`
	// Admin and DNS are on this machine only.
	Admin netip.AddrPort `json:"admin"`
	DNS   netip.AddrPort `json:"dns"`
	// RPCPort (TCP) and WireGuardPort (UDP) are on the bridge's address.
	RPCPort       uint16 `json:"rpc_port"`
	WireGuardPort uint16 `json:"wireguard_port"`
	// Uplink is the network between this machine and the CVMs, Overlay the one
	// inside the tunnels. The first host of each is this machine.
	Uplink  netip.Prefix `json:"uplink"`
	Overlay netip.Prefix `json:"overlay"`
	// WireGuard is auto, kernel or userspace, for gateway and CVMs.
	WireGuard string `json:"wireguard"`
	// Refresh is the time between two registrations of a CVM, Stale how old its
	// last handshake may be before it builds its tunnel anew, Poll how often it
	// looks. A live tunnel has a handshake every two minutes.
	Refresh time.Duration `json:"refresh"`
	Stale   time.Duration `json:"stale"`
	Poll    time.Duration `json:"poll"`
	// Gateway is the dstack-gw program, Self this one.
	Gateway string `json:"gateway"`
	Self    string `json:"self"`
}

// DefaultStateDir is where everything is unless told otherwise.
const DefaultStateDir = "/var/lib/dstack-dev"

// Defaults is a complete set but for the programs.
func Defaults() Options {
	return Options{
		StateDir:      DefaultStateDir,
		Name:          "dstackdev",
		BaseDomain:    "apps.dstack.test",
		CustomDomain:  "www.shop.test",
		Proxy:         netip.MustParseAddrPort("127.0.0.1:8443"),
		Admin:         netip.MustParseAddrPort("127.0.0.1:8011"),
		DNS:           netip.MustParseAddrPort("127.0.0.1:8053"),
		RPCPort:       8010,
		WireGuardPort: 51830,
		Uplink:        netip.MustParsePrefix("10.213.0.0/24"),
		Overlay:       netip.MustParsePrefix("10.214.0.0/24"),
		WireGuard:     cvm.WireGuardAuto,
		Refresh:       180 * time.Second,
		Stale:         180 * time.Second,
		Poll:          10 * time.Second,
	}
}

// maxName leaves room for the longest suffix in the 15 bytes of an interface.
const maxName = 11

// Check finds what cannot work, before anything is touched.
func (o *Options) Check() error {
	if !filepath.IsAbs(o.StateDir) || filepath.Clean(o.StateDir) == "/" {
		return fmt.Errorf("state directory %q: give an absolute path of a directory of its own", o.StateDir)
	}
	if len(o.Name) > maxName || !regexp.MustCompile(`^[a-z][a-z0-9]*$`).MatchString(o.Name) {
		return fmt.Errorf("name %q: want 1 to %d small letters and digits, first a letter", o.Name, maxName)
	}
	domain := regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	for _, d := range []struct{ what, name string }{{"base domain", o.BaseDomain}, {"custom domain", o.CustomDomain}} {
		if len(d.name) > 200 || !domain.MatchString(d.name) {
			return fmt.Errorf("%s %q is no lower-case DNS name of two or more labels", d.what, d.name)
		}
	}
	if parentOf(o.CustomDomain) == o.BaseDomain {
		return fmt.Errorf("custom domain %s is directly under the base domain, where names are app ids; choose another", o.CustomDomain)
	}
	for _, n := range []struct {
		what string
		net  netip.Prefix
	}{{"uplink network", o.Uplink}, {"overlay network", o.Overlay}} {
		if !n.net.IsValid() || !n.net.Addr().Is4() || n.net.Bits() < 8 || n.net.Bits() > 27 || n.net.Masked() != n.net {
			return fmt.Errorf("%s %v: want an IPv4 network between /8 and /27 without host bits", n.what, n.net)
		}
	}
	if o.Uplink.Overlaps(o.Overlay) {
		return fmt.Errorf("uplink network %v and overlay network %v overlap", o.Uplink, o.Overlay)
	}
	for _, a := range []struct {
		what string
		addr netip.AddrPort
	}{{"proxy", o.Proxy}, {"admin", o.Admin}, {"DNS", o.DNS}} {
		if !a.addr.IsValid() || !a.addr.Addr().Is4() || a.addr.Port() == 0 {
			return fmt.Errorf("%s address %v: want IPv4 and a port", a.what, a.addr)
		}
	}
	if !o.Admin.Addr().IsLoopback() || !o.DNS.Addr().IsLoopback() {
		return errors.New("the admin and DNS addresses must be loopback addresses")
	}
	if o.RPCPort == 0 || o.WireGuardPort == 0 {
		return errors.New("the RPC and WireGuard ports must not be 0")
	}
	switch o.WireGuard {
	case cvm.WireGuardAuto, cvm.WireGuardKernel, cvm.WireGuardUserspace:
	default:
		return fmt.Errorf("WireGuard mode %q is none of auto, kernel, userspace", o.WireGuard)
	}
	if o.Refresh < time.Second || o.Stale < time.Second || o.Poll < 100*time.Millisecond {
		return errors.New("refresh and stale must be at least 1s, poll at least 100ms")
	}
	return nil
}

// Names of what is visible on the machine.

func (o *Options) bridge() string            { return o.Name + "-br" }
func (o *Options) tunnel() string            { return o.Name + "-wg" }
func (o *Options) veth(i int) string         { return fmt.Sprintf("%s-v%d", o.Name, i+1) }
func (o *Options) namespace(c string) string { return o.Name + "-" + c }

// owner is the alias of every interface that belongs to this environment.
func (o *Options) owner() string { return "dstack dev " + o.StateDir }

// Addresses.

func (o *Options) hostUplink() netip.Addr  { return o.Uplink.Addr().Next() }
func (o *Options) hostOverlay() netip.Addr { return o.Overlay.Addr().Next() }

// guestUplink is the uplink address of CVM i.
func (o *Options) guestUplink(i int) netip.Addr {
	a := o.hostUplink()
	for range i + 9 {
		a = a.Next()
	}
	return a
}

func (o *Options) rpcURL() string {
	return "https://" + netip.AddrPortFrom(o.hostUplink(), o.RPCPort).String()
}
