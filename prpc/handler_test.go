package prpc

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// testService answers with what it got, so that tests see what was decoded.
func testService() *Service {
	s := NewService("Gateway", "Gateway.", "Tproxy.")
	Handle(s, "RegisterCvm", func(_ context.Context, r *gatewaypb.RegisterCvmRequest) (*gatewaypb.WireGuardPeer, error) {
		state := "absent"
		if r.PortPolicy != nil {
			state = fmt.Sprintf("%d ports, restrict %t", len(r.PortPolicy.Ports), r.PortPolicy.RestrictMode)
		}
		return &gatewaypb.WireGuardPeer{Pk: r.ClientPublicKey, Ip: state}, nil
	})
	Handle(s, "ReloadCert", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
		return &emptypb.Empty{}, nil
	})
	Handle(s, "Fail", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
		return nil, fmt.Errorf("App authorization failed: %w", fmt.Errorf("Auth timeout: %w", errors.New("deadline \"é\" has elapsed")))
	})
	Handle(s, "Panic", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) { panic("boom") })
	Handle(s, "Abort", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) { panic(http.ErrAbortHandler) })
	Handle(s, "BadText", func(context.Context, *emptypb.Empty) (*gatewaypb.WireGuardPeer, error) {
		return &gatewaypb.WireGuardPeer{Pk: "\xff"}, nil
	})
	Handle(s, "WhoAmI", func(ctx context.Context, _ *emptypb.Empty) (*gatewaypb.WireGuardPeer, error) {
		who, _ := ctx.Value(callerKey{}).(string)
		return &gatewaypb.WireGuardPeer{Pk: who}, nil
	})
	return s
}

type callerKey struct{}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const (
	// gateway spec B.4
	requestHex  = "0a2c415145424151454241514542415145424151454241514542415145424151454241514542415145424151453d"
	emptyPolicy = "1200"
	twoPorts    = "120e0a0508bb0310010a0308903f1001"
	notFoundHex = "0a1653657276696365206e6f7420666f756e643a20466f6f"
	publicKey   = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="

	jsonType   = "application/json"
	binaryType = "application/octet-stream"
)

func TestVectors(t *testing.T) {
	for _, tt := range []struct {
		msg  proto.Message
		want string
	}{
		{&gatewaypb.RegisterCvmRequest{ClientPublicKey: publicKey}, requestHex},
		{&gatewaypb.RegisterCvmRequest{ClientPublicKey: publicKey, PortPolicy: &gatewaypb.PortPolicy{}}, requestHex + emptyPolicy},
		{registerRequest(), requestHex + twoPorts},
		{&gatewaypb.SetNodeStatusRequest{Id: 2, Status: "down"}, "08021204646f776e"},
	} {
		got, err := proto.MarshalOptions{Deterministic: true}.Marshal(tt.msg)
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(got) != tt.want {
			t.Errorf("got  %x\nwant %s", got, tt.want)
		}
	}
}

func TestHandler(t *testing.T) {
	peer := func(pk, ip string) string { return fmt.Sprintf(`{"pk":"%s","ip":"%s","endpoint":""}`, pk, ip) }
	register := unhex(t, requestHex+twoPorts)
	registered, err := proto.Marshal(&gatewaypb.WireGuardPeer{Pk: publicKey, Ip: "2 ports, restrict true"})
	if err != nil {
		t.Fatal(err)
	}
	const registerJSON = `{"client_public_key":"` + publicKey + `","port_policy":{"ports":[{"port":443,"pp":true},{"port":8080,"pp":false}],"restrict_mode":true}}`
	const chain = "App authorization failed: Auth timeout: deadline \\\"\\u00e9\\\" has elapsed"

	tests := []struct {
		name        string
		method, url string
		contentType string
		body        string
		code        int
		wantType    string
		want        string // "~": only has to contain the rest
	}{
		{"protobuf", "POST", "/RegisterCvm", "", string(register), 200, binaryType, string(registered)},
		{"protobuf by type", "POST", "/RegisterCvm", binaryType, string(register), 200, binaryType, string(registered)},
		{"protobuf when the query says so", "POST", "/RegisterCvm?json=false", "", string(register), 200, binaryType, string(registered)},
		{"the first json field decides", "POST", "/RegisterCvm?json=0&json=1", "", string(register), 200, binaryType, string(registered)},
		{"?json", "POST", "/RegisterCvm?json", "", registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"?json=", "POST", "/RegisterCvm?json=", "", registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"?json=1", "POST", "/RegisterCvm?a=b&json=1", "", registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"?json=true", "POST", "/RegisterCvm?json=true", "", registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"?json beats the type", "POST", "/RegisterCvm?json", binaryType, registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"JSON by type", "POST", "/RegisterCvm", jsonType, registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"JSON by type with parameters", "POST", "/RegisterCvm", "Application/JSON; charset=utf-8", registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"JSON by type with broken parameters", "POST", "/RegisterCvm", "application/json; charset", registerJSON, 200, jsonType, peer(publicKey, "2 ports, restrict true")},
		{"GET", "GET", "/RegisterCvm?client_public_key=k&port_policy[ports][0][port]=1&json", "", "", 200, jsonType, peer("k", "1 ports, restrict false")},
		{"GET without query", "GET", "/RegisterCvm", "", "", 200, jsonType, peer("", "absent")},
		{"empty JSON body", "POST", "/RegisterCvm?json", "", "", 200, jsonType, peer("", "absent")},
		{"empty protobuf body", "POST", "/RegisterCvm", "", "", 200, binaryType, "\x12\x06absent"},
		{"present and empty policy", "POST", "/RegisterCvm", "", string(unhex(t, emptyPolicy)), 200, binaryType, "\x12\x170 ports, restrict false"},

		{"prefix", "POST", "/Gateway.RegisterCvm?json", "", "{}", 200, jsonType, peer("", "absent")},
		{"prefix repeated and mixed", "POST", "/Tproxy.Gateway.Tproxy.Tproxy.RegisterCvm?json", "", "{}", 200, jsonType, peer("", "absent")},
		{"foreign prefix", "GET", "/Admin.RegisterCvm", "", "", 400, jsonType, "{\n  \"error\": \"Service not found: Admin.RegisterCvm\"\n}"},
		{"case matters", "GET", "/registercvm", "", "", 400, jsonType, "{\n  \"error\": \"Service not found: registercvm\"\n}"},

		{"unit JSON", "POST", "/ReloadCert?json", "", "null", 200, jsonType, "null"},
		{"unit protobuf", "POST", "/ReloadCert", "", "", 200, binaryType, ""},
		{"unit ignores its body", "POST", "/ReloadCert?json", "", "\xff no JSON", 200, jsonType, "null"},
		{"unit ignores its query", "GET", "/ReloadCert?a[=%%%", "", "", 200, jsonType, "null"},

		{"unknown JSON", "POST", "/Foo?json", "", "", 400, jsonType, "{\n  \"error\": \"Service not found: Foo\"\n}"},
		{"unknown protobuf", "POST", "/Foo", "", "", 400, binaryType, string(unhex(t, notFoundHex))},
		{"unknown after its prefix", "POST", "/Tproxy.Foo", "", "", 400, binaryType, string(unhex(t, notFoundHex))},
		{"unknown by type", "POST", "/Foo", jsonType, "", 400, jsonType, "{\n  \"error\": \"Service not found: Foo\"\n}"},
		{"chain", "GET", "/Fail", "", "", 400, jsonType, "{\n  \"error\": \"" + chain + "\"\n}"},
		{"chain in protobuf", "POST", "/Fail", "", "", 400, binaryType, "~App authorization failed: Auth timeout: deadline \"é\" has elapsed"},
		{"bad JSON", "POST", "/RegisterCvm?json", "", "{", 400, jsonType, "~failed to decode JSON of RegisterCvm: expected a member name, found the end"},
		{"bad protobuf", "POST", "/RegisterCvm", "", "\xff", 400, binaryType, "~failed to decode protobuf of RegisterCvm"},
		{"bad query", "GET", "/RegisterCvm?port_policy=1", "", "", 400, jsonType, "~failed to decode query of RegisterCvm: port_policy"},
		{"panic", "GET", "/Panic", "", "", 400, jsonType, "~internal error"},
		{"answer that cannot be encoded", "POST", "/BadText", "", "", 400, binaryType, "~failed to encode the answer"},

		{"too large", "POST", "/RegisterCvm?json", "", strings.Repeat(" ", 1001), 400, jsonType, "{\n  \"error\": \"failed to read data: payload too large\"\n}"},
		{"too large protobuf", "POST", "/RegisterCvm", "", strings.Repeat("x", 1001), 400, binaryType, "\x0a\x26failed to read data: payload too large"},
		{"too large by type", "POST", "/RegisterCvm", jsonType, strings.Repeat(" ", 1001), 400, jsonType, "~failed to read data: payload too large"},
		{"largest", "POST", "/RegisterCvm?json", "", "{}" + strings.Repeat(" ", 998), 200, jsonType, peer("", "absent")},
		{"limit of the method", "POST", "/Gateway.ReloadCert?json", "", "12345678901", 400, jsonType, "~payload too large"},
		{"largest of the method", "POST", "/ReloadCert?json", "", "1234567890", 200, jsonType, "null"},

		{"no method", "GET", "/", "", "", 422, "text/html; charset=utf-8", "~422"},
		{"deeper path", "GET", "/RegisterCvm/x", "", "", 404, "text/html; charset=utf-8", "~404"},
		{"verb", "PUT", "/RegisterCvm", "", "", 404, "text/html; charset=utf-8", "~404"},
		{"verb on nothing", "DELETE", "/", "", "", 404, "text/html; charset=utf-8", "~404"},
	}

	var mu sync.Mutex
	seen := map[string]int{}
	h := testService().Handler(Options{
		MaxBody:      1000,
		MethodLimits: map[string]int64{"ReloadCert": 10},
		Logger:       slog.New(slog.DiscardHandler),
		Observe: func(method string, code int, d time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			seen[method+" "+strconv.Itoa(code)]++
			if d < 0 {
				t.Errorf("%s took %v", method, d)
			}
		},
	})
	srv := httptest.NewServer(http.StripPrefix("/prpc", h))
	defer srv.Close()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequest(tt.method, srv.URL+"/prpc"+tt.url, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			if tt.contentType != "" {
				req.Header.Set("Content-Type", tt.contentType)
			}
			res, err := srv.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != tt.code || res.Header.Get("Content-Type") != tt.wantType {
				t.Errorf("got %d %s, want %d %s", res.StatusCode, res.Header.Get("Content-Type"), tt.code, tt.wantType)
			}
			if res.ContentLength != int64(len(body)) {
				t.Errorf("Content-Length %d for %d bytes", res.ContentLength, len(body))
			}
			if part, ok := strings.CutPrefix(tt.want, "~"); ok {
				if !bytes.Contains(body, []byte(part)) {
					t.Errorf("got %q, want it to contain %q", body, part)
				}
			} else if string(body) != tt.want {
				t.Errorf("got  %q\nwant %q", body, tt.want)
			}
		})
	}
	mu.Lock()
	defer mu.Unlock()
	for key := range seen {
		name, _, _ := strings.Cut(key, " ")
		if name != UnknownMethod && !slices.Contains(testService().Methods(), name) {
			t.Errorf("observed %q, which no method is called", name)
		}
	}
	if seen["unknown 400"] == 0 || seen["RegisterCvm 200"] == 0 || seen["Panic 400"] == 0 {
		t.Errorf("calls missing in %v", seen)
	}
}

func TestNotFoundShapes(t *testing.T) {
	const wantJSON = `{"error":{"code":404,"reason":"Not Found","description":"The requested resource could not be found."}}`
	for _, tt := range []struct {
		accept string
		json   bool
	}{
		{"", false},
		{"*/*", false},
		{"application/json", true},
		{"application/json; charset=utf-8, */*", true},
		{"text/html, application/json", false},
		{"text/html;q=0.5, application/json;q=0.9", true},
		{"application/json;q=0", false},
		{"application/json;q=x", false},
		{";;", false},
	} {
		r := httptest.NewRequest("GET", "/x/y", nil)
		r.Header.Set("Accept", tt.accept)
		w := httptest.NewRecorder()
		testService().Handler(Options{}).ServeHTTP(w, r)
		if got := w.Body.String() == wantJSON; w.Code != 404 || got != tt.json {
			t.Errorf("Accept %q: %d %s", tt.accept, w.Code, w.Body)
		}
	}
}

func TestIdentify(t *testing.T) {
	h := testService().Handler(Options{Identify: func(r *http.Request) (context.Context, error) {
		switch who := r.Header.Get("Who"); who {
		case "liar":
			return nil, errors.New("invalid quote: report data mismatch")
		case "bomb":
			panic("certificate")
		default:
			return context.WithValue(r.Context(), callerKey{}, who), nil
		}
	}, Logger: slog.New(slog.DiscardHandler)})
	call := func(who, path string) (int, string) {
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("Who", who)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	if code, body := call("alice", "/WhoAmI"); code != 200 || !strings.Contains(body, "alice") {
		t.Errorf("alice: %d %s", code, body)
	}
	// Whoever lies about itself may call nothing, not even what is public.
	for _, path := range []string{"/WhoAmI", "/ReloadCert", "/Foo"} {
		if code, body := call("liar", path); code != 400 || !strings.Contains(body, "\"invalid quote: ") {
			t.Errorf("liar on %s: %d %s", path, code, body)
		}
	}
	if code, body := call("bomb", "/WhoAmI"); code != 400 || !strings.Contains(body, "internal error") {
		t.Errorf("bomb: %d %s", code, body)
	}
}

// The stack of a panic is in the log and not in the answer.
func TestPanicIsLogged(t *testing.T) {
	var log bytes.Buffer
	h := testService().Handler(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/Panic", nil))
	for _, part := range []string{"service=Gateway", "method=Panic", "boom", "handler_test.go"} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("log lacks %q: %s", part, &log)
		}
	}
	if strings.Contains(w.Body.String(), "boom") {
		t.Errorf("the caller was told: %s", w.Body)
	}
}

func TestAbort(t *testing.T) {
	srv := httptest.NewServer(testService().Handler(Options{}))
	defer srv.Close()
	if res, err := srv.Client().Get(srv.URL + "/Abort"); err == nil {
		res.Body.Close()
		t.Fatalf("got %s, want a dropped connection", res.Status)
	}
}

// A sender that writes all of a refused body before it reads must see why.
func TestRefusedBodyIsDrained(t *testing.T) {
	srv := httptest.NewServer(testService().Handler(Options{MaxBody: 10}))
	defer srv.Close()
	for _, declared := range []bool{true, false} {
		var body io.Reader = bytes.NewReader(make([]byte, 4<<20))
		if !declared {
			body = io.MultiReader(body) // hides the length: sent in chunks
		}
		res, err := srv.Client().Post(srv.URL+"/RegisterCvm?json", "", body)
		if err != nil {
			t.Fatalf("declared %t: %v", declared, err)
		}
		text, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || !bytes.Contains(text, []byte("payload too large")) {
			t.Errorf("declared %t: %q, %v", declared, text, err)
		}
	}
}

// A declared length is no reason to allocate.
func TestTruncatedBody(t *testing.T) {
	r := httptest.NewRequest("POST", "/RegisterCvm?json", io.MultiReader(strings.NewReader("{"), errReader{}))
	r.ContentLength = 9 << 20
	w := httptest.NewRecorder()
	testService().Handler(Options{}).ServeHTTP(w, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), `"failed to read data: unexpected EOF"`) {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestRegistration(t *testing.T) {
	s := testService()
	want := []string{"Abort", "BadText", "Fail", "Panic", "RegisterCvm", "ReloadCert", "WhoAmI"}
	if got := s.Methods(); !slices.Equal(got, want) {
		t.Errorf("methods %v, want %v", got, want)
	}
	mustPanic := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s did not panic", name)
			}
		}()
		f()
	}
	mustPanic("a second handler", func() {
		Handle(s, "Fail", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) { return nil, nil })
	})
	mustPanic("a oneof", func() {
		Handle(s, "One", func(context.Context, *structpb.Struct) (*emptypb.Empty, error) { return nil, nil })
	})
	mustPanic("an empty prefix", func() { NewService("x", "") })
}

func BenchmarkHandlerRegister(b *testing.B) {
	h := testService().Handler(Options{})
	body, err := Marshal(registerRequest())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("POST", "/RegisterCvm?json", bytes.NewReader(body)))
		if w.Code != 200 {
			b.Fatal(w.Body)
		}
	}
}
