package dashboard

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

var clock = time.Unix(1700000000, 0)

// fixed answers every RPC from memory.
type fixed struct {
	status *gatewaypb.StatusResponse
	meta   *gatewaypb.GetMetaResponse
	marks  *gatewaypb.GetNodeStatusesResponse
	conns  *gatewaypb.GlobalConnectionsStats
	store  *gatewaypb.WaveKvStatusResponse
	bot    *gatewaypb.CertbotConfigResponse
	creds  *gatewaypb.ListDnsCredentialsResponse
	zt     *gatewaypb.ListZtDomainsResponse
	acme   *gatewaypb.AcmeInfoResponse
	err    error
}

func (f *fixed) Status(context.Context, *emptypb.Empty) (*gatewaypb.StatusResponse, error) {
	return f.status, f.err
}
func (f *fixed) GetMeta(context.Context, *emptypb.Empty) (*gatewaypb.GetMetaResponse, error) {
	return f.meta, f.err
}
func (f *fixed) GetNodeStatuses(context.Context, *emptypb.Empty) (*gatewaypb.GetNodeStatusesResponse, error) {
	return f.marks, f.err
}
func (f *fixed) GetGlobalConnections(context.Context, *emptypb.Empty) (*gatewaypb.GlobalConnectionsStats, error) {
	return f.conns, f.err
}
func (f *fixed) WaveKvStatus(context.Context, *emptypb.Empty) (*gatewaypb.WaveKvStatusResponse, error) {
	return f.store, f.err
}
func (f *fixed) GetCertbotConfig(context.Context, *emptypb.Empty) (*gatewaypb.CertbotConfigResponse, error) {
	return f.bot, f.err
}
func (f *fixed) ListDNSCredentials(context.Context, *emptypb.Empty) (*gatewaypb.ListDnsCredentialsResponse, error) {
	return f.creds, f.err
}
func (f *fixed) ListZtDomains(context.Context, *emptypb.Empty) (*gatewaypb.ListZtDomainsResponse, error) {
	return f.zt, f.err
}
func (f *fixed) AcmeInfo(context.Context, *emptypb.Empty) (*gatewaypb.AcmeInfoResponse, error) {
	return f.acme, f.err
}

// filled puts text into every string of every answer, so that no field can be forgotten.
func filled(text string) *fixed {
	f := &fixed{
		status: &gatewaypb.StatusResponse{Accel: &gatewaypb.ProxyAccelStatus{}, Uuid: []byte{1, 2}, Hosts: []*gatewaypb.HostInfo{{LatestHandshake: 1699999900}, {}}, Nodes: []*gatewaypb.GatewayNodeInfo{{Id: 1}, {Id: 2, LastSeen: 1 << 62}}},
		meta:   &gatewaypb.GetMetaResponse{Registered: 2, Online: 1},
		marks:  &gatewaypb.GetNodeStatusesResponse{Statuses: []*gatewaypb.NodeStatusEntry{{NodeId: 2}}},
		conns:  &gatewaypb.GlobalConnectionsStats{TotalConnections: 7, NodeConnections: map[uint32]uint64{1: 7}},
		store: &gatewaypb.WaveKvStatusResponse{Persistent: &gatewaypb.StoreSyncStatus{NKeys: 9, Peers: []*gatewaypb.PeerSyncStatus{{Id: 2, LastSeen: []*gatewaypb.LastSeenEntry{{NodeId: 1, Timestamp: 1699999999}}}}},
			Ephemeral: &gatewaypb.StoreSyncStatus{Dirty: true}},
		bot:   &gatewaypb.CertbotConfigResponse{RenewIntervalSecs: 43200},
		creds: &gatewaypb.ListDnsCredentialsResponse{DefaultId: new(string), Credentials: []*gatewaypb.DnsCredentialInfo{{DnsTxtTtl: proto.Uint32(60)}, {}}},
		zt: &gatewaypb.ListZtDomainsResponse{Domains: []*gatewaypb.ZtDomainInfo{
			{Config: &gatewaypb.ZtDomainConfig{Port: 443, DnsCredId: new(string), Node: proto.Uint32(0)}, CertStatus: &gatewaypb.ZtDomainCertStatus{HasCert: true, NotAfter: 1700086400, IssuedAt: 1, LoadedInMemory: true}},
			{Config: &gatewaypb.ZtDomainConfig{}, CertStatus: &gatewaypb.ZtDomainCertStatus{}}}},
		acme: &gatewaypb.AcmeInfoResponse{QuotedHistKeys: []*gatewaypb.QuotedPublicKey{{PublicKey: []byte{0x30, 0x59}}}},
	}
	for _, m := range []proto.Message{f.status, f.meta, f.marks, f.conns, f.store, f.bot, f.creds, f.zt, f.acme} {
		fill(m.ProtoReflect(), text)
	}
	f.marks.Statuses[0].Status = text
	return f
}

func fill(m protoreflect.Message, text string) {
	fields := m.Descriptor().Fields()
	for n := range fields.Len() {
		fd := fields.Get(n)
		switch {
		case fd.IsMap():
		case fd.IsList() && fd.Message() != nil:
			for i := range m.Get(fd).List().Len() {
				fill(m.Get(fd).List().Get(i).Message(), text)
			}
		case fd.IsList():
		case fd.Message() != nil:
			if m.Has(fd) {
				fill(m.Get(fd).Message(), text)
			}
		case fd.Kind() == protoreflect.StringKind:
			m.Set(fd, protoreflect.ValueOfString(text))
		}
	}
}

func newDashboard(t testing.TB, src Source, token string) *Dashboard {
	t.Helper()
	d, err := New(Options{Source: src, Version: "v1", Now: func() time.Time { return clock }, Logger: slog.New(slog.DiscardHandler),
		QueryToken: func(context.Context) (string, bool) { return token, token != "" }})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func get(t testing.TB, d *Dashboard, target string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	d.ServeHTTP(w, httptest.NewRequest("GET", target, nil))
	return w
}

func walk(n *html.Node, f func(*html.Node)) {
	f(n)
	for c := n.FirstChild; c != nil; c = c.NextSibling {
		walk(c, f)
	}
}

func parse(t testing.TB, page string) *html.Node {
	t.Helper()
	root, err := html.Parse(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func attr(n *html.Node, name string) string {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}

// TestHostileText: whatever stands in an answer, the structure of the page stays the same.
func TestHostileText(t *testing.T) {
	shape := func(page string) string {
		var b strings.Builder
		walk(parse(t, page), func(n *html.Node) {
			if n.Type == html.ElementNode {
				b.WriteString("<" + n.Data)
				for _, a := range n.Attr {
					b.WriteString(" " + a.Key)
				}
				b.WriteString(">")
			}
		})
		return b.String()
	}
	plain := shape(get(t, newDashboard(t, filled("harmless"), "token"), "/?q=harmless").Body.String())
	if strings.Count(plain, "<tr data-key>") < 8 {
		t.Fatalf("the page lacks rows: %s", plain)
	}
	for _, text := range []string{
		`<script>alert(1)</script>`, `"><img src=x onerror=alert(1)>`, `' onmouseover='alert(1)`, `javascript:alert(1)`,
		`</textarea></table></main><svg/onload=alert(1)>`, `{{.Token}}`, "`${alert(1)}`", `&lt;b&gt;&quot;`, "\x00\x01\u202e\u2028", `--><!--`, `\u003cscript\u003e`, `","x":"`,
	} {
		page := get(t, newDashboard(t, filled(text), text), "/?q="+url.QueryEscape(text)).Body.String()
		if got := shape(page); got != plain {
			t.Errorf("%q changes the page:\n%s\n%s", text, got, plain)
		}
		seen := 0
		walk(parse(t, page), func(n *html.Node) {
			if n.Type != html.ElementNode {
				return
			}
			switch n.Data {
			case "script", "link":
				if src := attr(n, "src") + attr(n, "href"); !strings.HasPrefix(src, "dashboard.") {
					t.Errorf("%q: the page loads %q", text, src)
				}
			case "a":
				if h := attr(n, "href"); !strings.HasPrefix(h, "#") {
					t.Errorf("%q: link to %q", text, h)
				}
			case "button":
				if raw := attr(n, "data-args"); raw != "" {
					var m map[string]any
					if err := json.Unmarshal([]byte(raw), &m); err != nil {
						t.Errorf("%q: data-args %q: %v", text, raw, err)
					}
					for _, name := range []string{"domain", "name"} {
						if v, ok := m[name]; ok {
							seen++
							if v != text {
								t.Errorf("%s arrives as %q, want %q", name, v, text)
							}
						}
					}
				}
			}
		})
		if seen < 6 {
			t.Errorf("%q: only %d arguments found", text, seen)
		}
	}
}

func TestPageShowsEverything(t *testing.T) {
	f := filled("x")
	f.status.Url, f.status.NumConnections, f.status.Accel.KtlsMode, f.status.Accel.SpliceMode = "https://gw1.example:8000", 4711, "disabled (kernel has no TLS ULP)", "after 64 KiB or 5s"
	f.status.Accel.SpliceEngaged = 815
	f.status.Hosts[0].InstanceId, f.status.Hosts[0].Ip, f.status.Hosts[0].AppId = "00aa", "10.8.0.2", "11bb"
	f.status.Nodes[1].WgEndpoint, f.status.Nodes[1].WgIp = "203.0.113.5:51820", "10.8.64.1/16"
	f.marks.Statuses[0].Status = "down"
	f.bot.AcmeUrl = ""
	f.creds.Credentials[0].Id, f.creds.DefaultId = "c1", proto.String("c1")
	f.zt.Domains[0].Config.Domain = "app.example.com"
	f.zt.Domains[0].Config.DnsCredId = nil
	page := get(t, newDashboard(t, f, ""), "/").Body.String()
	for _, want := range []string{
		"https://gw1.example:8000", "4711", "disabled (kernel has no TLS ULP)", "after 64 KiB or 5s", "815", "00aa", "10.8.0.2", "11bb", "100 s ago",
		"203.0.113.5:51820", "10.8.64.1/16", ">down<", "Mark up", "Mark down", "second 4611686018427387904", "2 registered, 1 heard", "app.example.com", "expires in 24 h",
		"default", "Let&#39;s Encrypt", ">12 h<", "<dt>Node 1</dt><dd>7</dd>", fingerprint([]byte{0x30, 0x59}), "Unwritten changes", "1 s ago by node 1",
	} {
		if !strings.Contains(page, want) && !strings.Contains(page, strings.ReplaceAll(want, "&#39;", "'")) {
			t.Errorf("the page does not show %q", want)
		}
	}
	if strings.Contains(page, "token=") {
		t.Error("a token parameter without a token")
	}
	walk(parse(t, page), func(n *html.Node) {
		if attr(n, "data-call") == "SetDefaultDnsCredential" && strings.Contains(attr(n, "data-args"), "c1") {
			t.Error("the default can be made default")
		}
	})
}

func TestTokenIsRepeated(t *testing.T) {
	page := get(t, newDashboard(t, filled("x"), "a&b=c"), "/").Body.String()
	found := 0
	walk(parse(t, page), func(n *html.Node) {
		for _, a := range n.Attr {
			if (a.Key == "src" || a.Key == "href") && strings.HasPrefix(a.Val, "dashboard.") {
				u, err := url.Parse(a.Val)
				if err != nil || u.Query().Get("token") != "a&b=c" {
					t.Errorf("%s: token %q (%v)", a.Val, u.Query().Get("token"), err)
				}
				found++
			}
		}
		if n.Data == "input" && attr(n, "name") == "token" {
			found++
			if attr(n, "value") != "a&b=c" {
				t.Errorf("the filter form sends token %q", attr(n, "value"))
			}
		}
	})
	if found != 3 {
		t.Errorf("%d places repeat the token, want 3", found)
	}
}

func TestFailuresStayInTheirSection(t *testing.T) {
	f := filled("x")
	f.err = errors.New("etcd has <no> quorum")
	w := get(t, newDashboard(t, f, ""), "/")
	if w.Code != 200 {
		t.Fatalf("status %d", w.Code)
	}
	sections := map[string]string{}
	walk(parse(t, w.Body.String()), func(n *html.Node) {
		if n.Data == "p" && attr(n, "role") == "alert" {
			sections[attr(n.Parent, "id")] = n.FirstChild.Data
		}
	})
	for _, id := range []string{"node", "datapath", "connections", "nodes", "instances", "domains", "credentials", "certbot", "certificates", "store"} {
		if sections[id] != "etcd has <no> quorum" {
			t.Errorf("section %s shows %q", id, sections[id])
		}
	}
}

func TestFilterAndLimit(t *testing.T) {
	f := filled("x")
	f.status.Hosts = nil
	for n := range MaxInstances + 50 {
		app := "aaaa"
		if n%100 == 99 {
			app = "BEEF"
		}
		f.status.Hosts = append(f.status.Hosts, &gatewaypb.HostInfo{InstanceId: "i" + strings.Repeat("0", n%3), AppId: app, Ip: "10.8.0.2"})
	}
	f.acme.QuotedHistKeys = make([]*gatewaypb.QuotedPublicKey, MaxKeys+3)
	for n := range f.acme.QuotedHistKeys {
		f.acme.QuotedHistKeys[n] = &gatewaypb.QuotedPublicKey{PublicKey: []byte{byte(n)}}
	}
	rows := func(target, section string) (n int, text string) {
		page := get(t, newDashboard(t, f, ""), target).Body.String()
		walk(parse(t, page), func(s *html.Node) {
			if attr(s, "id") == section {
				walk(s, func(r *html.Node) {
					if r.Data == "tr" && r.Parent.Data == "tbody" {
						n++
					}
					if r.Type == html.TextNode {
						text += r.Data
					}
				})
			}
		})
		return n, text
	}
	if n, text := rows("/", "instances"); n != MaxInstances || !strings.Contains(text, "250 registered; the first 200 are shown") {
		t.Errorf("%d rows: %s", n, text)
	}
	if n, text := rows("/?q=+beef", "instances"); n != 2 || !strings.Contains(text, "2 of 250 match.") {
		t.Errorf("%d rows with a filter: %s", n, text)
	}
	if n, text := rows("/", "certificates"); n != MaxKeys || !strings.Contains(text, "53 keys; the first 50 are shown") {
		t.Errorf("%d keys: %s", n, text)
	}
}

func TestHeaders(t *testing.T) {
	d := newDashboard(t, filled("x"), "")
	w := get(t, d, "/")
	csp := w.Header().Get("Content-Security-Policy")
	if !strings.Contains(csp, "default-src 'none'") || strings.Contains(csp, "unsafe") || !strings.Contains(csp, "frame-ancestors 'none'") {
		t.Errorf("policy %q", csp)
	}
	for name, want := range map[string]string{"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"} {
		if got := w.Header().Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for path, want := range map[string]string{"/dashboard.js": "text/javascript; charset=utf-8", "/dashboard.css": "text/css; charset=utf-8"} {
		w := get(t, d, path)
		if w.Code != 200 || w.Header().Get("Content-Type") != want || w.Body.Len() < 1000 {
			t.Errorf("%s: %d %s, %d bytes", path, w.Code, w.Header().Get("Content-Type"), w.Body.Len())
		}
	}
	if w := get(t, d, "/other"); w.Code != 404 {
		t.Errorf("/other: %d", w.Code)
	}
	r := httptest.NewRecorder()
	d.ServeHTTP(r, httptest.NewRequest("POST", "/", nil))
	if r.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", r.Code)
	}
	if _, err := New(Options{}); err == nil {
		t.Error("a dashboard without a source")
	}
}

// TestNothingFromElsewhere: no file names another host, and the script makes no markup out of text.
func TestNothingFromElsewhere(t *testing.T) {
	err := fs.WalkDir(files, "page", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := files.ReadFile(path)
		if err != nil {
			return err
		}
		if m := regexp.MustCompile(`(https?:)?//[a-z]|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=|\son[a-z]+=`).Find(data); m != nil {
			t.Errorf("%s contains %q", path, m)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestCallsExist: every button and form names an RPC of the Admin service, with arguments that it knows.
func TestCallsExist(t *testing.T) {
	admin := gatewaypb.File_api_gateway_gateway_proto.Services().ByName("Admin")
	method := func(name string) protoreflect.MessageDescriptor {
		m := admin.Methods().ByName(protoreflect.Name(name))
		if m == nil {
			t.Fatalf("there is no method %s", name)
		}
		return m.Input()
	}
	f := filled("x")
	f.marks.Statuses[0].Status = "down"
	f.creds.DefaultId = proto.String("other")
	calls := 0
	walk(parse(t, get(t, newDashboard(t, f, ""), "/").Body.String()), func(n *html.Node) {
		if name := attr(n, "data-call"); name != "" && n.Data == "button" {
			calls++
			var m map[string]any
			if err := json.Unmarshal([]byte(attr(n, "data-args")), &m); err != nil {
				t.Fatal(err)
			}
			for field := range m {
				if method(name).Fields().ByName(protoreflect.Name(field)) == nil {
					t.Errorf("%s has no field %s", name, field)
				}
			}
		}
		if name := attr(n, "data-call"); name != "" && n.Data == "form" {
			calls++
			walk(n, func(in *html.Node) {
				if other := attr(in, "data-method"); other != "" {
					method(other)
				}
				if field := attr(in, "name"); field != "" && method(name).Fields().ByName(protoreflect.Name(field)) == nil {
					t.Errorf("%s has no field %s", name, field)
				}
			})
		}
		if id := attr(n, "data-fill"); id != "" {
			calls++
		}
	})
	if calls < 12 {
		t.Errorf("only %d calls found", calls)
	}
}

func TestTimes(t *testing.T) {
	for _, tc := range []struct{ got, want string }{
		{instant(0), "never"}, {instant(1700000000), "2023-11-14 22:13:20Z"}, {instant(latest), "9999-12-31 23:59:59Z"}, {instant(latest + 1), "second 253402300800"},
		{ago(clock, 0), "never"}, {ago(clock, 1700000001), "just now"}, {ago(clock, 1699999881), "119 s ago"}, {ago(clock, 1699999880), "2 min ago"}, {ago(clock, 1<<63), "second 9223372036854775808"},
		{until(clock, 1700000000), "expired"}, {until(clock, 1700000000+3*86400), "in 3 d"}, {until(clock, 0), "never"},
		{span(7199), "119 min"}, {span(7200), "2 h"}, {span(172800), "2 d"}, {span(1<<64 - 1), "for ever"},
		{expiry(clock, nil), "bad"},
		{expiry(clock, &gatewaypb.ZtDomainCertStatus{HasCert: true, LoadedInMemory: true, NotAfter: 1700000000 + 86400}), "soon"},
		{expiry(clock, &gatewaypb.ZtDomainCertStatus{HasCert: true, LoadedInMemory: true, NotAfter: 1<<64 - 1}), "good"},
		{expiry(clock, &gatewaypb.ZtDomainCertStatus{HasCert: true, NotAfter: 1800000000}), "bad"},
	} {
		if tc.got != tc.want {
			t.Errorf("%q, want %q", tc.got, tc.want)
		}
	}
	if _, err := args("odd"); err == nil {
		t.Error("args with an odd number passes")
	}
	if _, err := args(1, 2); err == nil {
		t.Error("args without names passes")
	}
}

func BenchmarkPage(b *testing.B) {
	f := filled("x")
	for range 10_000 {
		f.status.Hosts = append(f.status.Hosts, &gatewaypb.HostInfo{InstanceId: strings.Repeat("a", 40), AppId: strings.Repeat("b", 40), Ip: "10.8.0.2"})
	}
	d := newDashboard(b, f, "")
	for b.Loop() {
		get(b, d, "/?q=none")
	}
}
