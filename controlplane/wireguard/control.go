package wireguard

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// controlChunk is the number of peers in one request. Above 32 peers wgctrl
// falls back to one request a peer.
const controlChunk = 32

// control is the backend for a device that lives outside this process: kernel
// WireGuard over generic netlink, or a foreign userspace implementation over
// its UAPI socket.
type control struct {
	name string

	mu     sync.Mutex
	client *wgctrl.Client // nil: to be opened
	kind   wgtypes.DeviceType
}

func newControl(name string) *control { return &control{name: name} }

// use runs f with a client. wgctrl looks for the netlink family only when a
// client is made, so a client that finds no device is thrown away: the module
// may be loaded later.
func (c *control) use(f func(*wgctrl.Client) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client == nil {
		client, err := wgctrl.New()
		if err != nil {
			return fmt.Errorf("open the WireGuard control interface: %w", err)
		}
		c.client = client
	}
	err := f(c.client)
	if errors.Is(err, os.ErrNotExist) {
		c.client.Close()
		c.client = nil
		return fmt.Errorf("%s: %w", c.name, ErrNotWireGuard)
	}
	return err
}

func (c *control) dump() (*devState, error) {
	var dev *wgtypes.Device
	err := c.use(func(client *wgctrl.Client) (err error) {
		dev, err = client.Device(c.name)
		if err == nil {
			c.kind = dev.Type
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the WireGuard state of %s: %w", c.name, err)
	}
	st := &devState{privateKey: dev.PrivateKey, listenPort: dev.ListenPort, peers: make([]devPeer, len(dev.Peers))}
	for i := range dev.Peers {
		p := &dev.Peers[i]
		out := &st.peers[i]
		*out = devPeer{
			key:       p.PublicKey,
			handshake: p.LastHandshakeTime,
			rx:        uint64(p.ReceiveBytes),
			tx:        uint64(p.TransmitBytes),
			keepalive: p.PersistentKeepaliveInterval,
			nAllowed:  len(p.AllowedIPs),
		}
		// The kernel reports "never" as the Unix epoch.
		if out.handshake.Unix() <= 0 {
			out.handshake = time.Time{}
		}
		if p.Endpoint != nil {
			ep := p.Endpoint.AddrPort()
			out.endpoint = netip.AddrPortFrom(ep.Addr().Unmap(), ep.Port())
		}
		if len(p.AllowedIPs) > 0 {
			out.allowed = prefixFromIPNet(p.AllowedIPs[0])
		}
	}
	return st, nil
}

func (c *control) apply(ch change) error {
	cfgs := make([]wgtypes.Config, 0, 1+len(ch.peers)/controlChunk)
	if ch.privateKey != nil || ch.listenPort != nil {
		cfgs = append(cfgs, wgtypes.Config{PrivateKey: ch.privateKey, ListenPort: ch.listenPort})
	}
	for peers := ch.peers; len(peers) > 0; {
		n := min(len(peers), controlChunk)
		cfg := wgtypes.Config{Peers: make([]wgtypes.PeerConfig, n)}
		for i, p := range peers[:n] {
			cfg.Peers[i] = peerConfig(p)
		}
		cfgs = append(cfgs, cfg)
		peers = peers[n:]
	}
	for _, cfg := range cfgs {
		err := c.use(func(client *wgctrl.Client) error { return client.ConfigureDevice(c.name, cfg) })
		if err != nil {
			return fmt.Errorf("configure WireGuard interface %s: %w", c.name, err)
		}
	}
	return nil
}

func (c *control) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.client == nil {
		return nil
	}
	err := c.client.Close()
	c.client = nil
	return err
}

// implementation says who runs the device, after a successful dump.
func (c *control) implementation() wgtypes.DeviceType {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kind
}

func peerConfig(p peerChange) wgtypes.PeerConfig {
	if p.remove {
		return wgtypes.PeerConfig{PublicKey: p.key, Remove: true}
	}
	cfg := wgtypes.PeerConfig{
		PublicKey:         p.key,
		ReplaceAllowedIPs: true,
		AllowedIPs:        []net.IPNet{ipNet(netip.PrefixFrom(p.ip, p.ip.BitLen()))},
	}
	if p.keepalive {
		interval := keepalive
		cfg.PersistentKeepaliveInterval = &interval
	}
	if p.endpoint.IsValid() {
		cfg.Endpoint = net.UDPAddrFromAddrPort(p.endpoint)
	}
	return cfg
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefixFromIPNet(n net.IPNet) netip.Prefix {
	addr, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones)
}
