package cvm

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

const (
	tunnelPort = 9182
	keepalive  = 25 * time.Second
)

// tunnelConf is the CVM's end of the tunnels to all gateways.
type tunnelConf struct {
	key     wgtypes.Key // private
	address netip.Addr
	servers []server // by public key text
}

// server is one gateway.
type server struct {
	key      wgtypes.Key
	address  netip.Addr
	endpoint netip.AddrPort
}

// readAnswer takes the tunnel from the answer to a registration.
func readAnswer(key wgtypes.Key, wg *gatewaypb.WireGuardConfig) (*tunnelConf, error) {
	if wg == nil || len(wg.Servers) == 0 {
		return nil, errors.New("the gateway's answer names no WireGuard server")
	}
	address, err := netip.ParseAddr(wg.ClientIp)
	if err != nil {
		return nil, fmt.Errorf("the gateway's answer: client_ip: %w", err)
	}
	c := &tunnelConf{key: key, address: address}
	for i, s := range wg.Servers {
		k, err := wgtypes.ParseKey(s.Pk)
		if err != nil {
			return nil, fmt.Errorf("the gateway's answer: server %d: pk: %w", i, err)
		}
		ip, _, _ := strings.Cut(s.Ip, "/")
		a, err := netip.ParseAddr(ip)
		if err != nil {
			return nil, fmt.Errorf("the gateway's answer: server %d: ip: %w", i, err)
		}
		e, err := netip.ParseAddrPort(s.Endpoint)
		if err != nil || !e.Addr().Is4() {
			return nil, fmt.Errorf("the gateway's answer: server %d: endpoint %q is not IPv4 digits and a port", i, s.Endpoint)
		}
		c.servers = append(c.servers, server{k, a, e})
	}
	slices.SortFunc(c.servers, func(a, b server) int { return cmp.Compare(a.key.String(), b.key.String()) })
	return c, nil
}

// text is the configuration as guests write it for wg-quick (guest spec 5.10).
// It holds the private key.
func (c *tunnelConf) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "[Interface]\nPrivateKey = %s\nListenPort = %d\nAddress = %s/32\n\n", c.key, tunnelPort, c.address)
	for _, s := range c.servers {
		fmt.Fprintf(&b, "[Peer]\nPublicKey = %s\nAllowedIPs = %s/32\nEndpoint = %s\nPersistentKeepalive = %d\n",
			s.key, s.address, s.endpoint, int(keepalive/time.Second))
	}
	return b.String()
}

// uapi is the configuration in the protocol of userspace devices
// (https://www.wireguard.com/xplatform/).
func (c *tunnelConf) uapi() string {
	var b strings.Builder
	fmt.Fprintf(&b, "private_key=%x\nlisten_port=%d\nreplace_peers=true\n", c.key[:], tunnelPort)
	for _, s := range c.servers {
		fmt.Fprintf(&b, "public_key=%x\nendpoint=%s\npersistent_keepalive_interval=%d\nreplace_allowed_ips=true\nallowed_ip=%s/32\n",
			s.key[:], s.endpoint, int(keepalive/time.Second), s.address)
	}
	return b.String()
}
