package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// TestRegistrationAnswers: a guest of any release, asking in any encoding over any HTTP, gets the same bytes for the same
// registration: the second time, and from a gateway that was killed in between.
func TestRegistrationAnswers(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	g.admin("AddZtDomain", `{"domain":"apps.example.org","port":8443,"priority":1}`)
	uuid := strings.ReplaceAll(strings.TrimSpace(string(read(t, g.path("data/node_uuid")))), "-", "")

	nine := appInfo(webApp, idOf("nine"))
	nine.InitScriptHashes = [][32]byte{{1}, {2}}
	empty := appInfo(webApp, idOf("nine, no scripts"))
	empty.InitScriptHashes = [][32]byte{}
	guests := []*guest{newGuest(t, "eight"), guestOf(t, nine), guestOf(t, empty)}
	forms := []struct {
		name, query, contentType string
		h1                       bool
	}{
		{"JSON by query", "?json", "", false},
		{"JSON by query over HTTP/1.1", "?json=1", "", true},
		{"JSON by type", "", "application/json; charset=utf-8", false},
		{"protobuf", "", "", true},
		{"protobuf with type", "", "application/octet-stream", false},
	}
	round := func(when string) {
		for i, v := range guests {
			ip := fmt.Sprintf("10.8.0.%d", i+2)
			own := fmt.Sprintf(`{"pk":%q,"ip":"10.8.0.1/16","endpoint":"192.0.2.1:51820"}`, g.key.PublicKey())
			want := fmt.Sprintf(`{"wg":{"client_ip":%q,"servers":[%s]},"agent":{"external_port":8443,"internal_port":8090,"domain":"apps.example.org","app_address_ns_prefix":"_dstack-app-address"},`+
				`"gateways":[{"id":1,"uuid":%q,"url":"https://gateway.internal:8010","last_seen":0,"wg_public_key":%q,"wg_ip":"10.8.0.1/16","wg_endpoint":"192.0.2.1:51820"}]}`, ip, own, uuid, g.key.PublicKey())
			for _, f := range forms {
				body, want, contentType := v.request(), want, "application/json"
				if strings.HasPrefix(f.name, "protobuf") {
					body, want, contentType = protoRequest(t, v), toProto(t, want), "application/octet-stream"
				}
				var header []string
				if f.contentType != "" {
					header = []string{"Content-Type", f.contentType}
				}
				hc, proto := v.http, "HTTP/2.0"
				if f.h1 {
					conf := v.http.Transport.(*http.Transport).TLSClientConfig.Clone()
					conf.NextProtos = nil
					hc, proto = tlsClient(t, conf), "HTTP/1.1"
					hc.Transport.(*http.Transport).ForceAttemptHTTP2 = false
				}
				a, err := ask(hc, "POST", g.rpcURL("/prpc/RegisterCvm"+f.query), body, header...)
				what := fmt.Sprintf("%s, guest %d, %s", when, i, f.name)
				if err != nil || a.status != 200 || a.body != want || a.proto != proto || a.header.Get("Content-Type") != contentType {
					t.Errorf("%s: %v %+v\nwant %s", what, err, a, want)
				}
			}
			a, err := ask(v.http, "GET", g.rpcURL("/prpc/RegisterCvm?port_policy[restrict_mode]=false&client_public_key="+url.QueryEscape(v.key.PublicKey().String())), "")
			if err != nil || a.body != want {
				t.Errorf("%s, guest %d, GET: %v %+v", when, i, err, a)
			}
		}
	}
	round("first")
	round("refresh")
	g.kill()
	g.start()
	round("after kill -9")
}

func protoRequest(t *testing.T, v *guest) string {
	t.Helper()
	b, err := proto.Marshal(&gatewaypb.RegisterCvmRequest{ClientPublicKey: v.key.PublicKey().String(), PortPolicy: &gatewaypb.PortPolicy{}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func toProto(t *testing.T, text string) string {
	t.Helper()
	var r gatewaypb.RegisterCvmResponse
	if err := prpc.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(&r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestRegistrationRefusals are the texts that guests and operators read.
func TestRegistrationRefusals(t *testing.T) {
	t.Parallel()
	g := startGateway(t, settings{"core.wg.client_ip_range": "10.8.1.0/30"}) // two addresses
	one, two := newGuest(t, "one"), newGuest(t, "two")
	one.register(t, g)
	two.register(t, g)

	key := func(k string) string { return fmt.Sprintf(`{"client_public_key":%q%s}`, k, openPolicy) }
	port := func(p int) string {
		return fmt.Sprintf(`{"client_public_key":%q,"port_policy":{"ports":[{"port":%d,"pp":false}],"restrict_mode":true}}`, one.key.PublicKey(), p)
	}
	thief := guestOf(t, appInfo(idOf("another app"), idOf("one")))
	late := newGuest(t, "late")
	nobody := guestOf(t, &ratls.AppInfo{AppID: webApp[:], ComposeHash: make([]byte, 32), DeviceID: make([]byte, 32), OSImageHash: make([]byte, 32), KeyProviderInfo: []byte("{}")})
	for _, c := range []struct {
		name string
		v    *guest
		body string
		want string
	}{
		{"key too short", one, key("QUJD"), "[" + one.instance + "] invalid client public key: want 44 characters (padded standard base64 of 32 bytes), have 4"},
		{"key not base64", one, key(strings.Repeat("!", 44)), "[" + one.instance + "] invalid client public key: not padded standard base64: illegal base64 data at input byte 0"},
		{"key of the gateway", one, key(g.key.PublicKey().String()), "[" + one.instance + "] invalid client public key: it is this gateway's own WireGuard key"},
		{"no key", one, "", "[" + one.instance + "] invalid client public key: want 44 characters (padded standard base64 of 32 bytes), have 0"},
		{"key of another instance", one, key(two.key.PublicKey().String()), "failed to allocate IP address for client: WireGuard public key is already registered to another instance"},
		{"instance of another app", thief, thief.request(), "failed to allocate IP address for client: instance_id is already registered to a different app"},
		{"pool exhausted", late, late.request(), "failed to allocate IP address for client: IP pool exhausted, no available addresses in client_ip_range"},
		{"no instance id", nobody, nobody.request(), "[] instance id is empty"},
		{"port 0", one, port(0), "port must be between 1 and 65535"},
		{"port 65536", one, port(65536), "port 65536 out of u16 range"},
	} {
		a, err := ask(c.v.http, "POST", g.rpcURL("/prpc/RegisterCvm?json"), c.body)
		if err != nil || a.status != 400 || a.body != jsonError(c.want) {
			t.Errorf("%s: %v %+v\nwant %s", c.name, err, a, c.want)
		}
	}
	// Not the decoder's exact words, but that there is one.
	for _, body := range []string{`{"client_public_key":null}`, `{"client_public_key":1}`, `{`, `{"port_policy":{"ports":[{"port":-1}]}}`} {
		a, err := ask(one.http, "POST", g.rpcURL("/prpc/RegisterCvm?json"), body)
		if err != nil || a.status != 400 || !strings.HasPrefix(a.body, "{\n  \"error\": \"failed to decode JSON of RegisterCvm: ") {
			t.Errorf("%s: %v %+v", body, err, a)
		}
	}
	g.admin("SetNodeStatus", `{"id":1,"status":"down"}`)
	a, err := one.tryRegister(g)
	if err != nil || a.status != 400 || a.body != jsonError("this gateway node is marked as down and cannot accept new registrations") {
		t.Errorf("node down: %v %+v", err, a)
	}
	g.admin("SetNodeStatus", `{"id":1,"status":"up"}`)
	one.register(t, g)
}

func jsonError(text string) string { return "{\n  \"error\": \"" + text + "\"\n}" }

// TestCallers: who may call the main server, and what the others are told.
func TestCallers(t *testing.T) {
	t.Parallel()
	g := newGateway(t, nil)
	// A second CA, so that certificates can carry what ours never issues.
	write(t, g.path("ca.crt"), append(platform(t).CertificatePEM(), web(t).pem()...))
	g.start()

	anonymous := rpcClient(t, nil)
	a, err := ask(anonymous, "POST", g.rpcURL("/prpc/RegisterCvm?json"), `{"client_public_key":""}`)
	if err != nil || a.status != 400 || a.body != jsonError("neither app-info nor attestation provided") {
		t.Errorf("anonymous: %v %+v", err, a)
	}

	with := func(ext ...pkix.Extension) *http.Client {
		pair := web(t).issueWith(t, func(c *x509.Certificate) {
			c.ExtraExtensions, c.ExtKeyUsage, c.Subject.CommonName = ext, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, "odd"
		})
		cert, err := tls.X509KeyPair(pair.chain, pair.key)
		if err != nil {
			t.Fatal(err)
		}
		return clientWith(t, cert)
	}
	good := appInfo(webApp, idOf("odd")).Encode()
	for _, c := range []struct {
		name string
		hc   *http.Client
		want string // beginning of the error
	}{
		{"no extensions", with(), "neither app-info nor attestation provided"},
		{"app id only", with(ratls.ExtAppID.Encode(webApp[:])), "neither app-info nor attestation provided"},
		{"app info cut", with(ratls.ExtAppInfo.Encode(good[:40])), "failed to read client certificate: malformed app info at byte "},
		{"a bomb of arrays", with(ratls.ExtAppInfo.Encode([]byte(strings.Repeat("\x91", 60000)))), "failed to read client certificate: malformed app info at byte "},
		{"an array of 4 billion", with(ratls.ExtAppInfo.Encode([]byte("\xdd\xff\xff\xff\xff"))), "failed to read client certificate: malformed app info at byte "},
		{"bytes of 4 GiB", with(ratls.ExtAppInfo.Encode([]byte("\x98\xc6\xff\xff\xff\xff"))), "failed to read client certificate: malformed app info at byte "},
		{"a million nils behind", with(ratls.ExtAppInfo.Encode(append([]byte{0xdc, 0xff, 0xff}, append(good[1:], make([]byte, 60000)...)...))), "failed to read client certificate: malformed app info at byte "},
		{"not an OCTET STRING", with(pkix.Extension{Id: ratls.ExtAppInfo.OID(), Value: []byte{0x30, 0x00}}), "failed to read client certificate: app info extension"},
		{"quote without event log", with(ratls.ExtTDXQuote.Encode([]byte("quote"))), "TDX event log missing"},
		{"attestation beside app info", with(ratls.ExtAppInfo.Encode(good), ratls.ExtAttestation.Encode([]byte{0})), "invalid quote"},
	} {
		a, err := ask(c.hc, "POST", g.rpcURL("/prpc/RegisterCvm?json"), `{"client_public_key":""}`)
		if err != nil || a.status != 400 || !strings.HasPrefix(a.body, "{\n  \"error\": \""+c.want) {
			t.Errorf("%s: %v %+v\nwant %s...", c.name, err, a, c.want)
		}
		if strings.Contains(a.body, "no attestation provided") {
			t.Errorf("%s: guests would take this gateway for an old one: %s", c.name, a.body)
		}
	}
	if a, err := ask(with(ratls.ExtAppInfo.Encode(good)), "POST", g.rpcURL("/prpc/RegisterCvm?json"), fmt.Sprintf(`{"client_public_key":%q}`, newKey(t).PublicKey())); err != nil || a.status != 200 {
		t.Errorf("the rig's own CA: %v %+v", err, a)
	}

	// A certificate that no CA of ours signed ends the handshake, whatever it says.
	stranger, err := ratls.NewCA(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	cred, err := stranger.Issue(ratls.App{ID: webApp[:], Info: appInfo(webApp, idOf("stranger")), Subject: "stranger", ClientAuth: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := g.refused(version, &tls.Config{Certificates: []tls.Certificate{cred.TLS()}}); err != nil {
			t.Errorf("a stranger, %s: %v", tls.VersionName(version), err)
		}
	}

	g.stop()
	g.conf["tls.mutual.mandatory"] = true
	g.start()
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := g.refused(version, &tls.Config{}); err != nil {
			t.Errorf("mandatory = true, an anonymous client, %s: %v", tls.VersionName(version), err)
		}
	}
	newGuest(t, "known").register(t, g)
}

// refused returns nil if the main server ends the handshake with an alert.
func (g *gateway) refused(version uint16, conf *tls.Config) error {
	conf.MinVersion, conf.MaxVersion, conf.InsecureSkipVerify = version, version, true // it is the server that is asked for its opinion
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", g.addr(mainPort), conf)
	if err == nil { // with TLS 1.3 the verdict comes behind the client's end of the handshake
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || !strings.Contains(err.Error(), "remote error: tls: ") {
		return fmt.Errorf("no alert but %v", err)
	}
	return nil
}

func clientWith(t *testing.T, cert tls.Certificate) *http.Client {
	hc := rpcClient(t, nil)
	// Not Certificates: the client would leave out what does not match the CAs the server names.
	hc.Transport.(*http.Transport).TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	return hc
}

// noACME is AcmeInfo of a gateway without an account: with hist_keys and base_domain, which monitors of 0.5.5 ask for.
const noACME = `{"account_uri":"","quoted_hist_keys":[],"account_quote":"","account_attestation":"","hist_keys":[],"base_domain":""}`

// TestTransport is everything about the main server that is not a method.
func TestTransport(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	hc := rpcClient(t, nil)
	const (
		jsonType, octets, page = "application/json", "application/octet-stream", "text/html; charset=utf-8"
		notFound               = `{"error":{"code":404,"reason":"Not Found","description":"The requested resource could not be found."}}`
		info                   = `{"base_domain":"","external_port":0,"app_address_ns_prefix":"_dstack-app-address","version":"` + version + `"}`
		peers                  = `{"my_id":1,"my_url":"https://gateway.internal:8010","peers":[{"id":1,"url":"https://gateway.internal:8010"}]}`
	)
	fooProto, err := hex.DecodeString("0a1653657276696365206e6f7420666f756e643a20466f6f")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		method, path, header string
		status               int
		contentType, body    string // body "*": any
	}{
		{"GET", "/health", "", 200, "text/plain; charset=utf-8", "OK"},
		{"POST", "/health", "", 404, page, "*"},
		{"GET", "/prpc/Info", "", 200, jsonType, info},
		{"POST", "/prpc/Info?json", "", 200, jsonType, info},
		{"POST", "/prpc/Gateway.Info?json=true", "", 200, jsonType, info},
		{"POST", "/prpc/Tproxy.Tproxy.Info", "Content-Type: application/json", 200, jsonType, info},
		{"GET", "/prpc/AcmeInfo", "", 200, jsonType, noACME},
		{"POST", "/prpc/AcmeInfo", "", 200, octets, ""},
		{"GET", "/prpc/GetPeers", "", 200, jsonType, peers},
		{"POST", "/prpc/Foo?json", "", 400, jsonType, jsonError("Service not found: Foo")},
		{"POST", "/prpc/Foo?json=0", "", 400, octets, string(fooProto)},
		{"GET", "/prpc/info", "", 400, jsonType, jsonError("Service not found: info")},
		{"GET", "/prpc/Admin.Status", "", 400, jsonType, jsonError("Service not found: Admin.Status")},
		{"GET", "/prpc/", "Accept: application/json", 422, jsonType, "*"},
		{"PUT", "/prpc/Info", "Accept: application/json", 404, jsonType, notFound},
		{"HEAD", "/prpc/Info", "", 404, page, ""},
		{"GET", "/", "", 404, page, "*"},
		{"GET", "/Info", "Accept: application/json", 404, jsonType, notFound},
		{"GET", "/prpc/Info/more", "Accept: text/html;q=0.5, application/json", 404, jsonType, notFound},
	} {
		name, value, _ := strings.Cut(c.header, ": ")
		var header []string
		if name != "" {
			header = []string{name, value}
		}
		a, err := ask(hc, c.method, g.rpcURL(c.path), "", header...)
		if err != nil || a.status != c.status || a.header.Get("Content-Type") != c.contentType || c.body != "*" && a.body != c.body {
			t.Errorf("%s %s %s: %v %+v", c.method, c.path, c.header, err, a)
		}
		equal(t, c.path+": X-App-Version", a.header.Get("X-App-Version"), "v"+version+" (git:"+revision[:20]+")")
		equal(t, c.path+": Server", a.header.Get("Server"), "dstack Gateway")
	}
}

// TestGuestAgent: a gateway inside a CVM gets its name, its certificate and its app id from the agent, and lets only
// gateways of the same app see the cluster.
func TestGuestAgent(t *testing.T) {
	t.Parallel()
	g := newGateway(t, settings{"core.debug.insecure_skip_attestation": nil, "core.rpc_domain": "rpc.gateway.internal"})
	for _, f := range []string{"rpc.crt", "rpc.key", "ca.crt"} {
		if err := os.Remove(g.path(f)); err != nil {
			t.Fatal(err)
		}
	}
	s := prpc.NewService("DstackGuest")
	prpc.Handle(s, "Info", func(context.Context, *emptypb.Empty) (*guestpb.AppInfo, error) {
		return &guestpb.AppInfo{AppId: gatewayApp[:], AppName: "the gateway"}, nil
	})
	prpc.Handle(s, "GetTlsKey", func(_ context.Context, r *guestpb.GetTlsKeyArgs) (*guestpb.GetTlsKeyResponse, error) {
		if !r.UsageRaTls || !r.UsageServerAuth || !r.UsageClientAuth || !r.WithAppInfo || r.Subject != "dstack-gateway" || r.NotBefore != nil || r.NotAfter != nil {
			t.Errorf("GetTlsKey asks for %v", r)
		}
		cred, err := platform(t).Issue(ratls.App{ID: gatewayApp[:], Subject: r.Subject, Names: r.AltNames, ServerAuth: true, ClientAuth: true})
		if err != nil {
			return nil, err
		}
		key, err := cred.KeyPEM()
		return &guestpb.GetTlsKeyResponse{Key: string(key), CertificateChain: cred.ChainPEM()}, err
	})
	l, err := net.Listen("unix", g.path("agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: s.Handler(prpc.Options{})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	g.env = []string{"DSTACK_AGENT_ADDRESS=unix:" + g.path("agent.sock")}
	g.start()

	for _, f := range []string{"rpc.crt", "rpc.key", "ca.crt"} {
		st, err := os.Stat(g.path(f))
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, err, st.Mode())
		}
	}
	peers := func(cred *ratls.Credential) string {
		hc := rpcClient(t, cred)
		hc.Transport.(*http.Transport).TLSClientConfig.ServerName = "rpc.gateway.internal"
		a, err := ask(hc, "POST", g.rpcURL("/prpc/GetPeers?json"), "null")
		if err != nil {
			t.Fatal(err)
		}
		return a.body
	}
	of := func(app [20]byte) *ratls.Credential {
		cred, err := platform(t).Issue(ratls.App{ID: app[:], Subject: "peer", ClientAuth: true})
		if err != nil {
			t.Fatal(err)
		}
		return cred
	}
	equal(t, "GetPeers, anonymous", peers(nil), jsonError("Client authentication is required"))
	equal(t, "GetPeers, another app", peers(of(webApp)), jsonError("Remote app id is not from dstack-gateway"))
	equal(t, "GetPeers, own app", peers(of(gatewayApp)), `{"my_id":1,"my_url":"https://gateway.internal:8010","peers":[{"id":1,"url":"https://gateway.internal:8010"}]}`)

	c := g.browser(t, "http/1.1")
	a, err := ask(c, "GET", "https://gateway."+base+"/.dstack/app-info", "")
	if err != nil || !strings.Contains(a.body, `"app_name":"the gateway"`) {
		t.Errorf("/app-info: %v %+v", err, a)
	}
	srv.Close()
	g.kill()
	g.launch()
	if code := g.proc.wait(20 * time.Second); code != 1 {
		t.Errorf("without an agent: exit code %d", code)
	}
	g.logged("guest agent at unix:"+g.path("agent.sock"), "DSTACK_AGENT_ADDRESS")
}

// TestPeerFile: the peer file is byte-exact (gateway spec 6.3), private, and follows registrations.
func TestPeerFile(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	head := fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = 51820\n\n", g.key)
	file := func(want string) {
		t.Helper()
		within(t, 5*time.Second, func() error {
			got, err := os.ReadFile(g.path("wg.conf"))
			if err == nil && string(got) != want {
				err = fmt.Errorf("peer file:\n%s\nwant:\n%s", got, want)
			}
			return err
		})
	}
	peer := func(v *guest, ip string) string {
		return fmt.Sprintf("\n[Peer]\nPublicKey = %s\nAllowedIPs = %s/32\nPersistentKeepalive = 25\n", v.key.PublicKey(), ip)
	}
	file(head)
	a, b, c := newGuest(t, "a"), newGuest(t, "b"), newGuest(t, "c")
	sorted := []*guest{a, b, c}
	slices.SortFunc(sorted, func(x, y *guest) int { return strings.Compare(x.instance, y.instance) })
	a, b, c = sorted[0], sorted[1], sorted[2]
	for _, v := range []*guest{b, c, a} {
		v.register(t, g)
	}
	file(head + peer(a, "10.8.0.4") + peer(b, "10.8.0.2") + peer(c, "10.8.0.3"))
	b.key = newKey(t)
	b.register(t, g)
	file(head + peer(a, "10.8.0.4") + peer(b, "10.8.0.2") + peer(c, "10.8.0.3"))
	st, err := os.Stat(g.path("wg.conf"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the peer file holds the private key: %v %v", err, st.Mode())
	}
	if strings.Contains(g.log(), g.key.String()) {
		t.Error("the private key is in the log")
	}
	// wg(8) reads the same file.
	if wg := need(t, "wg"); wg != "" {
		if _, stderr, code := runIn(t, "", nil, wg, "syncconf", "nosuchlink0", g.path("wg.conf")); code == 0 || strings.Contains(stderr, "parsing") || strings.Contains(stderr, "unrecognized") {
			t.Errorf("wg syncconf: %d %s", code, stderr)
		}
	}
}
