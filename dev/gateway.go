package dev

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/template"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/ratls"
)

// Files of the gateway, in state.gateway.
const (
	fileGatewayConf = "gateway.toml"
	fileRPCCert     = "rpc.crt"
	fileRPCKey      = "rpc.key"
	fileRPCCA       = "ca.crt"
	fileProxyCert   = "proxy.crt"
	fileProxyKey    = "proxy.key"
	fileAdminToken  = "admin.token"
	fileTunnelKey   = "wg.key"
)

// rpcCertValidity is the life of certificates that the development CA gives to
// the gateway and the CVMs. Released guests take 10 days and ask their KMS again.
const rpcCertValidity = 397 * 24 * time.Hour

const gatewayTemplate = `# Written by "dstack dev up" and overwritten by the next one.
address = {{printf "%q" .RPC}}

[tls]
key = {{printf "%q" .RPCKey}}
certs = {{printf "%q" .RPCCert}}

[tls.mutual]
ca_certs = {{printf "%q" .RPCCA}}
mandatory = false

[core.admin]
enabled = true
address = {{printf "%q" .Admin}}
auth_token = {{printf "%q" .Token}}

[core.debug]
# There is no guest agent beside this gateway that could tell its own app id.
insecure_skip_attestation = true

[core.sync]
data_dir = {{printf "%q" .Data}}
my_url = {{printf "%q" .URL}}

[core.wg]
private_key = {{printf "%q" .PrivateKey}}
public_key = {{printf "%q" .PublicKey}}
listen_port = {{.WireGuardPort}}
ip = {{printf "%q" .IP}}
reserved_net = [{{printf "%q" .Reserved}}]
client_ip_range = {{printf "%q" .Range}}
config_path = {{printf "%q" .Peers}}
interface = {{printf "%q" .Interface}}
endpoint = {{printf "%q" .Endpoint}}
mode = {{printf "%q" .Mode}}

[core.proxy]
listen_addr = {{printf "%q" .ProxyAddr}}
listen_port = {{.ProxyPort}}
tls_versions = ["1.2", "1.3"]
base_domain = {{printf "%q" .BaseDomain}}
cert_chain = {{printf "%q" .ProxyCert}}
cert_key = {{printf "%q" .ProxyKey}}
app_address_dns_servers = [{{printf "%q" .DNS}}]
`

// gatewayConf renders gateway.toml.
func gatewayConf(o *Options, token string, key wgtypes.Key) ([]byte, error) {
	s := state{o.StateDir}
	t, err := template.New(fileGatewayConf).Parse(gatewayTemplate)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, map[string]any{
		"RPC":           fmt.Sprintf("%s:%d", o.hostUplink(), o.RPCPort),
		"RPCKey":        s.gateway(fileRPCKey),
		"RPCCert":       s.gateway(fileRPCCert),
		"RPCCA":         s.gateway(fileRPCCA),
		"Admin":         o.Admin.String(),
		"Token":         token,
		"Data":          s.gateway("data"),
		"URL":           o.rpcURL(),
		"PrivateKey":    key.String(),
		"PublicKey":     key.PublicKey().String(),
		"WireGuardPort": o.WireGuardPort,
		"IP":            fmt.Sprintf("%s/%d", o.hostOverlay(), o.Overlay.Bits()),
		"Reserved":      o.hostOverlay().String() + "/32",
		"Range":         o.Overlay.String(),
		"Peers":         s.gateway("peers.conf"),
		"Interface":     o.tunnel(),
		"Endpoint":      fmt.Sprintf("%s:%d", o.hostUplink(), o.WireGuardPort),
		"Mode":          o.WireGuard,
		"ProxyAddr":     o.Proxy.Addr().String(),
		"ProxyPort":     o.Proxy.Port(),
		"BaseDomain":    o.BaseDomain,
		"ProxyCert":     s.gateway(fileProxyCert),
		"ProxyKey":      s.gateway(fileProxyKey),
		"DNS":           o.DNS.String(),
	})
	return b.Bytes(), err
}

// issue makes sure that files hold a certificate of the development CA for the
// app that is good for a while.
func issue(ca *ratls.CA, app ratls.App, certPath, keyPath string, now func() time.Time) error {
	if goodFor(certPath, keyPath, ca, app, now()) {
		return nil
	}
	app.NotAfter = now().Add(rpcCertValidity)
	cred, err := ca.Issue(app)
	if err != nil {
		return fmt.Errorf("issue a certificate to %s: %w", app.Subject, err)
	}
	return cred.WriteFiles(certPath, keyPath)
}

// gatewayReady asks the admin server until it says that everything works. The
// error is what it said last.
func gatewayReady(ctx context.Context, o *Options, token string, died <-chan struct{}, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	last := fmt.Errorf("no answer at %s", o.Admin)
	for {
		err := askReady(ctx, client, "http://"+o.Admin.String()+"/ready", token)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-died:
			return fmt.Errorf("the gateway ended")
		case <-ctx.Done():
			return fmt.Errorf("the gateway is not ready after %v: %w", patience, last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func askReady(ctx context.Context, client *http.Client, url, token string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 16<<10))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s: %s", url, res.Status, strings.TrimSpace(string(body)))
	}
	return nil
}

// gatewayAppIDHex is what guests look for in the gateway's certificate.
func gatewayAppIDHex() string {
	id := gatewayAppID()
	return hex.EncodeToString(id[:])
}

// goodFor says whether files hold what issue would put there.
func goodFor(certPath, keyPath string, ca *ratls.CA, app ratls.App, now time.Time) bool {
	pair, err := tls.LoadX509KeyPair(certPath, keyPath)
	if err != nil || pair.Leaf.NotAfter.Sub(now) < renewBefore {
		return false
	}
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(ca.Certificate())
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return false
		}
		middle.AddCert(c)
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: middle, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return false
	}
	id, err := ratls.Identify(context.Background(), pair.Leaf, nil)
	if err != nil || !bytes.Equal(id.AppID, app.ID) {
		return false
	}
	if (id.Info == nil) != (app.Info == nil) || app.Info != nil && !bytes.Equal(id.Info.Encode(), app.Info.Encode()) {
		return false
	}
	var names []string
	for _, ip := range pair.Leaf.IPAddresses {
		names = append(names, ip.String())
	}
	names = append(names, pair.Leaf.DNSNames...)
	slices.Sort(names)
	want := slices.Clone(app.Names)
	slices.Sort(want)
	return slices.Equal(names, want)
}
