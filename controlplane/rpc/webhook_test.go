package rpc

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestWebhook(t *testing.T) {
	type hit struct{ method, path, contentType, body string }
	var last atomic.Pointer[hit]
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		last.Store(&hit{r.Method, r.URL.Path, r.Header.Get("Content-Type"), string(body)})
		switch r.URL.Path {
		case "/ok":
			w.Write([]byte(strings.Repeat("ignored ", 100_000)))
		case "/created":
			w.WriteHeader(204)
		case "/no":
			http.Error(w, "secret reason", http.StatusForbidden)
		case "/broken":
			w.WriteHeader(500)
		case "/see-other":
			http.Redirect(w, r, "/ok", http.StatusSeeOther)
		case "/temporary":
			http.Redirect(w, r, "/ok", http.StatusTemporaryRedirect)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusTemporaryRedirect)
		case "/to-no":
			http.Redirect(w, r, "/no", http.StatusFound)
		case "/not-modified":
			w.WriteHeader(304)
		case "/slow":
			select {
			case <-r.Context().Done():
			case <-time.After(5 * time.Second):
			}
		case "/slow-body":
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	})
	srv := httptest.NewServer(mux)
	defer srv.Close()
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()

	for _, tc := range []struct {
		name, url string
		want      string // "" allows
		exact     bool
		method    string // of the last request
	}{
		{"200", srv.URL + "/ok", "", true, "POST"},
		{"204", srv.URL + "/created", "", true, "POST"},
		{"200, body never ends", srv.URL + "/slow-body", "", true, "POST"},
		{"303", srv.URL + "/see-other", "", true, "GET"},
		{"307", srv.URL + "/temporary", "", true, "POST"},
		{"403", srv.URL + "/no", "App authorization failed: Request failed: the authorization service answered with status 403 Forbidden", true, ""},
		{"500", srv.URL + "/broken", "App authorization failed: Request failed: the authorization service answered with status 500 Internal Server Error", true, ""},
		{"304", srv.URL + "/not-modified", "App authorization failed: Request failed: the authorization service answered with status 304 Not Modified", true, ""},
		{"redirected to 403", srv.URL + "/to-no", "App authorization failed: Request failed: the authorization service answered with status 403 Forbidden", true, ""},
		{"redirect loop", srv.URL + "/loop", "App authorization failed: Failed to send request: stopped after 10 redirects", true, ""},
		{"slow", srv.URL + "/slow", "App authorization failed: Auth timeout: deadline has elapsed", true, ""},
		{"nobody there", "http://user:hunter2@" + dead.Addr().String() + "/?key=hunter2", "App authorization failed: Failed to send request: dial tcp " + dead.Addr().String() + ": ", false, ""},
		{"no URL", "http://a b/hunter2", "App authorization failed: Failed to send request: core.auth.url: ", false, ""},
		{"other scheme", "ftp://localhost/", "App authorization failed: Failed to send request: unsupported protocol scheme", false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t, func(d *Deps) { d.Webhook = &Webhook{URL: tc.url, Timeout: 300 * time.Millisecond} })
			info := appInfo(t, appA, inst1, compose1)
			info.InitScriptHashes = [][32]byte{{7}}
			f.caller = guest(t, appA, inst1, compose1)
			f.caller.Info = info
			code, out := f.ask(f.main, "RegisterCvm", request(wgKey(1)))
			if tc.want == "" {
				if code != 200 || f.reg.Len() != 1 {
					t.Fatalf("%d %s", code, out)
				}
				h := last.Load()
				if h.method != tc.method {
					t.Errorf("the last request is a %s, want %s", h.method, tc.method)
				}
				if h.method == "POST" {
					want := `{"app_id":"` + appA + `","compose_hash":"` + compose1 + `","instance_id":"` + inst1 + `","device_id":"02","mr_system":"` + strings.Repeat("00", 32) +
						`","mr_aggregated":"` + strings.Repeat("00", 32) + `","os_image_hash":"05","key_provider_info":"7b7d","init_script_hashes":["07` + strings.Repeat("00", 31) + `"]}`
					if h.body != want || h.contentType != "application/json" {
						t.Errorf("%s body %s", h.contentType, h.body)
					}
				}
				return
			}
			if code != 400 || f.reg.Len() != 0 || f.writes.count() != 0 {
				t.Errorf("status %d, %d instances, %d writes", code, f.reg.Len(), f.writes.count())
			}
			var e struct{ Error string }
			if err := json.Unmarshal([]byte(out), &e); err != nil {
				t.Fatal(err)
			}
			if e.Error != tc.want && (tc.exact || !strings.HasPrefix(e.Error, tc.want)) {
				t.Errorf("got %q, want %q", e.Error, tc.want)
			}
			if strings.Contains(out+f.log.String(), "hunter2") || strings.Contains(out, "secret reason") {
				t.Errorf("a secret got out: %s", out)
			}
		})
	}
}

// TestWebhookComesFirst: nothing is said about a CVM that may not register, except that nobody can tell who it is.
func TestWebhookComesFirst(t *testing.T) {
	var asked atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked.Add(1); w.WriteHeader(403) }))
	defer srv.Close()
	f := newFixture(t, func(d *Deps) { d.Webhook = &Webhook{URL: srv.URL, Timeout: time.Second} })
	f.refused(f.main, "RegisterCvm", request("bad key"), "neither app-info nor attestation provided")
	if asked.Load() != 0 {
		t.Error("asked about nobody")
	}
	f.caller = guest(t, appA, inst1, compose1)
	f.refused(f.main, "RegisterCvm", `{"client_public_key":"bad","port_policy":{"ports":[{"port":0}]}}`,
		"App authorization failed: Request failed: the authorization service answered with status 403 Forbidden")
	// The debug server does not ask.
	f.ok(f.debug, "RegisterCvm", `{"client_public_key":"`+wgKey(1)+`","app_id":"a","instance_id":"i"}`)
	if asked.Load() != 1 {
		t.Errorf("asked %d times", asked.Load())
	}
}

func TestWebhookCache(t *testing.T) {
	var asked atomic.Int32
	var status atomic.Int32
	status.Store(200)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(int(status.Load()))
	}))
	defer srv.Close()
	clk := new(clock)
	a := newAuthorizer(Webhook{URL: srv.URL, Timeout: time.Second, Cache: time.Minute}, clk.now)
	defer a.w.Client.CloseIdleConnections()
	one, other := appInfo(t, appA, inst1, compose1), appInfo(t, appA, inst1, compose2)
	for range 3 {
		if err := a.authorize(t.Context(), one); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Load() != 1 {
		t.Errorf("asked %d times", asked.Load())
	}
	// Another measurement is another question; a no is never remembered.
	status.Store(403)
	for range 2 {
		if err := a.authorize(t.Context(), other); err == nil {
			t.Error("allowed")
		}
	}
	if asked.Load() != 3 {
		t.Errorf("asked %d times", asked.Load())
	}
	clk.advance(time.Minute)
	if err := a.authorize(t.Context(), one); err == nil {
		t.Error("remembered for too long")
	}
	for n := range maxCached + 10 {
		a.remember([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	}
	if len(a.yes) > maxCached {
		t.Errorf("%d answers are remembered", len(a.yes))
	}
}

func TestWebhookWithoutCacheAsksEveryTime(t *testing.T) {
	var asked atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer srv.Close()
	f := newFixture(t, func(d *Deps) { d.Webhook = &Webhook{URL: srv.URL, Timeout: time.Second} })
	f.caller = guest(t, appA, inst1, compose1)
	for range 3 {
		f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	}
	if asked.Load() != 3 {
		t.Errorf("asked %d times", asked.Load())
	}
}

// TestSlowWebhookDelaysOneCaller: the lock of nobody is held while the webhook thinks.
func TestSlowWebhookDelaysOneCaller(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if strings.Contains(string(body), inst1) {
			<-release
		}
	}))
	defer srv.Close()
	f := newFixture(t, func(d *Deps) { d.Webhook = &Webhook{URL: srv.URL, Timeout: 10 * time.Second} })
	f.caller = guest(t, appA, inst1, compose1)
	slow := make(chan int, 1)
	started := make(chan struct{})
	go func() {
		r := httptest.NewRequest("POST", "/prpc/RegisterCvm?json", strings.NewReader(request(wgKey(1))))
		close(started)
		w := httptest.NewRecorder()
		f.main.ServeHTTP(w, r)
		slow <- w.Code
	}()
	<-started
	time.Sleep(20 * time.Millisecond) // the other request has its identity by now
	if f.s.Changing(inst1) {
		t.Error("the instance is locked while the webhook is asked")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := f.s.auth.authorize(ctx, appInfo(t, appA, inst2, compose1)); err != nil {
		t.Error(err)
	}
	close(release)
	if code := <-slow; code != 200 {
		t.Errorf("status %d", code)
	}
}

func TestWithoutURL(t *testing.T) {
	if err := withoutURL(errDisk); !errors.Is(err, errDisk) {
		t.Error(err)
	}
}
