package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/emptypb"
)

// compose is a whole compose file with more members at its end.
func compose(more string) string {
	return `{"manifest_version":2,"name":"app","runner":"docker-compose"` + more + `}`
}

// tcb wraps a compose file as Info does.
func tcb(t testing.TB, compose string) string {
	t.Helper()
	b, err := json.MarshalIndent(map[string]any{"mrtd": "00", "event_log": []any{}, "app_compose": compose}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestPolicyOf(t *testing.T) {
	open := &gatewaypb.PortPolicy{}
	both := &gatewaypb.PortPolicy{Ports: []*gatewaypb.PortAttrs{{Port: 443, Pp: true}, {Port: 8080}}, RestrictMode: true}
	for _, tt := range []struct {
		name string
		in   string
		want *gatewaypb.PortPolicy
	}{
		{"hidden", "", open},
		{"no policy", tcb(t, compose("")), open},
		{"empty policy", tcb(t, compose(`,"port_policy":{}`)), open},
		{"ports alone", tcb(t, compose(`,"port_policy":{"ports":[{"port":8080}]}`)), &gatewaypb.PortPolicy{Ports: []*gatewaypb.PortAttrs{{Port: 8080}}}},
		{"restriction alone", tcb(t, compose(`,"port_policy":{"restrict_mode":true}`)), &gatewaypb.PortPolicy{RestrictMode: true}},
		{"all, with spaces", tcb(t, compose(` , "port_policy" : { "ports" : [ { "pp" : true , "port" : 443 } , { "port" : 8080 , "pp" : false , "x" : 1 } ] , "restrict_mode" : true , "x" : {} } `)), both},
		{"ends of the range", tcb(t, compose(`,"port_policy":{"ports":[{"port":1},{"port":65535}]}`)), &gatewaypb.PortPolicy{Ports: []*gatewaypb.PortAttrs{{Port: 1}, {Port: 65535}}}},
		{"port 0 allows nothing", tcb(t, compose(`,"port_policy":{"ports":[{"port":0}],"restrict_mode":true}`)), &gatewaypb.PortPolicy{RestrictMode: true}},
		{"names are exact", tcb(t, compose(`,"Port_Policy":{"restrict_mode":true},"port_policy":{"Restrict_Mode":true}`)), open},
		{"unknown members", tcb(t, compose(`,"docker_config":{"a":[null]},"launch_token_hash":1`)), open},
		{"manifest in quotes", tcb(t, strings.Replace(compose(""), "2", `"3"`, 1)), open},
		{"everything a guest knows", tcb(t, compose(`,"features":["kms"],"docker_compose_file":"services: {}\n","bash_script":"","pre_launch_script":"x",
			"init_script":["a","b"],"public_logs":true,"public_sysinfo":false,"public_tcbinfo":true,"kms_enabled":true,"gateway_enabled":true,
			"tproxy_enabled":true,"local_key_provider_enabled":false,"key_provider":"kms","key_provider_id":"ab","allowed_envs":["A"],
			"no_instance_id":false,"secure_time":true,"storage_fs":"zfs","swap_size":"1G","event_log_version":2,"snapshotter":"stargz",
			"requirements":{},"verity_volumes":[]`)), open},
		{"nulls where guests take them", tcb(t, compose(`,"docker_compose_file":null,"init_script":null,"key_provider":null,"storage_fs":null,"snapshotter":null,"requirements":null`)), open},
		{"other forms", tcb(t, compose(`,"init_script":"x","swap_size":1024,"event_log_version":1`)), open},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := policyOf(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPolicyOfErrors(t *testing.T) {
	for _, tt := range []struct{ name, in, text string }{
		{"no JSON", "x", "tcb_info: not JSON"},
		{"no object", "[]", "tcb_info: not an object"},
		{"no compose", "{}", "app_compose is missing"},
		{"compose no string", `{"app_compose":{}}`, "app_compose is not a string"},
		{"compose null", `{"app_compose":null}`, "app_compose is not a string"},
		{"compose twice", `{"app_compose":"{}","app_compose":"{}"}`, "given twice"},
		{"compose empty", tcb(t, ""), "app_compose: not JSON"},
		{"compose with a tail", tcb(t, compose("")+"x"), "app_compose: not JSON"},
		{"no manifest", tcb(t, `{"name":"","runner":""}`), "manifest_version is missing"},
		{"no name", tcb(t, `{"manifest_version":1,"runner":""}`), "name is missing"},
		{"no runner", tcb(t, `{"manifest_version":1,"name":""}`), "runner is missing"},
		{"policy null", tcb(t, compose(`,"port_policy":null`)), "port_policy: not an object"},
		{"policy twice", tcb(t, compose(`,"port_policy":{},"port_policy":{}`)), "given twice"},
		{"ports null", tcb(t, compose(`,"port_policy":{"ports":null}`)), "ports is not an array"},
		{"ports no array", tcb(t, compose(`,"port_policy":{"ports":{}}`)), "ports is not an array"},
		{"port no object", tcb(t, compose(`,"port_policy":{"ports":[80]}`)), "ports[0]: not an object"},
		{"port missing", tcb(t, compose(`,"port_policy":{"ports":[{"port":1},{"pp":true}]}`)), "ports[1]: port is missing"},
		{"port too large", tcb(t, compose(`,"port_policy":{"ports":[{"port":65536}]}`)), "up to 65535"},
		{"port negative", tcb(t, compose(`,"port_policy":{"ports":[{"port":-1}]}`)), "up to 65535"},
		{"port in quotes", tcb(t, compose(`,"port_policy":{"ports":[{"port":"80"}]}`)), "up to 65535"},
		{"port with fraction", tcb(t, compose(`,"port_policy":{"ports":[{"port":80.0}]}`)), "up to 65535"},
		{"pp no boolean", tcb(t, compose(`,"port_policy":{"ports":[{"port":80,"pp":1}]}`)), "pp is not a boolean"},
		{"mode no boolean", tcb(t, compose(`,"port_policy":{"restrict_mode":"true"}`)), "restrict_mode is not a boolean"},
		{"mode null", tcb(t, compose(`,"port_policy":{"restrict_mode":null}`)), "restrict_mode is not a boolean"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := policyOf(tt.in); err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want an error with %q", err, tt.text)
			}
		})
	}
	for name, bad := range map[string][]string{
		"manifest_version": {"0", "3", "1.0", `"0"`, `"03"`, `"+1"`, `"x"`, `""`, "null", "true"},
	} {
		for _, v := range bad {
			if _, err := policyOfCompose([]byte(`{"manifest_version":` + v + `,"name":"","runner":""}`)); err == nil {
				t.Errorf("%s: %s was accepted", name, v)
			}
		}
	}
	// One wrong value for every field that has a type.
	for _, f := range composeFields() {
		text := `{"manifest_version":1,"name":"","runner":"","` + f.name + `":-1}`
		if f.required {
			text = strings.Replace(compose(""), `"`+f.name+`":`, `"`+f.name+`":-1,"x`+f.name+`":`, 1)
		}
		if _, err := policyOfCompose([]byte(text)); err == nil || !strings.Contains(err.Error(), f.name+" is not ") {
			t.Errorf("%s: got %v", text, err)
		}
	}
	for _, member := range []string{
		`"init_script":["1","2","3","4","5","6"]`, `"init_script":[1]`, `"features":[1]`, `"features":"x"`, `"key_provider":"hsm"`,
		`"key_provider_id":"xyz"`, `"key_provider_id":null`, `"public_logs":null`, `"snapshotter":"x"`, `"event_log_version":3`, `"swap_size":-1`,
	} {
		if _, err := policyOfCompose([]byte(compose("," + member))); err == nil {
			t.Errorf("%s was accepted", member)
		}
	}
}

func worker(info func() (*guestpb.AppInfo, error)) http.Handler {
	s := prpc.NewService("Worker")
	prpc.Handle(s, "Info", func(context.Context, *emptypb.Empty) (*guestpb.AppInfo, error) { return info() })
	return http.StripPrefix("/prpc", s.Handler(prpc.Options{}))
}

func TestFetchPortPolicy(t *testing.T) {
	restricted := tcb(t, compose(`,"port_policy":{"ports":[{"port":443,"pp":true}],"restrict_mode":true}`))
	answer := func(body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(body)) })
	}
	status := func(code int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
	}
	for _, tt := range []struct {
		name  string
		h     http.Handler
		want  *gatewaypb.PortPolicy
		final bool // of the error, when want is nil
	}{
		{"policy", worker(func() (*guestpb.AppInfo, error) { return &guestpb.AppInfo{TcbInfo: restricted}, nil }),
			&gatewaypb.PortPolicy{Ports: []*gatewaypb.PortAttrs{{Port: 443, Pp: true}}, RestrictMode: true}, false},
		{"hidden", worker(func() (*guestpb.AppInfo, error) { return &guestpb.AppInfo{}, nil }), &gatewaypb.PortPolicy{}, false},
		{"other fields do not matter", answer(`{"app_id":7,"tcb_info":""}`), &gatewaypb.PortPolicy{}, false},
		{"agent not ready", worker(func() (*guestpb.AppInfo, error) { return nil, errors.New("not ready") }), nil, false},
		{"server error", status(502), nil, false},
		{"redirect", http.RedirectHandler("http://127.0.0.1:1/", http.StatusTemporaryRedirect), nil, false},
		{"no compose", worker(func() (*guestpb.AppInfo, error) { return &guestpb.AppInfo{TcbInfo: "{}"}, nil }), nil, true},
		{"no tcb_info", answer("{}"), nil, true},
		{"null tcb_info", answer(`{"tcb_info":null}`), nil, true},
		{"tcb_info no string", answer(`{"tcb_info":{}}`), nil, true},
		{"web page", answer("<html>"), nil, true},
		{"nothing", answer(""), nil, true},
		{"null", answer("null"), nil, true},
		{"flood", answer(`{"tcb_info":"` + strings.Repeat("x", maxPolicyAnswer) + `"}`), nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewServer(tt.h)
			defer srv.Close()
			got, err := FetchPortPolicy(t.Context(), nil, srv.URL+"/prpc")
			if tt.want == nil {
				if err == nil || errors.Is(err, ErrNoPolicy) != tt.final || !strings.Contains(err.Error(), srv.URL) {
					t.Errorf("got %.300v, want a final error: %t", err, tt.final)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFetchPortPolicyTransport(t *testing.T) {
	// The largest compose file that is asked for, with nothing but quotes in it:
	// escaping makes four bytes of each.
	big := tcb(t, compose(`,"docker_compose_file":"`+strings.Repeat(`\"`, 128<<10)+`"`))
	srv := httptest.NewServer(worker(func() (*guestpb.AppInfo, error) { return &guestpb.AppInfo{TcbInfo: big}, nil }))
	defer srv.Close()
	var dialed string
	tr := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dialed = addr
		return new(net.Dialer).DialContext(ctx, network, srv.Listener.Addr().String())
	}}
	defer tr.CloseIdleConnections()
	hc := &http.Client{Transport: tr}
	if _, err := FetchPortPolicy(t.Context(), hc, "http://10.4.0.2:8090/prpc"); err != nil || dialed != "10.4.0.2:8090" {
		t.Errorf("dialed %q: %v", dialed, err)
	}
	if hc.CheckRedirect != nil {
		t.Error("the caller's client was changed")
	}

	// No connection and no time are worth another attempt.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := fmt.Sprintf("http://%s/prpc", l.Addr())
	l.Close()
	if _, err := FetchPortPolicy(t.Context(), nil, free); err == nil || errors.Is(err, ErrNoPolicy) {
		t.Errorf("refused: %v", err)
	}
	release := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer slow.Close()
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := FetchPortPolicy(ctx, nil, slow.URL); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrNoPolicy) {
		t.Errorf("slow: %v", err)
	}
	// A base that can never work is final.
	if _, err := FetchPortPolicy(t.Context(), nil, "10.4.0.2"); !errors.Is(err, ErrNoPolicy) {
		t.Errorf("got %v", err)
	}
}

// Whatever a CVM answers, the result is a policy that can be stored.
func FuzzPolicyOf(f *testing.F) {
	f.Add("")
	f.Add(tcb(f, compose(`,"port_policy":{"ports":[{"port":443,"pp":true}],"restrict_mode":true}`)))
	f.Add(tcb(f, compose(`,"init_script":["a"],"key_provider":"kms","swap_size":"1G"`)))
	f.Add(`{"app_compose":"{\"manifest_version\":\"3\",\"name\":\"\",\"runner\":\"\",\"port_policy\":{\"ports\":[{\"port\":0}]}}"}`)
	f.Fuzz(func(t *testing.T, text string) {
		policy, err := policyOf(text)
		if err != nil {
			return
		}
		for _, p := range policy.Ports {
			if p.Port == 0 || p.Port > 65535 {
				t.Fatalf("port %d", p.Port)
			}
		}
	})
}
