package gateway

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/ratls"
)

const (
	base     = "gw.test" // base domain of the static certificate
	token    = "an-operators-token-of-32-letters"
	version  = "1.2.3"
	revision = "0123456789abcdef0123456789abcdef01234567"

	proxyPort = 443
	mainPort  = 8010
	adminPort = 8011
	debugPort = 8012
)

// settings are keys of the configuration by their full names.
type settings map[string]any

// gateway is one dstack-gw on the machine: an address of 127.0.0.0/8, a directory, and at most one process at a time.
type gateway struct {
	t    *testing.T
	ip   netip.Addr
	dir  string
	conf settings
	key  wgtypes.Key
	env  []string
	bin  string
	// wrap comes before the binary's path, for prlimit and the like.
	wrap []string
	proc *process
}

var gateways atomic.Uint32

// newGateway prepares a gateway; nil takes a default away.
func newGateway(t *testing.T, more settings) *gateway {
	t.Helper()
	needMachine(t)
	n := gateways.Add(1)
	g := &gateway{t: t, ip: netip.AddrFrom4([4]byte{127, 0, byte(1 + n/250), byte(1 + n%250)}), dir: t.TempDir(), key: newKey(t), bin: binary()}
	cred, err := platform(t).Issue(ratls.App{ID: gatewayApp[:], Subject: "gateway", Names: []string{g.ip.String(), "gateway.internal"}, ServerAuth: true, ClientAuth: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := cred.WriteFiles(g.path("rpc.crt"), g.path("rpc.key")); err != nil {
		t.Fatal(err)
	}
	write(t, g.path("ca.crt"), platform(t).CertificatePEM())
	web(t).issue(t, "*."+base).write(t, g.path("proxy.crt"), g.path("proxy.key"))
	g.conf = settings{
		"address": fmt.Sprintf("%s:%d", g.ip, mainPort), "tls.key": g.path("rpc.key"), "tls.certs": g.path("rpc.crt"), "tls.mutual.ca_certs": g.path("ca.crt"),
		"core.admin.enabled": true, "core.admin.address": fmt.Sprintf("%s:%d", g.ip, adminPort), "core.admin.auth_token": token,
		"core.debug.address": fmt.Sprintf("%s:%d", g.ip, debugPort), "core.debug.insecure_enable_debug_rpc": true, "core.debug.insecure_skip_attestation": true,
		"core.sync.node_id": 1, "core.sync.my_url": "https://gateway.internal:8010", "core.sync.data_dir": g.path("data"),
		"core.wg.mode": "none", "core.wg.private_key": g.key.String(), "core.wg.public_key": g.key.PublicKey().String(), "core.wg.ip": "10.8.0.1/16",
		"core.wg.reserved_net": []string{"10.8.0.1/32"}, "core.wg.client_ip_range": "10.8.0.0/16", "core.wg.config_path": g.path("wg.conf"), "core.wg.endpoint": "192.0.2.1:51820",
		"core.proxy.listen_addr": g.ip.String(), "core.proxy.listen_port": proxyPort, "core.proxy.tls_versions": []string{"1.2", "1.3"},
		"core.proxy.base_domain": base, "core.proxy.cert_chain": g.path("proxy.crt"), "core.proxy.cert_key": g.path("proxy.key"),
		"core.proxy.app_address_dns_servers": []string{"127.0.0.1:53"},
	}
	for k, v := range more {
		if v == nil {
			delete(g.conf, k)
			continue
		}
		g.conf[k] = v
	}
	t.Cleanup(func() {
		if g.proc != nil {
			g.kill()
		}
		if log, err := os.ReadFile(g.path("log")); err == nil && (bytes.Contains(log, []byte("DATA RACE")) || bytes.Contains(log, []byte("panic"))) {
			t.Errorf("the log of %s:\n%s", g.ip, log)
		}
		if t.Failed() {
			if log, err := os.ReadFile(g.path("log")); err == nil {
				t.Logf("end of the log of %s:\n%s", g.ip, log[max(0, len(log)-6000):])
			}
		}
	})
	return g
}

// startGateway is newGateway and start.
func startGateway(t *testing.T, more settings) *gateway {
	t.Helper()
	g := newGateway(t, more)
	g.start()
	return g
}

func (g *gateway) path(name string) string { return filepath.Join(g.dir, name) }

func (g *gateway) addr(port int) string { return fmt.Sprintf("%s:%d", g.ip, port) }

// toml is the configuration file.
func (g *gateway) toml() []byte {
	var b bytes.Buffer
	for _, k := range slices.Sorted(maps.Keys(g.conf)) {
		v, err := json.Marshal(g.conf[k]) // what these tests write looks the same in TOML
		if err != nil {
			g.t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s = %s\n", k, v)
	}
	return b.Bytes()
}

// launch starts the process and returns at once.
func (g *gateway) launch() {
	g.t.Helper()
	write(g.t, g.path("gateway.toml"), g.toml())
	argv := append(slices.Clone(g.wrap), g.bin, "-c", g.path("gateway.toml"))
	g.proc = launch(g.t, g.path("log"), g.env, argv)
}

// start returns when the gateway serves.
func (g *gateway) start() {
	g.t.Helper()
	g.launch()
	began := time.Now()
	for {
		resp, err := g.tryAdmin("GET", "/ready", "")
		if err == nil && resp.status == 200 {
			return
		}
		if !g.proc.alive() {
			g.t.Fatalf("the gateway ended at its start (%v):\n%s", g.proc.cmd.ProcessState, g.log())
		}
		if time.Since(began) > 30*time.Second {
			g.t.Fatalf("the gateway is not ready after 30 s: %v %+v", err, resp)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (g *gateway) kill() { g.proc.end(syscall.SIGKILL) }

// stop asks the process to end and returns its exit code.
func (g *gateway) stop() int { return g.proc.end(syscall.SIGTERM) }

func (g *gateway) log() string { return string(read(g.t, g.path("log"))) }

// logged waits until the log has a line with all texts and returns it.
func (g *gateway) logged(texts ...string) string {
	g.t.Helper()
	var found string
	within(g.t, 10*time.Second, func() error {
		for line := range strings.Lines(g.log()) {
			if !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(line, s) }) {
				found = line
				return nil
			}
		}
		return fmt.Errorf("no line of the log has all of %q", texts)
	})
	return found
}

// process is a running program.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
}

// launch appends the output to the file log.
func launch(t *testing.T, log string, env, argv []string) *process {
	t.Helper()
	f, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := &process{t: t, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), "RUST_LOG=info"), env...)
	p.cmd.Stdout, p.cmd.Stderr = f, f
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.done)
	}()
	return p
}

func (p *process) alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// end sends a signal and waits for the exit code.
func (p *process) end(s syscall.Signal) int {
	p.t.Helper()
	if p.alive() {
		p.cmd.Process.Signal(s)
	}
	return p.wait(20 * time.Second)
}

func (p *process) wait(d time.Duration) int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(d):
		p.cmd.Process.Kill()
		<-p.done
		p.t.Fatalf("the process was still there after %s", d)
	}
	return p.cmd.ProcessState.ExitCode()
}

// runIn runs a program to its end, within 20 s.
func runIn(t *testing.T, dir string, env []string, argv ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, append(os.Environ(), env...), &out, &errs
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%s did not end: %s%s", strings.Join(argv, " "), out.String(), errs.String())
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// answer is an HTTP answer that was read to its end.
type answer struct {
	status int
	header http.Header
	body   string
	proto  string
}

// ask makes one HTTP request.
func ask(hc *http.Client, method, url, body string, header ...string) (answer, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := hc.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(text), resp.Proto}, err
}

var plainClient = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: time.Second},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

func (g *gateway) tryAdmin(method, path, body string) (answer, error) {
	return ask(plainClient, method, "http://"+g.addr(adminPort)+path, body, "Authorization", "Bearer "+token)
}

// admin makes a call to the Admin service that succeeds.
func (g *gateway) admin(method, body string) string {
	g.t.Helper()
	a, err := g.tryAdmin("POST", "/prpc/Admin."+method+"?json", body)
	if err != nil || a.status != 200 {
		g.t.Fatalf("Admin.%s: %v %+v", method, err, a)
	}
	return a.body
}

// debug makes a call to the Debug service that succeeds.
func (g *gateway) debug(method, body string) string {
	g.t.Helper()
	a, err := ask(plainClient, "POST", "http://"+g.addr(debugPort)+"/prpc/"+method+"?json", body)
	if err != nil || a.status != 200 {
		g.t.Fatalf("Debug.%s: %v %+v", method, err, a)
	}
	return a.body
}

// guest is a CVM as the gateway's main server sees it: a certificate and a WireGuard key.
type guest struct {
	app, instance string // hex
	key           wgtypes.Key
	http          *http.Client
}

var (
	gatewayApp = idOf("the gateway itself")
	webApp     = idOf("web")
)

// idOf makes an id of 20 bytes from a name.
func idOf(name string) [20]byte { return sha1.Sum([]byte(name)) }

func appInfo(app, instance [20]byte) *ratls.AppInfo {
	return &ratls.AppInfo{AppID: app[:], InstanceID: instance[:], ComposeHash: bytes.Repeat([]byte{0xab}, 32), DeviceID: make([]byte, 32), OSImageHash: make([]byte, 32), KeyProviderInfo: []byte("{}")}
}

// newGuest makes an instance of webApp with a certificate of the platform.
func newGuest(t *testing.T, name string) *guest { return guestOf(t, appInfo(webApp, idOf(name))) }

func guestOf(t *testing.T, info *ratls.AppInfo) *guest {
	t.Helper()
	cred, err := platform(t).Issue(ratls.App{ID: info.AppID, Info: info, Subject: "guest", ClientAuth: true})
	if err != nil {
		t.Fatal(err)
	}
	return &guest{app: hex.EncodeToString(info.AppID), instance: hex.EncodeToString(info.InstanceID), key: newKey(t), http: rpcClient(t, cred)}
}

// rpcClient calls main servers; nil is an anonymous caller.
func rpcClient(t *testing.T, cred *ratls.Credential) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(platform(t).Certificate())
	conf := &tls.Config{RootCAs: roots}
	if cred != nil {
		conf.Certificates = []tls.Certificate{cred.TLS()}
	}
	return tlsClient(t, conf)
}

func tlsClient(t *testing.T, conf *tls.Config) *http.Client {
	tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: time.Second}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Timeout: 20 * time.Second, Transport: tr}
}

func (g *gateway) rpcURL(path string) string { return "https://" + g.addr(mainPort) + path }

// openPolicy opens every port of an instance.
const openPolicy = `,"port_policy":{"ports":[],"restrict_mode":false}`

func (v *guest) request() string {
	return fmt.Sprintf(`{"client_public_key":%q%s}`, v.key.PublicKey(), openPolicy)
}

// tryRegister makes one registration and returns the answer as it came.
func (v *guest) tryRegister(g *gateway) (answer, error) {
	return ask(v.http, "POST", g.rpcURL("/prpc/RegisterCvm?json"), v.request())
}

// register makes a registration that succeeds and returns the address and the whole answer.
func (v *guest) register(t *testing.T, g *gateway) (netip.Addr, string) {
	t.Helper()
	a, err := v.tryRegister(g)
	if err != nil || a.status != 200 {
		t.Fatalf("RegisterCvm: %v %+v", err, a)
	}
	return clientIP(t, a.body), a.body
}

func clientIP(t *testing.T, body string) netip.Addr {
	t.Helper()
	var r struct {
		WG struct {
			ClientIP netip.Addr `json:"client_ip"`
		} `json:"wg"`
	}
	if err := json.Unmarshal([]byte(body), &r); err != nil || !r.WG.ClientIP.IsValid() {
		t.Fatalf("no client_ip in %q: %v", body, err)
	}
	return r.WG.ClientIP
}

// tlsTo is a TLS connection to a name of the proxy.
func (g *gateway) tlsTo(name string, timeout time.Duration) (*tls.Conn, error) {
	return tls.DialWithDialer(&net.Dialer{Timeout: timeout, Deadline: time.Now().Add(timeout)}, "tcp", g.addr(proxyPort), &tls.Config{ServerName: name, RootCAs: webRoots})
}

// browser is an HTTP client for a label of the base domain; proto is what it offers by ALPN.
func (g *gateway) browser(t *testing.T, proto ...string) *http.Client {
	hc := tlsClient(t, &tls.Config{RootCAs: webRoots, NextProtos: proto})
	tr := hc.Transport.(*http.Transport)
	tr.ForceAttemptHTTP2 = slices.Contains(proto, "h2")
	tr.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, g.addr(proxyPort))
	}
	return hc
}

// get fetches / of a label of the base domain on a connection of its own and returns the body.
func (g *gateway) get(label string, timeout time.Duration) (string, error) {
	c, err := g.tlsTo(label+"."+base, timeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s.%s\r\nConnection: close\r\n\r\n", label, base)
	all, err := io.ReadAll(c)
	if err != nil {
		return "", err
	}
	head, body, ok := strings.Cut(string(all), "\r\n\r\n")
	if !ok || !strings.HasPrefix(head, "HTTP/1.1 200 ") {
		return "", fmt.Errorf("no page but %q", all)
	}
	return body, nil
}

// pages serves the name it is reached by (the address of an instance) and then text, on one port of all addresses.
func pages(t *testing.T, port int, text string) {
	t.Helper()
	l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	servePages(t, l, text)
}

func servePages(t *testing.T, l net.Listener, text string) {
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		at := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		fmt.Fprintf(w, "%s %s", at.IP, text)
	}), ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
}

// authority issues certificates of web servers.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

type webCert struct{ chain, key []byte }

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "e2e root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key}, err
}

var serials atomic.Int64

// issue makes a server's certificate for names; the first is its subject.
func (a *authority) issue(t *testing.T, names ...string) *webCert {
	t.Helper()
	return a.issueWith(t, func(c *x509.Certificate) {
		c.Subject.CommonName, c.DNSNames, c.ExtKeyUsage = names[0], names, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
}

func (a *authority) issueWith(t *testing.T, fill func(*x509.Certificate)) *webCert {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1000 + serials.Add(1)), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	fill(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &webCert{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (c *webCert) write(t *testing.T, chain, key string) {
	t.Helper()
	write(t, chain, c.chain)
	write(t, key, c.key)
}

// serial is that of the leaf.
func (c *webCert) serial(t *testing.T) int64 {
	t.Helper()
	b, _ := pem.Decode(c.chain)
	leaf, err := x509.ParseCertificate(b.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return leaf.SerialNumber.Int64()
}

var (
	platformCA = sync.OnceValues(func() (*ratls.CA, error) { return ratls.NewCA(time.Now) })
	webCA      = sync.OnceValues(func() (*authority, error) {
		a, err := newAuthority()
		if err == nil {
			webRoots.AddCert(a.cert)
		}
		return a, err
	})
	webRoots = x509.NewCertPool()
)

// platform is the CA that guests and gateways trust.
func platform(t *testing.T) *ratls.CA {
	t.Helper()
	ca, err := platformCA()
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// web is the CA that browsers trust, with webRoots.
func web(t *testing.T) *authority {
	t.Helper()
	ca, err := webCA()
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func newKey(t *testing.T) wgtypes.Key {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// within repeats f until it is content.
func within(t *testing.T, d time.Duration, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("not within %s: %v", d, err)
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s:\n got %q\nwant %q", what, g, w)
	}
}

func bcryptOf(t *testing.T, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}
