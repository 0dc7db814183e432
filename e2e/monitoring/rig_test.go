package monitoring

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane"
	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/dev/cvm"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// The rig. The test starts itself again in a fresh network namespace, and once more
// for a CVM:
//
//	 gateway, Prometheus, clients (this test)         CVM (runCVM)
//	+-------------------------------------+          +-------------------+
//	| wg-mon 10.8.0.1/16                  |  tunnel  | wg0 10.8.0.x      |
//	|      \__________________________ = = = = = = = ____/ page on 50051  |
//	| vmon 10.99.0.1/24  ----------------- veth ------ eth0 10.99.0.2/24 |
//	| lo: proxy 8443, admin 8001, DNS 53, webhook, Prometheus 9090       |
//	+-------------------------------------+          +-------------------+
//
// Nothing of it is visible outside, and all of it goes with the processes.

const (
	netnsEnv = "MONITORING_TEST_NETNS"
	cvmEnv   = "MONITORING_TEST_CVM"

	adminToken   = "a-token-of-the-monitoring-test"
	adminAddr    = "127.0.0.1:8001"
	proxyAddr    = "127.0.0.1:8443"
	baseDomain   = "apps.test"
	customDomain = "www.shop.test"
	hostUplink   = "10.99.0.1"
	cvmUplink    = "10.99.0.2"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(cvmEnv); path != "" {
		if err := runCVM(path); err != nil {
			fmt.Fprintln(os.Stderr, "CVM:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// inNetns runs the calling test in a namespace of its own and reports whether this
// process is the one inside.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Getenv(netnsEnv) != "" {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("creating network namespaces and WireGuard interfaces needs root")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=55s")
	cmd.Env = append(os.Environ(), netnsEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in the namespace: %v", err)
	}
	if err != nil || testing.Verbose() {
		t.Logf("output from the namespace:\n%s", out)
	}
	if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Error("the test did not pass in the namespace")
	}
	return false
}

// privateRun keeps WireGuard's control sockets inside the namespace.
func privateRun(t *testing.T) {
	t.Helper()
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == nil {
		err = os.MkdirAll("/var/run/wireguard", 0o700)
	}
	if err == nil {
		err = unix.Mount("none", "/var/run/wireguard", "tmpfs", 0, "mode=0700")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// linkUp gives an interface an address and switches it on.
func linkUp(name string, address string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if address != "" {
		a, err := netlink.ParseAddr(address)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("address %s of %s: %w", address, name, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("switch %s on: %w", name, err)
	}
	return nil
}

// rig is a gateway with all that it needs, one CVM and clients.
type rig struct {
	t     *testing.T
	dir   string
	roots *x509.CertPool // of the platform's certificate
	app   string         // id of the CVM's app
	echo  uint16         // port of a TLS server on 127.0.0.1
	admin *http.Client
}

// startRig returns when the CVM is reachable through the gateway.
func startRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir(), admin: &http.Client{Timeout: 5 * time.Second}}
	privateRun(t)
	r.check(linkUp("lo", ""))

	ca, err := ratls.NewCA(time.Now)
	r.check(err)
	gatewayApp := sha256.Sum256([]byte("gateway"))
	r.issue(ca, ratls.App{ID: gatewayApp[:20], Subject: "gateway", Names: []string{hostUplink}, ServerAuth: true, ClientAuth: true}, "rpc.crt", "rpc.key")
	r.write("ca.crt", ca.CertificatePEM())
	r.platformCert()
	r.startDNS()
	r.startEcho()
	webhook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }))
	t.Cleanup(webhook.Close)

	uplink := r.startCVM(ca, gatewayApp[:20])
	r.check(linkUp(uplink, hostUplink+"/24"))
	r.startGateway(webhook.URL)
	return r
}

func (r *rig) check(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) write(name string, data []byte) {
	r.t.Helper()
	r.check(os.WriteFile(r.path(name), data, 0o600))
}

func (r *rig) issue(ca *ratls.CA, app ratls.App, cert, key string) {
	r.t.Helper()
	app.NotAfter = time.Now().Add(time.Hour)
	c, err := ca.Issue(app)
	r.check(err)
	r.check(c.WriteFiles(r.path(cert), r.path(key)))
}

// platformCert is the certificate of *.apps.test, good for 60 days.
func (r *rig) platformCert() {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	r.check(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: baseDomain}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(60 * 24 * time.Hour), DNSNames: []string{"*." + baseDomain, customDomain}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, leaf, leaf, &key.PublicKey, key)
	r.check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	r.check(err)
	r.write("proxy.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	r.write("proxy.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	cert, err := x509.ParseCertificate(der)
	r.check(err)
	r.roots = x509.NewCertPool()
	r.roots.AddCert(cert)
}

// startDNS answers the one custom domain.
func (r *rig) startDNS() {
	r.t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:53")
	r.check(err)
	srv := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(q)
		m.RecursionAvailable = true
		if n := q.Question[0].Name; n == "_dstack-app-address."+customDomain+"." {
			m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: n, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 1}, Txt: []string{fmt.Sprintf("localhost:%d", r.echo)}}}
		} else {
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m) // the client left
	})}
	go func() { _ = srv.ActivateAndServe() }()
	r.t.Cleanup(func() { _ = srv.Shutdown() })
}

// startEcho is an app with its own TLS, for passthrough.
func (r *rig) startEcho() {
	r.t.Helper()
	cert, err := tls.LoadX509KeyPair(r.path("proxy.crt"), r.path("proxy.key"))
	r.check(err)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	r.check(err)
	r.echo = uint16(l.Addr().(*net.TCPAddr).Port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	r.t.Cleanup(func() { l.Close() })
}

// startCVM starts the guest process, which registers as soon as there is a gateway.
// The result is the interface that leads to it.
func (r *rig) startCVM(ca *ratls.CA, gatewayApp []byte) string {
	r.t.Helper()
	const compose = `{"manifest_version":2,"name":"web","runner":"docker-compose","port_policy":{"ports":[{"port":50051,"pp":false}],"restrict_mode":true}}`
	// The CVM's nginx is not needed here; its other servers are.
	idle := "#!/bin/sh\nexec sleep 600\n"
	r.check(os.WriteFile(r.path("nginx"), []byte(idle), 0o700))
	instance := sha256.Sum256([]byte("instance"))
	c := &cvm.Config{
		Name: "web-1", InstanceID: hex.EncodeToString(instance[:20]), Compose: compose, ReportPolicy: true,
		GatewayURL: "https://" + hostUplink + ":8000", GatewayAppID: hex.EncodeToString(gatewayApp),
		WireGuard: cvm.WireGuardUserspace, Refresh: time.Second, Stale: time.Minute, Poll: time.Second,
		Uplink: netip.MustParsePrefix(cvmUplink + "/24"), Nginx: r.path("nginx"), NginxUser: "root", Dir: r.path("cvm"),
	}
	r.check(os.Mkdir(c.Dir, 0o700))
	parsed, err := cvm.ParseCompose(compose)
	r.check(err)
	r.app = parsed.AppIDHex()
	info := &ratls.AppInfo{AppID: parsed.AppID[:], ComposeHash: parsed.Hash[:], InstanceID: instance[:20], DeviceID: make([]byte, 32)}
	r.issue(ca, ratls.App{ID: parsed.AppID[:], Info: info, Subject: "cvm", ClientAuth: true}, "cvm/"+cvm.FileClientCert, "cvm/"+cvm.FileClientKey)
	r.write("cvm/"+cvm.FileCA, ca.CertificatePEM())
	for from, to := range map[string]string{"proxy.crt": cvm.FileSiteCert, "proxy.key": cvm.FileSiteKey} {
		data, err := os.ReadFile(r.path(from))
		r.check(err)
		r.write("cvm/"+to, data)
	}
	text, err := json.Marshal(c)
	r.check(err)
	r.write("cvm/"+cvm.FileConfig, text)

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), cvmEnv+"="+c.Path(cvm.FileConfig))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	log := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = log, log
	r.check(cmd.Start())
	r.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := cmd.Wait(); err != nil || r.t.Failed() {
			r.t.Logf("CVM: %v\n%s", err, log)
		}
	})
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "vmon", MTU: 1500}, PeerName: "eth0", PeerNamespace: netlink.NsPid(cmd.Process.Pid)}
	r.check(netlink.LinkAdd(veth))
	return veth.Name
}

// runCVM is the whole guest process.
func runCVM(path string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c, err := cvm.LoadConfig(path)
	if err != nil {
		return err
	}
	if err := linkUp("lo", ""); err != nil {
		return err
	}
	for { // eth0 arrives from outside
		if err = linkUp("eth0", c.Uplink.String()); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
	return cvm.Run(ctx, c, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

// startGateway runs the daemon's own code on a configuration file.
func (r *rig) startGateway(webhook string) {
	r.t.Helper()
	key, err := wgtypes.GeneratePrivateKey()
	r.check(err)
	text := fmt.Sprintf(`
address = "%[1]s:8000"
[tls]
key = "%[2]s/rpc.key"
certs = "%[2]s/rpc.crt"
[tls.mutual]
ca_certs = "%[2]s/ca.crt"
[core]
preflight = "off"
[core.auth]
enabled = true
url = "%[3]s"
[core.admin]
enabled = true
address = "%[4]s"
auth_token = "%[5]s"
[core.debug]
insecure_skip_attestation = true
insecure_localhost_backend = true
[core.sync]
enabled = true
node_id = 7
my_url = "https://%[1]s:8000"
data_dir = "%[2]s/data"
[core.wg]
private_key = "%[6]s"
ip = "10.8.0.1/16"
reserved_net = ["10.8.0.1/32"]
client_ip_range = "10.8.0.0/18"
interface = "wg-mon"
endpoint = "%[1]s:51820"
config_path = "%[2]s/peers.conf"
mode = "userspace"
[core.proxy]
listen_addr = "127.0.0.1"
listen_port = 8443
base_domain = "%[7]s"
cert_chain = "%[2]s/proxy.crt"
cert_key = "%[2]s/proxy.key"
app_address_dns_servers = ["127.0.0.1:53"]
`, hostUplink, r.dir, webhook, adminAddr, adminToken, key, baseDomain)
	r.write("gateway.toml", []byte(text))
	cfg, _, err := config.Load(config.LoadOptions{Path: r.path("gateway.toml"), Dir: r.dir, EtcDir: r.dir})
	r.check(err)
	log := new(lockedBuffer)
	ctx, stop := context.WithCancel(context.Background())
	g, err := controlplane.New(ctx, controlplane.Options{Config: cfg, Logger: slog.New(slog.NewTextHandler(log, nil)),
		Version: "0.0.0", Revision: "0123456789abcdef", Env: func(string) string { return "" }})
	if err != nil {
		stop()
		r.t.Fatalf("gateway: %v\n%s", err, log)
	}
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	r.t.Cleanup(func() {
		stop()
		if err := <-done; err != nil || r.t.Failed() {
			r.t.Logf("gateway: %v\n%s", err, log)
		}
	})
}

// lockedBuffer is written by one goroutine and read by another.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// dial is a TLS connection to a name behind the gateway.
func (r *rig) dial(name string) (*tls.Conn, error) {
	d := &net.Dialer{Timeout: 5 * time.Second}
	c, err := tls.DialWithDialer(d, "tcp", proxyAddr, &tls.Config{ServerName: name, RootCAs: r.roots})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(10 * time.Second))
}

// page asks the CVM for its page: through the tunnel, TLS ends at the gateway.
func (r *rig) page() error {
	c, err := r.dial(fmt.Sprintf("%s-%d.%s", r.app, cvm.PortGRPC, baseDomain))
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !strings.Contains(string(answer), "web-1 instance") {
		return fmt.Errorf("page %q", answer)
	}
	return nil
}

// pass sends bytes through a passthrough connection and back.
func (r *rig) pass(name string, size int) error {
	c, err := r.dial(name)
	if err != nil {
		return err
	}
	defer c.Close()
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, size))
		sent <- err
	}()
	_, err = io.CopyN(io.Discard, c, int64(size))
	return errors.Join(err, <-sent)
}

// refused expects that no connection comes about.
func (r *rig) refused(name string) error {
	c, err := r.dial(name)
	if err == nil {
		c.Close()
		return fmt.Errorf("%s was served", name)
	}
	return nil
}

// call asks the admin server; token may be wrong on purpose.
func (r *rig) call(path, token string) (status int, body []byte, err error) {
	req, err := http.NewRequest(http.MethodGet, "http://"+adminAddr+path, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := r.admin.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	body, err = io.ReadAll(res.Body)
	return res.StatusCode, body, err
}

// traffic is the ordinary day of a gateway: mostly served, some of it nonsense.
func (r *rig) traffic(ctx context.Context) {
	// Not by connections: the refusals would be trouble that the alerts see.
	waitFor(r.t, 20*time.Second, "the CVM's tunnel", func() error {
		_, body, err := r.call("/metrics", adminToken)
		if err == nil && !bytes.Contains(body, []byte(`dstack_gateway_instances{node_id="7",state="online"} 1`)) {
			err = errors.New("the instance is not online")
		}
		return err
	})
	echo := fmt.Sprintf("localhost-%ds.%s", r.echo, baseDomain)
	for token, want := range map[string]int{adminToken: http.StatusOK, "wrong": http.StatusUnauthorized} {
		if status, _, err := r.call("/prpc/Status", token); err != nil || status != want {
			r.t.Fatalf("Status with token %q: HTTP %d, %v", token, status, err)
		}
	}
	idle, err := r.dial(fmt.Sprintf("%s-%d.%s", r.app, cvm.PortGRPC, baseDomain))
	r.check(err)
	r.check(idle.SetDeadline(time.Time{}))
	var wg sync.WaitGroup
	wg.Go(func() {
		defer idle.Close()
		for i := 0; ; i++ {
			steps := []func() error{r.page, r.page, r.page, r.page, func() error { return r.pass(echo, 1000) }, func() error { return r.pass(customDomain, 1000) }}
			if i%10 == 0 {
				steps = append(steps,
					func() error { return r.pass(echo, 8<<20) }, // worth a splice
					func() error { return r.refused("nosuchapp." + baseDomain) },
					func() error { return r.refused("unknown.example.com") },
					func() error { return r.refused("localhost-1s." + baseDomain) }, // nothing listens
					func() error {
						status, _, err := r.call("/prpc/Status", adminToken)
						if err == nil && status != http.StatusOK {
							err = fmt.Errorf("Status: HTTP %d", status)
						}
						return err
					})
			}
			for _, step := range steps {
				if ctx.Err() != nil {
					return
				}
				if err := step(); err != nil && ctx.Err() == nil {
					r.t.Errorf("traffic: %v", err)
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	r.t.Cleanup(wg.Wait)
}

// waitFor repeats f until it succeeds.
func waitFor(t *testing.T, patience time.Duration, what string, f func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s: %v", patience, what, err)
		}
	}
}
