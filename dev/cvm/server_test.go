package cvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
)

const testCompose = `{"manifest_version":2,"name":"web","runner":"docker-compose","port_policy":{"ports":[{"port":80,"pp":false},{"port":8081,"pp":true}],"restrict_mode":true}}`

func testConfig(t *testing.T) *Config {
	t.Helper()
	return &Config{
		Name:         "web-1",
		InstanceID:   strings.Repeat("ab", 20),
		Compose:      testCompose,
		GatewayURL:   "https://192.0.2.1:8010",
		GatewayAppID: strings.Repeat("cd", 20),
		WireGuard:    WireGuardAuto,
		Refresh:      180 * time.Second,
		Stale:        180 * time.Second,
		Poll:         10 * time.Second,
		Uplink:       netip.MustParsePrefix("192.0.2.2/24"),
		Nginx:        "nginx",
		NginxUser:    "www-data",
		Dir:          t.TempDir(),
	}
}

func TestParseCompose(t *testing.T) {
	c, err := ParseCompose(testCompose)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(testCompose))
	if c.AppIDHex() != hex.EncodeToString(sum[:20]) {
		t.Errorf("app id %s is not the head of the compose hash", c.AppIDHex())
	}
	if p := c.Policy; p == nil || !p.RestrictMode || len(p.Ports) != 2 || p.Ports[1].Port != 8081 || !p.Ports[1].Pp {
		t.Errorf("policy %v", p)
	}
	for _, bad := range []string{"", "{}", `{"manifest_version":2,"name":"x"}`, `{"manifest_version":2,"name":"x","runner":"r","port_policy":{"ports":[{"port":65536}]}}`} {
		if _, err := ParseCompose(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// A gateway finds the port policy where it looks for it.
func TestAgentInfo(t *testing.T) {
	c := testConfig(t)
	h, err := agentHandler(c)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	defer srv.Close()
	client, err := prpc.NewClient(srv.URL+"/prpc", srv.Client())
	if err != nil {
		t.Fatal(err)
	}
	info := new(guestpb.AppInfo)
	if err := client.Call(t.Context(), "Info", &emptypb.Empty{}, info); err != nil {
		t.Fatal(err)
	}
	var tcb struct {
		AppCompose string `json:"app_compose"`
	}
	if err := json.Unmarshal([]byte(info.TcbInfo), &tcb); err != nil {
		t.Fatal(err)
	}
	if tcb.AppCompose != c.Compose {
		t.Errorf("app_compose is %q", tcb.AppCompose)
	}
	if hex.EncodeToString(info.InstanceId) != c.InstanceID {
		t.Errorf("instance id %x", info.InstanceId)
	}
}

// The server on PortGRPC speaks gRPC and HTTP on one port without TLS.
func TestGRPCServer(t *testing.T) {
	c := testConfig(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: grpcHandler(c), Protocols: &p}
	go srv.Serve(l)
	defer srv.Close()

	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var header metadata.MD
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.Header(&header))
	if err != nil {
		t.Fatal(err)
	}
	if resp.Status != healthpb.HealthCheckResponse_SERVING || strings.Join(header.Get(InstanceHeader), "") != "web-1" {
		t.Errorf("status %v, header %v", resp.Status, header)
	}

	web := &http.Client{Transport: &http.Transport{Protocols: &p}}
	defer web.CloseIdleConnections()
	res, err := web.Get("http://" + l.Addr().String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || !strings.HasPrefix(string(body), "web-1 instance "+c.InstanceID+" port 50051 HTTP/2.0") {
		t.Errorf("page %q, %v", body, err)
	}
}

// nginx itself says whether it understands the configuration.
func TestNginxConf(t *testing.T) {
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		if nginx = "/usr/sbin/nginx"; os.Geteuid() != 0 {
			t.Skip("nginx checks its ports, which needs root")
		}
	}
	if _, err := os.Stat(nginx); err != nil {
		t.Fatalf("nginx is needed (Debian package nginx-light): %v", err)
	}
	c := testConfig(t)
	conf, err := nginxConf(c)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := ratls.NewCA(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	cred, err := ca.Issue(ratls.App{ID: make([]byte, 20), Subject: "site", Names: []string{"site.test"}, ServerAuth: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := cred.WriteFiles(c.Path(FileSiteCert), c.Path(FileSiteKey)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.Dir, FileNginxConf)
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(nginx, "-t", "-p", c.Dir, "-e", "stderr", "-c", path).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestLoadConfig(t *testing.T) {
	c := testConfig(t)
	write := func(c *Config) string {
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), FileConfig)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	got, err := LoadConfig(write(c))
	if err != nil {
		t.Fatal(err)
	}
	if *got != *c {
		t.Errorf("got %+v, want %+v", got, c)
	}
	for _, tt := range []struct {
		want   string
		damage func(*Config)
	}{
		{"name is empty", func(c *Config) { c.Name = "" }},
		{"instance_id is not 40 hex digits", func(c *Config) { c.InstanceID = "abc" }},
		{"gateway_app_id is not 40 hex digits", func(c *Config) { c.GatewayAppID = strings.Repeat("x", 40) }},
		{"none of auto", func(c *Config) { c.WireGuard = "none" }},
		{"must be positive", func(c *Config) { c.Poll = 0 }},
		{"not absolute", func(c *Config) { c.Dir = "here" }},
		{"app-compose", func(c *Config) { c.Compose = "{" }},
	} {
		bad := *c
		tt.damage(&bad)
		if _, err := LoadConfig(write(&bad)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want an error with %q", err, tt.want)
		}
	}
}

func TestRegisterBase(t *testing.T) {
	for _, url := range []string{"https://g:1", "https://g:1/", "https://g:1/prpc", "https://g:1/prpc/"} {
		if got := registerBase(url); got != "https://g:1/prpc" {
			t.Errorf("%s becomes %s", url, got)
		}
	}
}

// The gateway is believed only with the platform's CA and its own app id.
func TestRegisterChecksTheGateway(t *testing.T) {
	platform, other := newCA(t), newCA(t)
	gatewayID := make([]byte, 20)
	gatewayID[0] = 0xcd
	for _, tt := range []struct {
		name string
		ca   *ratls.CA
		id   []byte
		want string // in the error, "" = accepted
	}{
		{"the gateway", platform, gatewayID, ""},
		{"another app", platform, make([]byte, 20), "not to the gateway"},
		{"another platform", other, gatewayID, "certificate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := testConfig(t)
			c.GatewayAppID = hex.EncodeToString(gatewayID)
			issue := func(ca *ratls.CA, app ratls.App) *ratls.Credential {
				cred, err := ca.Issue(app)
				if err != nil {
					t.Fatal(err)
				}
				return cred
			}
			client := issue(platform, ratls.App{ID: make([]byte, 20), Subject: "dstack-guest-agent", ClientAuth: true})
			if err := client.WriteFiles(c.Path(FileClientCert), c.Path(FileClientKey)); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(c.Path(FileCA), platform.CertificatePEM(), 0o600); err != nil {
				t.Fatal(err)
			}
			conf, err := clientTLS(c)
			if err != nil {
				t.Fatal(err)
			}
			server := issue(tt.ca, ratls.App{ID: tt.id, Subject: "gateway", Names: []string{"127.0.0.1"}, ServerAuth: true})
			err = handshake(t, conf, server)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
