package cvm

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/ratls"
)

const (
	tunnelName = "dstack-wg0"
	tunnelMTU  = 1420
)

// tunnel is the CVM's WireGuard interface, in the kernel or in this process.
// It is not safe for concurrent use.
type tunnel struct {
	want string // WireGuardAuto, ...
	log  *slog.Logger

	mode, reason string // in use, and why
	text         string // configuration in use, "" = down
	address      netip.Addr
	dev          *device.Device
	lastError    atomic.Pointer[string] // of the userspace device
}

// set builds the tunnel. It does nothing if the configuration is the one in use,
// unless force is set; otherwise the interface goes down first, as wg-quick does
// it in guests.
func (t *tunnel) set(c *tunnelConf, force bool) error {
	text := c.text()
	if text == t.text && !force {
		return nil
	}
	if err := t.down(); err != nil {
		return err
	}
	if err := t.up(c); err != nil {
		if derr := t.down(); derr != nil {
			return errors.Join(err, derr)
		}
		return err
	}
	t.text, t.address = text, c.address
	return nil
}

func (t *tunnel) isUp() bool { return t.text != "" }

func (t *tunnel) down() error {
	t.text = ""
	if t.dev != nil {
		t.dev.Close() // the interface goes with it
		t.dev = nil
	}
	l, err := netlink.LinkByName(tunnelName)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("remove the interface %s: %w", tunnelName, err)
	}
	return nil
}

func (t *tunnel) up(c *tunnelConf) error {
	t.mode, t.reason = WireGuardUserspace, "asked for"
	if t.want != WireGuardUserspace {
		err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: tunnelName, MTU: tunnelMTU}})
		switch {
		case err == nil:
			t.mode, t.reason = WireGuardKernel, "the kernel has WireGuard"
		case t.want == WireGuardKernel:
			return fmt.Errorf("create a kernel WireGuard interface: %w", err)
		case errors.Is(err, unix.EOPNOTSUPP):
			t.reason = "the kernel has no WireGuard"
		default:
			t.reason = "the kernel refused a WireGuard interface: " + err.Error()
		}
	}
	var err error
	if t.mode == WireGuardKernel {
		err = configureKernel(c)
	} else {
		err = t.startUserspace(c)
	}
	if err != nil {
		return fmt.Errorf("set up the tunnel (%s WireGuard): %w", t.mode, err)
	}
	return addresses(c)
}

func configureKernel(c *tunnelConf) error {
	ctl, err := wgctrl.New()
	if err != nil {
		return err
	}
	defer ctl.Close()
	port, ka := tunnelPort, keepalive
	conf := wgtypes.Config{PrivateKey: &c.key, ListenPort: &port, ReplacePeers: true}
	for _, s := range c.servers {
		conf.Peers = append(conf.Peers, wgtypes.PeerConfig{
			PublicKey:                   s.key,
			Endpoint:                    net.UDPAddrFromAddrPort(s.endpoint),
			PersistentKeepaliveInterval: &ka,
			ReplaceAllowedIPs:           true,
			AllowedIPs:                  []net.IPNet{*hostNet(s.address)},
		})
	}
	return ctl.ConfigureDevice(tunnelName, conf)
}

func (t *tunnel) startUserspace(c *tunnelConf) error {
	link, err := tun.CreateTUN(tunnelName, tunnelMTU)
	if err != nil {
		return fmt.Errorf("create TUN interface %s: %w (is the tun module loaded and /dev/net/tun there?)", tunnelName, err)
	}
	t.dev = device.NewDevice(link, conn.NewDefaultBind(), &device.Logger{
		Verbosef: func(format string, args ...any) { t.log.Debug(fmt.Sprintf(format, args...)) },
		Errorf: func(format string, args ...any) {
			text := fmt.Sprintf(format, args...)
			if old := t.lastError.Swap(&text); old == nil || *old != text {
				t.log.Warn("userspace WireGuard: " + text)
			}
		},
	})
	if err := t.dev.IpcSet(c.uapi()); err != nil {
		return err
	}
	return t.dev.Up()
}

// addresses gives the interface its address and the routes to the gateways.
func addresses(c *tunnelConf) error {
	l, err := netlink.LinkByName(tunnelName)
	if err != nil {
		return fmt.Errorf("look up %s: %w", tunnelName, err)
	}
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: hostNet(c.address)}); err != nil {
		return fmt.Errorf("give %s the address %s: %w", tunnelName, c.address, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", tunnelName, err)
	}
	for _, s := range c.servers {
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(s.address), Scope: netlink.SCOPE_LINK}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("route %s through %s: %w", s.address, tunnelName, err)
		}
	}
	return nil
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// handshake is the newest one with any gateway, zero if there was none.
func (t *tunnel) handshake() (time.Time, error) {
	switch {
	case !t.isUp():
		return time.Time{}, nil
	case t.dev != nil:
		text, err := t.dev.IpcGet()
		if err != nil {
			return time.Time{}, fmt.Errorf("ask the userspace device for handshakes: %w", err)
		}
		return parseHandshakes(text)
	}
	ctl, err := wgctrl.New()
	if err != nil {
		return time.Time{}, fmt.Errorf("ask the kernel for handshakes: %w", err)
	}
	defer ctl.Close()
	d, err := ctl.Device(tunnelName)
	if err != nil {
		return time.Time{}, fmt.Errorf("ask the kernel for handshakes: %w", err)
	}
	var newest time.Time
	for _, p := range d.Peers {
		if p.LastHandshakeTime.After(newest) && p.LastHandshakeTime.Unix() > 0 {
			newest = p.LastHandshakeTime
		}
	}
	return newest, nil
}

// parseHandshakes finds the newest handshake in a device's answer.
func parseHandshakes(text string) (time.Time, error) {
	var newest int64
	s := bufio.NewScanner(strings.NewReader(text))
	for s.Scan() {
		value, ok := strings.CutPrefix(s.Text(), "last_handshake_time_sec=")
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return time.Time{}, fmt.Errorf("the device's answer: last_handshake_time_sec: %w", err)
		}
		newest = max(newest, n)
	}
	if newest == 0 {
		return time.Time{}, nil
	}
	return time.Unix(newest, 0), nil
}

// LoadKey reads a WireGuard private key, or makes it: guests keep theirs as well.
func LoadKey(path string) (wgtypes.Key, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			return wgtypes.Key{}, fmt.Errorf("make a WireGuard key: %w", err)
		}
		return key, ratls.WriteFile(path, []byte(key.String()+"\n"))
	}
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("read the WireGuard key: %w", err)
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil {
		return wgtypes.Key{}, fmt.Errorf("%s is no WireGuard key; remove it to get a new one", path)
	}
	return key, nil
}
