package prpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"google.golang.org/protobuf/types/known/emptypb"
)

func newClient(t *testing.T, base string) *Client {
	t.Helper()
	c, err := NewClient(base, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func TestClient(t *testing.T) {
	type seen struct{ method, uri, contentType, body string }
	var last seen
	h := testService().Handler(Options{})
	spy := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		last = seen{r.Method, r.RequestURI, r.Header.Get("Content-Type"), string(body)}
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		h.ServeHTTP(w, r)
	})
	tcp := httptest.NewServer(http.StripPrefix("/prpc", spy))
	defer tcp.Close()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	unix := &httptest.Server{Listener: l, Config: &http.Server{Handler: spy}}
	unix.Start()
	defer unix.Close()

	for _, tt := range []struct{ base, mount string }{
		{tcp.URL + "/prpc", "/prpc"},
		{tcp.URL + "/prpc//", "/prpc"},
		{"unix:" + socket, ""},
		{"unix://" + socket, ""},
	} {
		t.Run(tt.base, func(t *testing.T) {
			c := newClient(t, tt.base)
			peer := new(gatewaypb.WireGuardPeer)
			if err := c.Call(t.Context(), "RegisterCvm", registerRequest(), peer); err != nil {
				t.Fatal(err)
			}
			if peer.Pk != publicKey || peer.Ip != "2 ports, restrict true" {
				t.Errorf("got %v", peer)
			}
			if last.method != "POST" || last.contentType != "" || !strings.HasSuffix(last.uri, tt.mount+"/RegisterCvm?json") {
				t.Errorf("sent %+v", last)
			}
			if err := c.Call(t.Context(), "ReloadCert", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
				t.Fatal(err)
			}
			if last.body != "null" {
				t.Errorf("Empty was sent as %q", last.body)
			}
			err := c.Call(t.Context(), "Fail", &emptypb.Empty{}, &emptypb.Empty{})
			se, ok := errors.AsType[*StatusError](err)
			if !ok || se.Status != 400 || se.Method != "Fail" ||
				se.Text != `App authorization failed: Auth timeout: deadline "é" has elapsed` {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestClientAnswers(t *testing.T) {
	var code int
	var body string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if code == http.StatusTemporaryRedirect {
			w.Header().Set("Location", "/elsewhere")
		}
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}))
	defer srv.Close()
	c := newClient(t, srv.URL)
	c.MaxAnswer = 100

	tests := []struct {
		name   string
		code   int
		body   string
		status int    // of a StatusError
		answer string // part of an AnswerError
		text   string // of a StatusError
	}{
		{"fine", 200, `{"pk":"x"}`, 0, "", ""},
		{"largest", 200, `{"pk":"x"}` + strings.Repeat(" ", 90), 0, "", ""},
		{"too large", 200, `{"pk":"x"}` + strings.Repeat(" ", 91), 0, "larger than 100 bytes", ""},
		{"null", 200, "null", 0, "found null", ""},
		{"nothing", 200, "", 0, "found the end", ""},
		{"not JSON", 200, "<html>", 0, "not JSON", ""},
		{"plain error", 404, "no such page\n", 404, "", "no such page"},
		{"other JSON error", 404, `{"error":{"code":404}}`, 404, "", `{"error":{"code":404}}`},
		{"created is not OK", 201, `{"pk":"x"}`, 201, "", `{"pk":"x"}`},
		{"redirects are not followed", 307, "", 307, "", ""},
		{"long error", 500, strings.Repeat("x", 1<<20), 500, "", strings.Repeat("x", maxErrorText)},
		{"binary error", 500, "a\xffb", 500, "", "a\ufffdb"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, body = tt.code, tt.body
			err := c.Call(t.Context(), "M", &emptypb.Empty{}, &gatewaypb.WireGuardPeer{})
			se, isStatus := errors.AsType[*StatusError](err)
			ae, isAnswer := errors.AsType[*AnswerError](err)
			switch {
			case tt.status != 0:
				if !isStatus || se.Status != tt.status || se.Text != tt.text {
					t.Errorf("got %.200v", err)
				}
			case tt.answer != "":
				if !isAnswer || !strings.Contains(ae.Error(), tt.answer) || ae.Unwrap() == nil {
					t.Errorf("got %v", err)
				}
			case err != nil:
				t.Error(err)
			}
		})
	}
	code, body = 200, ""
	if err := c.Call(t.Context(), "M", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
		t.Errorf("an empty answer is a unit: %v", err)
	}
}

func TestClientTransportErrors(t *testing.T) {
	dir := t.TempDir()
	c := newClient(t, "unix:"+filepath.Join(dir, "absent.sock"))
	err := c.Call(t.Context(), "Info", &emptypb.Empty{}, &emptypb.Empty{})
	if err == nil || !strings.Contains(err.Error(), "absent.sock") {
		t.Errorf("the error must name the socket: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Call(ctx, "Info", &emptypb.Empty{}, &emptypb.Empty{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}

	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "50")
		_, _ = io.WriteString(w, "{")
	}))
	defer srv.Close()
	c = newClient(t, srv.URL)
	if err := c.Call(t.Context(), "Info", &emptypb.Empty{}, &gatewaypb.InfoResponse{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
}

// An injected client is used: its transport, also under a unix base.
func TestClientInjection(t *testing.T) {
	var dialed string
	boom := errors.New("boom")
	hc := &http.Client{Transport: &http.Transport{DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
		dialed = addr
		return nil, boom
	}}}
	c, err := NewClient("http://192.0.2.1:8090/prpc", hc)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Call(t.Context(), "Info", &emptypb.Empty{}, &emptypb.Empty{}); !errors.Is(err, boom) || dialed != "192.0.2.1:8090" {
		t.Errorf("dialed %q: %v", dialed, err)
	}

	var url string
	fake := roundTripper(func(r *http.Request) (*http.Response, error) {
		url = r.URL.String()
		return nil, boom
	})
	if c, err = NewClient("unix:/run/x.sock", &http.Client{Transport: fake}); err != nil {
		t.Fatal(err)
	}
	if err := c.Call(t.Context(), "Info", &emptypb.Empty{}, &emptypb.Empty{}); !errors.Is(err, boom) || url != "http://localhost/Info?json" {
		t.Errorf("called %q: %v", url, err)
	}
	if hc.Transport == nil || c.http == hc {
		t.Error("the caller's client was changed")
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestNewClientErrors(t *testing.T) {
	for _, base := range []string{
		"", "unix:", "unix://", "/run/x.sock", "ftp://x", "http://", "http://x?y", "http://x#y",
		"http://user:secret@h:x/", "http://user:secret@/x",
	} {
		_, err := NewClient(base, nil)
		if err == nil {
			t.Errorf("%q was accepted", base)
		} else if strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%q: the error shows the password: %v", base, err)
		}
	}
}
