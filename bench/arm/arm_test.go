package arm

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"maps"
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

	"github.com/BurntSushi/toml"
)

func TestHost(t *testing.T) {
	const id = "b0a7000000000000000000000000000000000001"
	for _, c := range []struct {
		mode    Mode
		service Service
		want    string
	}{
		{Passthrough, Requests, id + "-443s.bench.test"},
		{Passthrough, Bulk, id + "-444s.bench.test"},
		{Terminate, Requests, id + "-8080.bench.test"},
		{Terminate, Bulk, id + "-8081.bench.test"},
	} {
		if got := Host(c.mode, c.service); got != c.want {
			t.Errorf("%s %s: %s", c.mode, c.service, got)
		}
	}
}

func TestModernOpenSSL(t *testing.T) {
	for text, want := range map[string]bool{
		"Built with OpenSSL version : OpenSSL 1.1.1\nRunning on OpenSSL version : OpenSSL 3.0.22 25 Aug 2026\n": false,
		"Running on OpenSSL version : OpenSSL 3.5.1 1 Jul 2025\n":                                               true,
		"nginx version: nginx/1.22.1\nbuilt with OpenSSL 3.0.22 25 Aug 2026\nTLS SNI support enabled\n":         false,
		"built with OpenSSL 3.10.0 1 Jan 2028\n":                                                                true,
		"built with OpenSSL 4.0.0 1 Jan 2028\n":                                                                 true,
		"built with LibreSSL 3.9\n":                                                                             false,
		"":                                                                                                      false,
	} {
		if got := modernOpenSSL(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestPick(t *testing.T) {
	got := pick("Name: HAProxy\nPipesUsed: 3\nPipesFree:0\n\nTotalBytesOut : no\n", "PipesUsed", "PipesFree", "Absent")
	if want := map[string]string{"PipesUsed": "3", "PipesFree": "0"}; !maps.Equal(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestLacks(t *testing.T) {
	for _, c := range []struct {
		arm  Arm
		need Need
		can  bool
	}{
		{L3{}, Need{Mode: Passthrough}, true},
		{L3{}, Need{Mode: Terminate}, false},
		{L3{}, Need{Mode: Passthrough, Control: true}, false},
		{HAProxy{}, Need{Mode: Terminate}, true},
		{HAProxy{}, Need{Mode: Terminate, PostQuantum: true}, false},
		{HAProxy{PostQuantum: true}, Need{Mode: Terminate, PostQuantum: true}, true},
		{HAProxy{Splice: true}, Need{Mode: Terminate}, false},
		{HAProxy{Splice: true}, Need{Mode: Passthrough}, true},
		{Nginx{}, Need{Mode: Passthrough, PostQuantum: true}, true},
		{Nginx{}, Need{Mode: Terminate, PostQuantum: true}, false},
		{Nginx{}, Need{Mode: Passthrough, Control: true}, false},
		{Dstack{}, Need{Mode: Terminate, PostQuantum: true, Control: true}, true},
	} {
		if why := c.arm.Lacks(c.need); (why == "") != c.can {
			t.Errorf("%s, %+v: %q", c.arm.Name(), c.need, why)
		}
	}
}

func TestCertificate(t *testing.T) {
	now := time.Now()
	c, err := NewCertificate(now)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(c.Chain, c.Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := pair.Leaf.VerifyHostname(Host(Terminate, Bulk)); err != nil || now.Before(pair.Leaf.NotBefore) || now.After(pair.Leaf.NotAfter) {
		t.Errorf("%v, from %v to %v", err, pair.Leaf.NotBefore, pair.Leaf.NotAfter)
	}
}

// The peers themselves must find nothing wrong with their configurations.
func TestPeerConfigs(t *testing.T) {
	dir := t.TempDir()
	cert, err := NewCertificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"chain.pem": cert.Chain, "key.pem": cert.Key, "haproxy.pem": append(append([]byte{}, cert.Chain...), cert.Key...),
	} {
		if _, err := write(dir, name, text); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		arm    Arm
		config string
		argv   []string
	}{
		{HAProxy{}, HAProxy{}.config(dir), []string{"haproxy", "-c", "-f"}},
		{HAProxy{Splice: true}, HAProxy{Splice: true}.config(dir), []string{"haproxy", "-c", "-f"}},
		{Nginx{}, Nginx{}.config(dir), []string{"nginx", "-t", "-p", dir, "-c"}},
	} {
		t.Run(c.arm.Name(), func(t *testing.T) {
			if err := c.arm.Check(); err != nil {
				t.Skip(err)
			}
			if os.Geteuid() != 0 {
				t.Skip("the peers' own checks resolve users and ports as root only")
			}
			path, err := write(dir, c.arm.Name()+".conf", []byte(c.config))
			if err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(c.argv[0], append(c.argv[1:], path)...).CombinedOutput()
			// nginx binds its addresses to test them, and the rig's do not exist here.
			if err != nil && !strings.Contains(string(out), "syntax is ok") {
				t.Errorf("%v: %s", err, out)
			}
			if v, err := c.arm.Version(context.Background()); err != nil || v == "" {
				t.Errorf("version %q, %v", v, err)
			}
		})
	}
	if got := strings.Count(HAProxy{Splice: true}.Config(), "option splice-"); got != 2 {
		t.Errorf("%d splice options in the splicing arm", got)
	}
	if got := strings.Count(HAProxy{}.Config(), "option splice-"); got != 0 {
		t.Errorf("%d splice options in the copying arm", got)
	}
}

func TestDstackConfig(t *testing.T) {
	d := Dstack{Label: "ours", Extra: "[core.proxy.tcp_splice]\nafter_bytes = 1\n"}
	var c struct {
		Core struct {
			Admin struct {
				Token string `toml:"auth_token"`
			}
			WG struct {
				Interface string
				Pool      string   `toml:"client_ip_range"`
				Reserved  []string `toml:"reserved_net"`
			}
			Proxy struct {
				Port   int    `toml:"listen_port"`
				Base   string `toml:"base_domain"`
				Splice struct {
					After int `toml:"after_bytes"`
				} `toml:"tcp_splice"`
			}
		}
	}
	if _, err := toml.Decode(d.config("/somewhere", "t0ken"), &c); err != nil {
		t.Fatal(err)
	}
	if c.Core.Admin.Token != "t0ken" || c.Core.WG.Interface != "gwb" || c.Core.WG.Pool != "10.99.0.0/16" ||
		c.Core.WG.Reserved[0] != "10.99.0.1/32" || c.Core.Proxy.Port != 443 || c.Core.Proxy.Base != Base || c.Core.Proxy.Splice.After != 1 {
		t.Errorf("got %+v", c)
	}
	if strings.Contains(d.Config(), "t0ken") {
		t.Error("the report would contain a token")
	}
}

func TestDstackCheck(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", filepath.Join(dir, "absent"), plain} {
		if err := (Dstack{Label: "ours", Binary: path}).Check(); err == nil {
			t.Errorf("%q accepted", path)
		}
	}
	if err := (Dstack{Label: "ours", Binary: "/bin/sh"}).Check(); err != nil {
		t.Error(err)
	}
}

func TestPeer(t *testing.T) {
	for _, name := range Known() {
		if a, err := Peer(context.Background(), name); err != nil || a.Name() != name {
			t.Errorf("%s: %v, %v", name, a, err)
		}
	}
	if _, err := Peer(context.Background(), "envoy"); err == nil || !strings.Contains(err.Error(), "haproxy-splice") {
		t.Errorf("unknown arm: %v", err)
	}
}

// Requests as the gateway spec describes them: JSON posted to /prpc/Method?json, the admin token as a bearer token.
func TestControl(t *testing.T) {
	mux := http.NewServeMux()
	var got []string
	handle := func(path, answer string) {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			got = append(got, fmt.Sprintf("%s %s?%s %q %s", r.Host, r.URL.Path, r.URL.RawQuery, r.Header.Get("Authorization"), body))
			io.WriteString(w, answer)
		})
	}
	handle("/prpc/RegisterCvm", `{"wg":{"client_ip":"10.99.0.2","servers":[]},"agent":null,"gateways":[]}`)
	handle("/prpc/SetInstancePortPolicy", "null")
	handle("/prpc/Status", `{"id":1,"accel":{"ktls_mode":"off","splice_engaged":7}}`)
	srv := httptest.NewServer(mux)
	defer srv.Close()
	ctl := newControl("t0ken", func(string) (net.Conn, error) { return net.Dial("tcp", srv.Listener.Addr().String()) })
	defer ctl.Close()
	ctx := context.Background()
	ip, err := ctl.Register(ctx, "app", "inst")
	if err != nil || ip != netip.MustParseAddr("10.99.0.2") {
		t.Errorf("registered %v, %v", ip, err)
	}
	if err := ctl.Open(ctx, "inst"); err != nil {
		t.Error(err)
	}
	facts, err := ctl.accel(ctx)
	if want := map[string]string{"accel ktls mode": "off", "accel splice engaged": "7"}; err != nil || !maps.Equal(facts, want) {
		t.Errorf("facts %v, %v", facts, err)
	}
	if len(got) != 3 {
		t.Fatalf("requests: %q", got)
	}
	var reg map[string]string
	prefix := `127.0.0.1:8012 /prpc/RegisterCvm?json "" `
	if err := json.Unmarshal([]byte(strings.TrimPrefix(got[0], prefix)), &reg); err != nil ||
		len(reg["client_public_key"]) != 44 || reg["app_id"] != "app" || reg["instance_id"] != "inst" {
		t.Errorf("registration %q: %v", got[0], err)
	}
	if want := `127.0.0.1:8011 /prpc/SetInstancePortPolicy?json "Bearer t0ken" {"instance_id":"inst","policy":{"ports":[],"restrict_mode":false}}`; got[1] != want {
		t.Errorf("policy\n%s\nwant\n%s", got[1], want)
	}
	if err := ctl.call(ctx, debugPort, "Nothing", nil, nil); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("unknown method: %v", err)
	}
}
