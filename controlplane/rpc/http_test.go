package rpc

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/controlplane/adminauth"
	"github.com/dstack-gw/dstack-gw/controlplane/dashboard"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/prpc"
)

const gatewayService = hostname.GatewayService

// What the pieces of the gateway must fit.
var (
	_ Proxy            = (*dataplane.Server)(nil)
	_ Tunnels          = (*wireguard.Device)(nil)
	_ dashboard.Source = (*Server)(nil)
)

// TestServicesAreComplete: every method of the interface definition is served, and no other.
func TestServicesAreComplete(t *testing.T) {
	f := newFixture(t, nil)
	services := gatewaypb.File_api_gateway_gateway_proto.Services()
	for name, s := range map[string]*prpc.Service{"Gateway": f.s.Gateway(), "Admin": f.s.Admin(), "Debug": f.s.Debug()} {
		var want []string
		for n := range services.Len() {
			if services.Get(n).Name() == "" || string(services.Get(n).Name()) != name {
				continue
			}
			for m := range services.Get(n).Methods().Len() {
				want = append(want, string(services.Get(n).Methods().Get(m).Name()))
			}
		}
		have := map[string]bool{}
		for _, m := range s.Methods() {
			have[m] = true
		}
		for _, m := range want {
			if !have[m] {
				t.Errorf("%s.%s is not served", name, m)
			}
		}
		if len(want) == 0 || len(have) != len(want) {
			t.Errorf("%s: %d methods served, %d defined", name, len(have), len(want))
		}
	}
}

func TestBuiltinGateway(t *testing.T) {
	fail := errors.New("agent is gone")
	var asked atomic.Int32
	var agentErr atomic.Pointer[error]
	f := newFixture(t, func(d *Deps) {
		d.AgentInfo = func(context.Context) (*guestpb.AppInfo, error) {
			asked.Add(1)
			if err := agentErr.Load(); err != nil {
				return nil, *err
			}
			return &guestpb.AppInfo{AppId: []byte{0xaa}, InstanceId: []byte{0xbb}}, nil
		}
	})
	srv := httptest.NewServer(f.s.Builtin(hostname.GatewayService))
	defer srv.Close()
	do := func(method, path string) (int, string, string, error) {
		r, err := http.NewRequest(method, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := srv.Client().Do(r)
		if err != nil {
			return 0, "", "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp.StatusCode, resp.Header.Get("Content-Type"), string(b), err
	}
	const index = `{"type":"dstack gateway","paths":["/index","/app-info","/acme-info"]}`
	acme := `{"account_uri":"","quoted_hist_keys":[],"account_quote":"","account_attestation":"","hist_keys":[],"base_domain":""}`
	info, err := prpc.Marshal(&guestpb.AppInfo{AppId: []byte{0xaa}, InstanceId: []byte{0xbb}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		method, path string
		code         int
		body         string
	}{
		{"GET", "/health", 200, ""},
		{"GET", "/.dstack/health", 200, ""},
		{"GET", "/index", 200, index},
		{"GET", "/.dstack/index", 200, index},
		{"GET", "/.dstack/.dstack/.dstack/index", 200, index},
		{"GET", "/index?x=1", 200, index},
		{"GET", "/app-info", 200, string(info)},
		{"GET", "/.dstack/app-info", 200, string(info)},
		{"GET", "/acme-info", 200, acme},
		{"GET", "/.dstack/acme-info", 200, acme},
		{"GET", "/", 404, ""},
		{"GET", "/.dstack", 404, ""},
		{"GET", "/.dstack/", 404, ""},
		{"GET", "/.dstackindex", 404, ""},
		{"GET", "/index/", 404, ""},
		{"GET", "/index/.dstack", 404, ""},
		{"GET", "/%69ndex", 404, ""},
		{"GET", "//index", 404, ""},
		{"GET", "/prpc/Status", 404, ""},
		{"POST", "/index", 405, ""},
		{"POST", "/nowhere", 405, ""},
		{"HEAD", "/health", 405, ""},
		{"PUT", "/", 405, ""},
		{"OPTIONS", "/health", 405, ""},
	} {
		code, ct, body, err := do(tc.method, tc.path)
		if err != nil || code != tc.code || body != tc.body {
			t.Errorf("%s %s: %d %q (%v), want %d %q", tc.method, tc.path, code, body, err, tc.code, tc.body)
		}
		if want := ""; tc.body != "" && ct != "application/json" || tc.body == "" && ct != want {
			t.Errorf("%s %s: Content-Type %q", tc.method, tc.path, ct)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("the agent was asked %d times within %s", asked.Load(), appInfoFor)
	}
	// A failing agent: the connection ends without an answer, and the failure is not remembered.
	f.clock.advance(appInfoFor)
	agentErr.Store(&fail)
	if code, _, _, err := do("GET", "/app-info"); err == nil {
		t.Errorf("answered %d without an agent", code)
	}
	agentErr.Store(nil)
	if code, _, _, err := do("GET", "/app-info"); code != 200 || err != nil {
		t.Errorf("%d %v after the agent came back", code, err)
	}
	if !strings.Contains(f.log.String(), "agent is gone") {
		t.Error("the failure is not logged")
	}
}

func TestBuiltinWithoutAgent(t *testing.T) {
	f := newFixture(t, nil)
	srv := httptest.NewServer(f.s.Builtin(hostname.GatewayService))
	defer srv.Close()
	if _, err := srv.Client().Get(srv.URL + "/app-info"); err == nil {
		t.Error("answered without an agent")
	}
}

func TestBuiltinHealth(t *testing.T) {
	f := newFixture(t, nil)
	for _, tc := range []struct {
		svc          hostname.Service
		method, path string
		code         int
	}{
		{hostname.HealthService, "GET", "/", 200},
		{hostname.HealthService, "GET", "/?x", 200},
		{hostname.HealthService, "GET", "/health", 404},
		{hostname.HealthService, "HEAD", "/", 404},
		{hostname.HealthService, "POST", "/", 404},
		{hostname.NoService, "GET", "/", 404},
	} {
		w := httptest.NewRecorder()
		f.s.Builtin(tc.svc).ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
		if w.Code != tc.code || w.Body.Len() != 0 {
			t.Errorf("%d %s %s: %d %q, want %d", tc.svc, tc.method, tc.path, w.Code, w.Body, tc.code)
		}
	}
}

func TestPlainHTTP(t *testing.T) {
	f := newFixture(t, nil)
	const version = "v0.6.0 (git:0123456789abcdef0123)"
	for _, tc := range []struct {
		name         string
		h            http.Handler
		method, path string
		code         int
		body         string // a part of it
		version      string
	}{
		{"main", f.main, "GET", "/health", 200, "OK", version},
		{"main", f.main, "POST", "/health", 404, "", version},
		{"main", f.main, "GET", "/", 404, "", version},
		{"main", f.main, "GET", "/prpc", 404, "", version},
		{"main", f.main, "GET", "/prpc/", 422, "", version},
		{"main", f.main, "GET", "/prpc/Info", 200, `{"base_domain":""`, version},
		{"main", f.main, "GET", "/prpc/Tproxy.Info", 200, `{"base_domain":""`, version},
		{"main", f.main, "GET", "/prpc/info", 400, "Service not found: info", version},
		{"main", f.main, "GET", "/prpc/Info/more", 404, "", version},
		{"main", f.main, "GET", "/Info", 404, "", version},
		{"main", f.main, "DELETE", "/prpc/Info", 404, "", version},
		{"admin", f.admin, "GET", "/health", 200, "OK", ""},
		{"admin", f.admin, "GET", "/GetMeta", 200, `{"registered":0,"online":0}`, ""},
		{"admin", f.admin, "GET", "/prpc/GetMeta", 200, `{"registered":0,"online":0}`, ""},
		{"admin", f.admin, "GET", "/Admin.GetMeta", 200, `{"registered":0,"online":0}`, ""},
		{"admin", f.admin, "GET", "/prpc/GetInfo?id=x", 200, `{"found":false,"info":null}`, ""},
		{"admin", f.admin, "GET", "/nowhere", 400, "Service not found: nowhere", ""},
		{"admin", f.admin, "GET", "/a/b", 404, "", ""},
		{"debug", f.debug, "GET", "/health", 200, "OK", ""},
		{"debug", f.debug, "GET", "/prpc/Debug.Info", 200, `{"base_domain":""`, ""},
		{"debug", f.debug, "GET", "/Info", 404, "", ""},
	} {
		w := httptest.NewRecorder()
		tc.h.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
		if w.Code != tc.code || !strings.Contains(w.Body.String(), tc.body) || w.Header().Get("X-App-Version") != tc.version {
			t.Errorf("%s: %s %s: %d %q, X-App-Version %q", tc.name, tc.method, tc.path, w.Code, w.Body, w.Header().Get("X-App-Version"))
		}
	}
	w := httptest.NewRecorder()
	f.main.ServeHTTP(w, httptest.NewRequest("GET", "/health", nil))
	if w.Body.String() != "OK" || w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("%q %s", w.Body, w.Header().Get("Content-Type"))
	}
}

// TestAdminServer puts the pieces of the admin server together.
func TestAdminServer(t *testing.T) {
	f := newFixture(t, nil)
	populate(f)
	dash, err := dashboard.New(dashboard.Options{Source: f.s, Version: "0.6.0", QueryToken: adminauth.QueryToken, Now: f.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	auth, err := adminauth.New(adminauth.Options{Token: "an admin token"})
	if err != nil {
		t.Fatal(err)
	}
	observed := map[string]int{}
	h := auth.Wrap(f.s.AdminHandler(prpc.Options{Observe: func(method string, code int, _ time.Duration) { observed[method] = code }},
		map[string]http.Handler{"/": dash, "/dashboard.js": dash, "/dashboard.css": dash}))
	get := func(target string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", target, nil))
		return w
	}
	page := get("/?token=an%20admin%20token")
	if page.Code != 200 || !strings.Contains(page.Body.String(), inst1) || !strings.Contains(page.Body.String(), ">10 s ago<") {
		t.Errorf("page: %d", page.Code)
	}
	if strings.Contains(page.Body.String(), `role="alert"`) {
		t.Errorf("the page shows errors: %s", page.Body)
	}
	if w := get("/dashboard.js?token=an+admin+token"); w.Code != 200 || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/javascript") {
		t.Errorf("script: %d", w.Code)
	}
	// The token is not taken for a field of a request.
	if w := get("/prpc/GetInfo?id=" + inst1 + "&token=an+admin+token"); w.Code != 200 || !strings.Contains(w.Body.String(), `"found":true`) {
		t.Errorf("RPC: %d %s", w.Code, w.Body)
	}
	if w := get("/prpc/Status"); w.Code != 401 {
		t.Errorf("without a token: %d", w.Code)
	}
	if observed["GetInfo"] != 200 || len(observed) != 1 {
		t.Errorf("observed %v", observed)
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); strings.Contains(string(body), appB) {
			w.WriteHeader(403)
		}
	}))
	defer hook.Close()
	f := newFixture(t, func(d *Deps) { d.Registerer, d.Webhook = reg, &Webhook{URL: hook.URL, Timeout: time.Second} })
	f.ask(f.main, "RegisterCvm", request(wgKey(1))) // anonymous
	f.caller = guest(t, appA, inst1, compose1)
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	f.ok(f.main, "RegisterCvm", request(wgKey(2)))
	f.ask(f.main, "RegisterCvm", request("bad"))
	f.caller = guest(t, appB, inst2, compose1)
	f.ask(f.main, "RegisterCvm", request(wgKey(3)))
	f.ok(f.admin, "GetMeta", "")
	f.ask(f.admin, "Invented", "")
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, fam := range families {
		for _, m := range fam.Metric {
			name := fam.GetName()
			for _, l := range m.Label {
				name += "/" + l.GetValue()
			}
			if m.Histogram != nil {
				got[name] = float64(m.Histogram.GetSampleCount())
			} else {
				got[name] = m.Counter.GetValue()
			}
		}
	}
	for name, want := range map[string]float64{
		"dstack_gateway_registrations_total/created": 1, "dstack_gateway_registrations_total/changed": 1, "dstack_gateway_registrations_total/unchanged": 1,
		"dstack_gateway_registrations_total/unauthorized": 1, "dstack_gateway_registrations_total/refused": 2, "dstack_gateway_auth_seconds": 5,
		"dstack_gateway_admin_requests_total/200/GetMeta": 1, "dstack_gateway_admin_requests_total/400/unknown": 1,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s: %v, want %v", name, v, want)
		}
		delete(got, name)
	}
	if len(got) != 0 {
		t.Errorf("other series: %v", got)
	}
}

func TestNewChecksItsPieces(t *testing.T) {
	f := newFixture(t, nil)
	if _, err := New(Deps{}); err == nil {
		t.Error("a server without anything")
	}
	d := f.s.d
	d.Webhook = &Webhook{}
	if _, err := New(d); err == nil || !strings.Contains(err.Error(), "core.auth.url") {
		t.Errorf("a webhook without URL: %v", err)
	}
	d = f.s.d
	d.Registerer = prometheus.NewRegistry()
	one, err := New(d)
	if err != nil {
		t.Fatal(err)
	}
	one.Close()
	if _, err := New(d); err == nil {
		t.Error("metrics registered twice")
	}
}
