package cvm

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// Ports of the servers in every CVM.
const (
	PortHTTP  = 80    // page
	PortAlt   = 8080  // page
	PortProxy = 8081  // page behind a PROXY header
	PortTLS   = 443   // page, TLS ends in the CVM
	PortGRPC  = 50051 // gRPC and a page, HTTP/2 without TLS
	PortAgent = 8090  // guest agent
)

// How the tunnel's CVM end is run.
const (
	WireGuardAuto      = "auto" // kernel if it can, else userspace
	WireGuardKernel    = "kernel"
	WireGuardUserspace = "userspace"
)

// Config is one CVM, as it stands in its cvm.json.
type Config struct {
	// Name is for people: "web-1".
	Name string `json:"name"`
	// InstanceID is hex.
	InstanceID string `json:"instance_id"`
	// Compose is the text of the app-compose.json. Its hash names the app.
	Compose string `json:"compose"`
	// ReportPolicy sends the port policy along with the registration, as guests
	// since 0.5.9 do. Without it the gateway has to ask the agent.
	ReportPolicy bool `json:"report_policy"`

	// GatewayURL is where to register, https, without /prpc.
	GatewayURL string `json:"gateway_url"`
	// GatewayAppID is the app id, hex, that the gateway's certificate must carry.
	GatewayAppID string `json:"gateway_app_id"`
	// WireGuard is one of the WireGuard constants.
	WireGuard string `json:"wireguard"`
	// Refresh is the time between two registrations, Stale how old a handshake may
	// get before the tunnel is built anew. Guests take 180 s for both.
	Refresh time.Duration `json:"refresh"`
	Stale   time.Duration `json:"stale"`
	// Poll is how often that is looked at. Guests take 10 s.
	Poll time.Duration `json:"poll"`

	// Uplink is the address of eth0 with its mask. It is configured from outside;
	// the CVM only waits for it.
	Uplink netip.Prefix `json:"uplink"`
	// Nginx is the program.
	Nginx string `json:"nginx"`
	// NginxUser runs nginx's workers.
	NginxUser string `json:"nginx_user"`

	// Dir holds the CVM's files, see the File constants.
	Dir string `json:"dir"`
}

// Files in Config.Dir. The first five are put there from outside.
const (
	FileConfig     = "cvm.json"
	FileClientCert = "client.crt" // chain that registers
	FileClientKey  = "client.key"
	FileCA         = "ca.crt"   // root of the gateway's certificate
	FileSiteCert   = "site.crt" // chain of PortTLS
	FileSiteKey    = "site.key"
	FileWGKey      = "wg.key"  // base64
	FileWGConf     = "wg.conf" // the tunnel as wg-quick would read it
	FileNginxConf  = "nginx.conf"
	FileStatus     = "status.json"
)

// LoadConfig reads a cvm.json.
func LoadConfig(path string) (*Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the CVM's configuration: %w", err)
	}
	c := new(Config)
	if err := json.Unmarshal(text, c); err != nil {
		return nil, fmt.Errorf("read the CVM's configuration %s: %w", path, err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("the CVM's configuration %s: %w", path, err)
	}
	return c, nil
}

func (c *Config) check() error {
	for _, f := range []struct{ name, value string }{
		{"name", c.Name}, {"gateway_url", c.GatewayURL}, {"nginx", c.Nginx}, {"nginx_user", c.NginxUser},
	} {
		if f.value == "" {
			return fmt.Errorf("%s is empty", f.name)
		}
	}
	for _, f := range []struct{ name, value string }{
		{"instance_id", c.InstanceID}, {"gateway_app_id", c.GatewayAppID},
	} {
		if b, err := hex.DecodeString(f.value); err != nil || len(b) != 20 {
			return fmt.Errorf("%s is not 40 hex digits", f.name)
		}
	}
	switch c.WireGuard {
	case WireGuardAuto, WireGuardKernel, WireGuardUserspace:
	default:
		return fmt.Errorf("wireguard %q is none of auto, kernel, userspace", c.WireGuard)
	}
	if c.Refresh <= 0 || c.Stale <= 0 || c.Poll <= 0 {
		return errors.New("refresh, stale and poll must be positive")
	}
	if !c.Uplink.IsValid() {
		return errors.New("uplink is no address with a mask")
	}
	if !filepath.IsAbs(c.Dir) {
		return fmt.Errorf("dir %q is not absolute", c.Dir)
	}
	_, err := ParseCompose(c.Compose)
	return err
}

// Path is where one of the files is.
func (c *Config) Path(file string) string { return filepath.Join(c.Dir, file) }
