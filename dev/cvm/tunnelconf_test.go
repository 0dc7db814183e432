package cvm

import (
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

func testKey(first byte) wgtypes.Key {
	k := wgtypes.Key{first}
	for i := range k[1:] {
		k[i+1] = byte(i)
	}
	return k
}

func TestTunnelText(t *testing.T) {
	private := testKey(1)
	// Ordered by their text, which is not the order of their bytes.
	first, second := testKey(0xf0), testKey(0x10)
	c, err := readAnswer(private, &gatewaypb.WireGuardConfig{
		ClientIp: "10.8.0.2",
		Servers: []*gatewaypb.WireGuardPeer{
			{Pk: second.String(), Ip: "10.8.64.1/16", Endpoint: "203.0.113.8:51820"},
			{Pk: first.String(), Ip: "10.8.0.1/16", Endpoint: "203.0.113.7:51820"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "[Interface]\nPrivateKey = " + private.String() + "\nListenPort = 9182\nAddress = 10.8.0.2/32\n\n" +
		"[Peer]\nPublicKey = " + first.String() + "\nAllowedIPs = 10.8.0.1/32\nEndpoint = 203.0.113.7:51820\nPersistentKeepalive = 25\n" +
		"[Peer]\nPublicKey = " + second.String() + "\nAllowedIPs = 10.8.64.1/32\nEndpoint = 203.0.113.8:51820\nPersistentKeepalive = 25\n"
	if got := c.text(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	uapi := c.uapi()
	for _, line := range []string{
		"private_key=" + hex.EncodeToString(private[:]),
		"listen_port=9182",
		"public_key=" + hex.EncodeToString(first[:]) + "\nendpoint=203.0.113.7:51820\npersistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.8.0.1/32\n",
	} {
		if !strings.Contains(uapi, line) {
			t.Errorf("the device is not told %q:\n%s", line, uapi)
		}
	}
}

func TestReadAnswerRefuses(t *testing.T) {
	good := func() *gatewaypb.WireGuardConfig {
		return &gatewaypb.WireGuardConfig{
			ClientIp: "10.8.0.2",
			Servers:  []*gatewaypb.WireGuardPeer{{Pk: testKey(2).String(), Ip: "10.8.0.1/16", Endpoint: "203.0.113.7:51820"}},
		}
	}
	if _, err := readAnswer(testKey(1), good()); err != nil {
		t.Fatalf("the unbroken answer is refused: %v", err)
	}
	for _, tt := range []struct {
		name, want string
		damage     func(*gatewaypb.WireGuardConfig)
	}{
		{"no server", "names no WireGuard server", func(c *gatewaypb.WireGuardConfig) { c.Servers = nil }},
		{"address", "client_ip", func(c *gatewaypb.WireGuardConfig) { c.ClientIp = "10.8.0" }},
		{"key", "pk", func(c *gatewaypb.WireGuardConfig) { c.Servers[0].Pk = "AAAA" }},
		{"server address", "ip", func(c *gatewaypb.WireGuardConfig) { c.Servers[0].Ip = "gateway" }},
		{"endpoint name", "IPv4 digits", func(c *gatewaypb.WireGuardConfig) { c.Servers[0].Endpoint = "gw.example:51820" }},
		{"endpoint IPv6", "IPv4 digits", func(c *gatewaypb.WireGuardConfig) { c.Servers[0].Endpoint = "[2001:db8::1]:51820" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := good()
			tt.damage(c)
			if _, err := readAnswer(testKey(1), c); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func TestParseHandshakes(t *testing.T) {
	for _, tt := range []struct {
		text string
		want int64
	}{
		{"private_key=00\n", 0},
		{"public_key=00\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\n", 0},
		{"last_handshake_time_sec=5\nlast_handshake_time_sec=9\nlast_handshake_time_sec=7\n", 9},
	} {
		got, err := parseHandshakes(tt.text)
		if err != nil || tt.want == 0 != got.IsZero() || tt.want != 0 && !got.Equal(time.Unix(tt.want, 0)) {
			t.Errorf("%q: got %v, %v", tt.text, got, err)
		}
	}
	if _, err := parseHandshakes("last_handshake_time_sec=soon\n"); err == nil {
		t.Error("nonsense is accepted")
	}
}

func TestLoadKeyKeepsIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wg.key")
	first, err := LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadKey(path)
	if err != nil || first != second {
		t.Errorf("the key changed from one start to the next (%v)", err)
	}
	if err := os.WriteFile(path, []byte("secret nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(path); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v, want an error that does not show the file", err)
	}
}

func TestHostNet(t *testing.T) {
	if got := hostNet(netip.MustParseAddr("10.8.0.2")).String(); got != "10.8.0.2/32" {
		t.Error(got)
	}
}
