package gateway

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// TestAdminAuth: every request to the admin server needs a credential, and no credential reaches the log.
func TestAdminAuth(t *testing.T) {
	t.Parallel()
	g := newGateway(t, settings{"core.admin.htpasswd_file": "", "core.metrics.addr": nil})
	// htpasswd -nbB alice wonderland, cost 5
	write(t, g.path("htpasswd"), []byte("# operators\n\nalice:"+bcryptOf(t, "wonderland")+"\n"))
	g.conf["core.admin.htpasswd_file"] = g.path("htpasswd")
	g.env = []string{"RUST_LOG=trace"}
	g.start()
	at := "http://" + g.addr(adminPort)
	const status = "/prpc/Status"
	for _, c := range []struct {
		name, method, path string
		header             []string
		ok                 bool
	}{
		{"nothing", "GET", status, nil, false},
		{"nothing, unknown path", "GET", "/nothing/here", nil, false},
		{"nothing, dashboard", "GET", "/", nil, false},
		{"nothing, metrics", "GET", "/metrics", nil, false},
		{"nothing, health", "GET", "/health", nil, false},
		{"header", "GET", status, []string{"X-Admin-Token", token}, true},
		{"wrong header", "GET", status, []string{"X-Admin-Token", token + "x"}, false},
		{"bearer", "POST", status, []string{"Authorization", "Bearer " + token}, true},
		{"bearer in lower case", "GET", status, []string{"Authorization", "bearer " + token}, true},
		{"wrong bearer", "GET", status, []string{"Authorization", "Bearer x"}, false},
		{"wrong bearer, right query", "GET", status + "?token=" + token, []string{"Authorization", "Bearer x"}, false},
		{"basic, token as password", "GET", status, []string{"Authorization", basic("anyone", token)}, true},
		{"basic, token as user", "GET", status, []string{"Authorization", basic(token, "")}, true},
		{"basic, user of the file", "GET", status, []string{"Authorization", basic("alice", "wonderland")}, true},
		{"basic, wrong password", "GET", status, []string{"Authorization", basic("alice", "wonder")}, false},
		{"basic, unknown user", "GET", status, []string{"Authorization", basic("bob", "wonderland")}, false},
		{"query", "GET", status + "?token=" + token, nil, true},
		{"query, POST", "POST", status + "?token=" + token, nil, false},
		{"dashboard by query", "GET", "/?token=" + token, nil, true},
		{"metrics", "GET", "/metrics", []string{"X-Admin-Token", token}, true},
	} {
		a, err := ask(plainClient, c.method, at+c.path, "", c.header...)
		if err != nil {
			t.Fatal(err)
		}
		if c.ok && a.status != 200 {
			t.Errorf("%s: %+v", c.name, a)
		}
		if !c.ok && (a.status != 401 || a.body != "" || a.header.Get("WWW-Authenticate") != `Basic realm="dstack-gateway admin"`) {
			t.Errorf("%s: %+v", c.name, a)
		}
	}
	for _, secret := range []string{token, "wonder", g.key.String(), base64.StdEncoding.EncodeToString([]byte("alice:wonderland"))} {
		if strings.Contains(g.log(), secret) {
			t.Errorf("the log holds %q", secret)
		}
	}

	g.kill()
	delete(g.conf, "core.admin.auth_token")
	delete(g.conf, "core.admin.htpasswd_file")
	g.launch()
	if code := g.proc.wait(10 * time.Second); code != 1 {
		t.Errorf("without any credential: exit code %d", code)
	}
	g.logged("core.admin.auth_token", "core.admin.insecure_no_auth")
	g.env = []string{"ADMIN_API_TOKEN= " + token + "\n"}
	g.start()
}

// TestAdminShapes: the answers that scripts and dashboards read, to the byte where they are constant.
func TestAdminShapes(t *testing.T) {
	t.Parallel()
	g := startGateway(t, settings{"core.proxy.listen_prot": 1})
	g.logged("level=WARN", "core.proxy.listen_prot", "core.proxy.listen_port") // a typo is no reason not to start
	v := newGuest(t, "one")
	v.register(t, g)
	g.admin("AddZtDomain", `{"domain":"*.Apps.Example.org.","port":443,"priority":0}`)

	host := fmt.Sprintf(`{"instance_id":%q,"ip":"10.8.0.2","app_id":%q,"base_domain":"apps.example.org","latest_handshake":0,"num_connections":0}`, v.instance, v.app)
	status := g.admin("Status", "null")
	uuid := regexp.MustCompile(`"uuid":"([0-9a-f]{32})"`).FindStringSubmatch(status)
	seen := regexp.MustCompile(`"last_seen":([0-9]+)`).FindStringSubmatch(status)
	if uuid == nil || seen == nil {
		t.Fatal(status)
	}
	equal(t, "Status", status, fmt.Sprintf(`{"id":1,"url":"https://gateway.internal:8010","bootnode_url":"","num_connections":0,"hosts":[%s],"nodes":[{"id":1,"uuid":%q,"url":"https://gateway.internal:8010","last_seen":%s,`+
		`"wg_public_key":%q,"wg_ip":"10.8.0.1/16","wg_endpoint":"192.0.2.1:51820"}],"uuid":%q,"accel":{"ktls_mode":"off","splice_mode":"auto","ktls_offloaded":0,"ktls_offload_failed":0,"splice_engaged":0}}`,
		host, uuid[1], seen[1], g.key.PublicKey(), uuid[1]))
	for _, c := range []struct{ method, body, want string }{
		{"GetMeta", "", `{"registered":1,"online":0}`},
		{"GetInfo", `{"id":"` + v.instance + `"}`, `{"found":true,"info":` + host + `}`},
		{"GetInfo", `{"id":"` + v.app + `"}`, `{"found":false,"info":null}`},
		{"GetNodeStatuses", "", `{"statuses":[{"node_id":1,"status":"up"}]}`},
		{"GetGlobalConnections", "", `{"total_connections":0,"node_connections":{"1":0}}`},
		{"GetInstancePortPolicy", `{"instance_id":"` + v.instance + `"}`, `{"effective":{"ports":[],"restrict_mode":false},"source":"instance","instance_reported":{"ports":[],"restrict_mode":false},"admin_override":null}`},
		{"SetInstancePortPolicy", `{"instance_id":"` + v.instance + `","policy":{"ports":[{"port":8443,"pp":true},{"port":80,"pp":false}],"restrict_mode":true}}`, `null`},
		{"GetInstancePortPolicy", `{"instance_id":"` + v.instance + `"}`, `{"effective":{"ports":[{"port":80,"pp":false},{"port":8443,"pp":true}],"restrict_mode":true},"source":"admin",` +
			`"instance_reported":{"ports":[],"restrict_mode":false},"admin_override":{"ports":[{"port":80,"pp":false},{"port":8443,"pp":true}],"restrict_mode":true}}`},
		{"ListZtDomains", "", `{"domains":[{"config":{"domain":"apps.example.org","dns_cred_id":null,"port":443,"node":null,"priority":0},"cert_status":{"has_cert":false,"not_after":0,"issued_by":0,"issued_at":0,"loaded_in_memory":false}}]}`},
		{"ListDnsCredentials", "", `{"credentials":[],"default_id":null}`},
		{"GetCertbotConfig", "", `{"renew_interval_secs":43200,"renew_before_expiration_secs":2592000,"renew_timeout_secs":300,"acme_url":""}`},
		{"ReloadCert", "anything at all", `null`},
	} {
		equal(t, c.method, g.admin(c.method, c.body), c.want)
	}
	for _, c := range []struct{ method, body, want string }{
		{"SetNodeStatus", `{"id":1,"status":"gone"}`, "invalid status: expected 'up' or 'down'"},
		{"AddZtDomain", `{"domain":"apps.example.org","port":443}`, "ZT-Domain config already exists: apps.example.org"},
		{"AddZtDomain", `{"domain":"b.example.org"}`, "port must be between 1 and 65535"},
		{"GetInstancePortPolicy", `{"instance_id":"nobody"}`, "instance nobody not found"},
		{"GetZtDomain", `{"domain":"nowhere.org"}`, "ZT-Domain config not found"},
		{"Admin.Nothing", ``, "Service not found: Nothing"},
	} {
		a, err := g.tryAdmin("POST", "/"+c.method+"?json", c.body)
		if err != nil || a.status != 400 || a.body != jsonError(c.want) {
			t.Errorf("%s %s: %v %+v", c.method, c.body, err, a)
		}
	}
	// What scripts do: the method at the root and below /prpc, with and without the service's name, GET and POST.
	for _, path := range []string{"/GetMeta", "/prpc/GetMeta", "/prpc/Admin.GetMeta", "/Admin.Admin.GetMeta"} {
		a, err := g.tryAdmin("GET", path, "")
		if err != nil || a.body != `{"registered":1,"online":0}` {
			t.Errorf("%s: %v %+v", path, err, a)
		}
	}
	// Issuance is not there yet; it must not pretend.
	for _, method := range []string{"RenewCert", "SetCaa", "RotateAcmeCredentials", "RenewZtDomainCert"} {
		a, err := g.tryAdmin("POST", "/prpc/"+method+"?json", `{"domain":"apps.example.org"}`)
		if err != nil || a.status != 400 {
			t.Errorf("%s: %v %+v", method, err, a)
		}
	}
}

// TestDebugServer: the tools of upstream's own tests.
func TestDebugServer(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	key := newKey(t).PublicKey().String()
	got := g.debug("RegisterCvm", fmt.Sprintf(`{"client_public_key":%q,"app_id":"any-app","instance_id":"x1"}`, key))
	a, err := ask(plainClient, "POST", "http://"+g.addr(debugPort)+"/prpc/Debug.RegisterCvm?json", fmt.Sprintf(`{"client_public_key":%q,"app_id":"any","instance_id":"with space"}`, key))
	if err != nil || a.status != 400 {
		t.Errorf("an id with a blank: %v %+v", err, a)
	}
	a, err = ask(plainClient, "POST", "http://"+g.addr(debugPort)+"/prpc/Debug.RegisterCvm?json", fmt.Sprintf(`{"client_public_key":%q,"app_id":"any","instance_id":"x1"}`, key))
	if err != nil || a.status != 400 || a.body != jsonError("failed to allocate IP address for client: instance_id is already registered to a different app") {
		t.Errorf("another app: %v %+v", err, a)
	}
	equal(t, "client_ip", clientIP(t, got), "10.8.0.2")
	var state struct {
		Instances []struct {
			InstanceID string `json:"instance_id"`
			AppID      string `json:"app_id"`
			IP         string `json:"ip"`
			PublicKey  string `json:"public_key"`
			RegTime    int64  `json:"reg_time"`
		} `json:"instances"`
		Allocated []string `json:"allocated_addresses"`
	}
	if err := json.Unmarshal([]byte(g.debug("GetProxyState", "")), &state); err != nil || len(state.Instances) != 1 {
		t.Fatalf("GetProxyState: %v %+v", err, state)
	}
	i := state.Instances[0]
	if age := time.Now().Unix() - i.RegTime; i.InstanceID != "x1" || i.IP != "10.8.0.2" || i.PublicKey != key || age < 0 || age > 30 || fmt.Sprint(state.Allocated) != "[10.8.0.2]" {
		t.Errorf("GetProxyState: %+v", state)
	}
	sync := g.debug("GetSyncData", "")
	for _, want := range []string{`{"my_node_id":1,"peer_addrs":[{"node_id":1,"url":"https://gateway.internal:8010"}],"nodes":[{"node_id":1,"url":"https://gateway.internal:8010",`,
		fmt.Sprintf(`"instances":[{"instance_id":"x1","app_id":"any-app","ip":"10.8.0.2","public_key":%q}]`, key)} {
		if !strings.Contains(sync, want) {
			t.Errorf("GetSyncData: %s\nlacks %s", sync, want)
		}
	}
	if a, err := ask(plainClient, "GET", "http://"+g.addr(debugPort)+"/health", ""); err != nil || a.body != "OK" {
		t.Errorf("/health: %v %+v", err, a)
	}
}

// TestExit: SIGTERM and the Exit RPC end the process in order, with code 0, and leave what must stay.
func TestExit(t *testing.T) {
	t.Parallel()
	needMachine(t)
	ip := need(t, "ip")
	link := "e2e-exit0"
	for _, argv := range [][]string{{ip, "link", "add", link, "type", "veth", "peer", "name", "e2e-exit1"}, {ip, "link", "set", link, "up"}} {
		if _, stderr, code := runIn(t, "", nil, argv...); code != 0 {
			t.Fatalf("%v: %s", argv, stderr)
		}
	}
	g := newGateway(t, settings{"core.wg.mode": nil, "core.wg.interface": link, "core.admin.shutdown.grace": 1, "core.admin.shutdown.mercy": 1})
	for _, c := range []struct {
		name, log string
		end       func()
	}{
		{"SIGTERM", "a signal", func() { g.proc.cmd.Process.Signal(syscall.SIGTERM) }},
		{"Exit", "the Exit RPC", func() {
			if a, err := g.tryAdmin("POST", "/prpc/Exit?json", "{}"); err != nil || a.body != "null" {
				t.Errorf("Exit: %v %+v", err, a)
			}
		}},
		{"Exit by force", "", func() {
			if a, err := g.tryAdmin("POST", "/prpc/Exit?json", `{"force":true}`); err == nil {
				t.Errorf("Exit by force was answered: %+v", a)
			}
		}},
	} {
		if err := os.RemoveAll(g.path("log")); err != nil {
			t.Fatal(err)
		}
		g.start()
		v := newGuest(t, c.name)
		v.register(t, g)
		g.logged("is not WireGuard", link)
		// Neither a client that says nothing nor one that never ends its request delays the end much.
		idle, err := net.Dial("tcp", g.addr(proxyPort))
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
		slow, err := net.Dial("tcp", g.addr(adminPort))
		if err != nil {
			t.Fatal(err)
		}
		defer slow.Close()
		fmt.Fprint(slow, "POST /prpc/Status HTTP/1.1\r\nHost: x\r\nX-Admin-Token: "+token+"\r\nContent-Length: 10\r\n\r\n")
		time.Sleep(50 * time.Millisecond)
		began := time.Now()
		c.end()
		if code := g.proc.wait(10 * time.Second); code != 0 {
			t.Errorf("%s: exit code %d", c.name, code)
		}
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("%s: took %s", c.name, d)
		}
		if c.log != "" {
			g.logged("gateway is stopping", c.log)
			g.logged("gateway has stopped")
		}
		out, _, _ := runIn(t, "", nil, ip, "-o", "link", "show", link)
		if !strings.Contains(out, ",UP") {
			t.Errorf("%s: the interface is %q", c.name, out)
		}
		if _, err := os.Stat(g.path("data/control.sock")); err == nil && c.name != "Exit by force" {
			t.Errorf("%s: the control socket is still there", c.name)
		}
		// Everything was free again, and everything was kept.
		g.start()
		if got := g.admin("GetInfo", fmt.Sprintf(`{"id":%q}`, v.instance)); !strings.Contains(got, `"found":true`) {
			t.Errorf("%s: the registration is gone: %s", c.name, got)
		}
		g.kill()
	}
}

// TestBuiltinNames: the names below the base domain that are the gateway's own (gateway spec 4.4, 9.3).
func TestBuiltinNames(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	const index = `{"type":"dstack gateway","paths":["/index","/app-info","/acme-info"]}`
	h1, h2 := g.browser(t, "http/1.1"), g.browser(t, "h2")
	for _, c := range []struct {
		hc                  *http.Client
		method, label, path string
		status              int
		body, proto         string
	}{
		{h1, "GET", "gateway", "/health", 200, "", "HTTP/1.1"},
		{h1, "GET", "GATEWAY", "/health", 200, "", "HTTP/1.1"},
		{h1, "GET", "gateway-80", "/index", 200, index, "HTTP/1.1"},
		{h1, "GET", "gateway", "/.dstack/.dstack/index", 200, index, "HTTP/1.1"},
		{h1, "GET", "gateway", "/acme-info", 200, noACME, "HTTP/1.1"},
		{h1, "GET", "gateway", "/", 404, "", "HTTP/1.1"},
		{h1, "POST", "gateway", "/health", 405, "", "HTTP/1.1"},
		{h2, "GET", "gateway-g", "/.dstack/acme-info", 200, noACME, "HTTP/2.0"},
		{h2, "GET", "gateway-g", "/index", 200, index, "HTTP/2.0"},
		{h1, "GET", "health", "/", 200, "", "HTTP/1.1"},
		{h2, "GET", "health-g", "/", 200, "", "HTTP/2.0"},
		{h1, "GET", "health", "/health", 404, "", "HTTP/1.1"},
	} {
		a, err := ask(c.hc, c.method, "https://"+c.label+"."+base+c.path, "")
		if err != nil || a.status != c.status || a.body != c.body || a.proto != c.proto {
			t.Errorf("%s %s %s: %v %+v", c.method, c.label, c.path, err, a)
		}
	}
	for _, label := range []string{"gateway-8080", "health-81", "gateway-s", "health-443s", "nobody", "-80", "x-70000"} {
		if c, err := g.tlsTo(label+"."+base, 5*time.Second); err == nil {
			c.Close()
			t.Errorf("%s: the handshake succeeded", label)
		}
	}
	// No agent: the connection ends without an answer.
	if a, err := ask(h1, "GET", "https://gateway."+base+"/app-info", ""); err == nil {
		t.Errorf("/app-info without an agent: %+v", a)
	}

	curl := need(t, "curl")
	write(t, g.path("web-ca.crt"), web(t).pem())
	page := func(args ...string) (string, int) {
		out, stderr, code := runIn(t, "", nil, append([]string{curl, "-sS", "--max-time", "10", "--cacert", g.path("web-ca.crt"), "--connect-to", "::" + g.addr(proxyPort), "-w", " %{http_version} %{response_code}"}, args...)...)
		return out + stderr, code
	}
	for _, c := range []struct {
		url, want string
		args      []string
	}{
		{"https://gateway-g." + base + "/index", index + " 2 200", []string{"--http2"}},
		{"https://gateway." + base + "/index", index + " 1.1 200", []string{"--http2"}}, // no ALPN: falls back
		{"https://health." + base + "/", " 1.1 200", []string{"--tlsv1.2", "--tls-max", "1.2"}},
	} {
		if got, code := page(append(c.args, c.url)...); code != 0 || got != c.want {
			t.Errorf("curl %v %s: %d %q", c.args, c.url, code, got)
		}
	}
	openssl := need(t, "openssl")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-servername", "gateway-g." + base, "-alpn", "h2,http/1.1"}, "ALPN protocol: h2"},
		{[]string{"-servername", "gateway-g." + base, "-alpn", "http/1.1"}, "no application protocol"},
		{[]string{"-servername", "gateway." + base, "-alpn", "h2,http/1.1"}, "No ALPN negotiated"},
		{[]string{"-servername", "gateway." + base, "-tls1_2", "-CAfile", g.path("web-ca.crt"), "-verify_return_error"}, "Verify return code: 0 (ok)"},
		{[]string{"-servername", "gateway." + base, "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"}, "Cipher is (NONE)"},
	} {
		out, stderr, _ := runIn(t, "", nil, append([]string{openssl, "s_client", "-connect", g.addr(proxyPort)}, c.args...)...)
		if !strings.Contains(strings.ToLower(out+stderr), strings.ToLower(c.want)) {
			t.Errorf("openssl s_client %v: want %q\n%s%s", c.args, c.want, out, stderr)
		}
	}
}

// TestCommandLine: what shells, unit files and package scripts rely on.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	g := newGateway(t, nil)
	write(t, g.path("good.toml"), g.toml())
	write(t, g.path("good.json"), []byte(`{"tls":{"key":"k","certs":"c","mutual":{"ca_certs":"a"}},"core":{"admin":{"enabled":false}}}`))
	write(t, g.path("typo.toml"), append(g.toml(), "core.proxy.listen_prot = 1\n"...))
	write(t, g.path("bad.toml"), append(g.toml(), "core.proxy.timeouts.connect = \"1h30m\"\n"...))
	write(t, g.path("broken.toml"), []byte("core = [\n"))
	write(t, g.path("nets.toml"), []byte(strings.Replace(string(g.toml()), `"10.8.0.1/32"`, `"10.9.0.1/32"`, 1)))
	dir := t.TempDir()
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string // texts in them; "" = empty
	}{
		{[]string{"-V"}, 0, "dstack-gateway " + version + "\n", ""},
		{[]string{"--version"}, 0, "dstack-gateway v" + version + " (git:" + revision[:20] + ")\n", ""},
		{[]string{"--help"}, 0, "Usage:\n", ""},
		{[]string{"-h"}, 0, "Usage:\n", ""},
		{[]string{"--nope"}, 2, "", "flag provided but not defined: -nope"},
		{[]string{"-c"}, 2, "", "flag needs an argument: -c"},
		{[]string{"serve"}, 2, "", "unknown command"},
		{[]string{"-c", "nowhere.toml"}, 1, "", "nowhere.toml"},
		{[]string{"--config", g.path("nowhere.json")}, 1, "", "nowhere.json"},
		{[]string{"-c", g.path("broken.toml")}, 1, "", "broken.toml"},
		{[]string{"-c", g.path("bad.toml")}, 1, "", "core.proxy.timeouts.connect"},
		{[]string{"-c", g.path("nets.toml")}, 1, "", "Reserved net is not in the network"},
		{[]string{"config", "check", "-c", g.path("good.toml")}, 0, "*", ""},
		{[]string{"config", "check", "-c", g.path("bad.toml")}, 1, "core.proxy.timeouts.connect", "*"},
		{[]string{"config", "check", "-c", g.path("typo.toml")}, 1, "core.proxy.listen_port", ""},
		{[]string{"-c", g.path("good.json"), "config", "print"}, 0, "[core.proxy]", ""},
		{[]string{"config", "print", "-c", g.path("good.toml")}, 0, "listen_port = 443", ""},
		{[]string{"config", "frobnicate"}, 2, "", "unknown command"},
	} {
		stdout, stderr, code := runIn(t, dir, nil, append([]string{binary()}, c.args...)...)
		for _, o := range []struct{ name, got, want string }{{"stdout", stdout, c.stdout}, {"stderr", stderr, c.stderr}} {
			if o.want == "" && o.got != "" || o.want != "*" && !strings.Contains(o.got, o.want) {
				t.Errorf("%v: %s is %q, want %q", c.args, o.name, o.got, o.want)
			}
		}
		if code != c.code {
			t.Errorf("%v: exit code %d, want %d", c.args, code, c.code)
		}
	}
	// What is printed can be loaded again, but keeps the secrets to itself.
	printed, _, _ := runIn(t, dir, nil, binary(), "config", "print", "-c", g.path("good.toml"))
	for _, secret := range []string{token, g.key.String()} {
		if strings.Contains(printed, secret) {
			t.Errorf("config print shows %s", secret)
		}
	}
	for _, secret := range []string{token, g.key.String()} {
		printed = strings.Replace(printed, "<redacted>", secret, 1)
	}
	write(t, g.path("printed.toml"), []byte(printed))
	if out, stderr, code := runIn(t, dir, nil, binary(), "config", "check", "-c", g.path("printed.toml")); code != 0 {
		t.Errorf("the printed configuration does not load: %s%s", out, stderr)
	}
}

// TestPortsTaken: a port that somebody else has ends the start with code 1, the port and the reason; nothing is half up.
func TestPortsTaken(t *testing.T) {
	t.Parallel()
	for name, port := range map[string]int{"proxy": proxyPort, "main": mainPort, "admin": adminPort, "debug": debugPort} {
		g := newGateway(t, nil)
		l, err := net.Listen("tcp", g.addr(port))
		if err != nil {
			t.Fatal(err)
		}
		g.launch()
		if code := g.proc.wait(20 * time.Second); code != 1 {
			t.Errorf("%s: exit code %d", name, code)
		}
		g.logged(name, g.addr(port), "address already in use")
		l.Close()
		g.start()
		// A second gateway on the same directory is kept out.
		other := newGateway(t, settings{"core.sync.data_dir": g.path("data")})
		other.launch()
		if code := other.proc.wait(20 * time.Second); code != 1 {
			t.Errorf("a second gateway on the directory: exit code %d", code)
		}
		other.logged("is in use by another process", g.path("data"))
		g.kill()
	}
}
