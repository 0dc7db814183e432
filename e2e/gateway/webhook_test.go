package gateway

import (
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestWebhook: the authorization webhook says yes, no, something else, or nothing; what guests read is exact, nobody waits
// for somebody else's answer, and what is registered keeps its traffic.
func TestWebhook(t *testing.T) {
	t.Parallel()
	g := newGateway(t, settings{"core.auth.enabled": true, "core.auth.timeout": "3s"})
	hook := fmt.Sprintf("%s:%d", g.ip, 9000)
	g.conf["core.auth.url"] = "http://" + hook + "/app-auth?secret=swordfish"
	g.start()
	pages(t, 8083, "app")

	var behaviour atomic.Value // func(w, r, body)
	type handler = func(w http.ResponseWriter, r *http.Request, body string)
	var srv *http.Server
	up := func() {
		l, err := net.Listen("tcp4", hook)
		if err != nil {
			t.Fatal(err)
		}
		srv = &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			behaviour.Load().(handler)(w, r, string(body))
		})}
		go srv.Serve(l)
	}
	answer := func(status int) handler {
		return func(w http.ResponseWriter, _ *http.Request, _ string) { w.WriteHeader(status) }
	}
	t.Cleanup(func() { srv.Close() })
	behaviour.Store(answer(204))
	up()

	v := guestOf(t, appInfo(webApp, idOf("first")))
	asked := make(chan string, 1)
	behaviour.Store(handler(func(w http.ResponseWriter, r *http.Request, body string) {
		asked <- fmt.Sprint(r.Method, " ", r.URL, " ", r.Header.Get("Content-Type"), " ", body)
		w.WriteHeader(299)
	}))
	ip, first := v.register(t, g)
	zeros := strings.Repeat("00", 32)
	equal(t, "the question", <-asked, fmt.Sprintf(`POST /app-auth?secret=swordfish application/json {"app_id":%q,"compose_hash":%q,"instance_id":%q,"device_id":%q,"mr_system":%q,"mr_aggregated":%q,"os_image_hash":%q,"key_provider_info":%q,"init_script_hashes":null}`,
		v.app, strings.Repeat("ab", 32), v.instance, zeros, zeros, zeros, zeros, hex.EncodeToString([]byte("{}"))))

	refused := func(what, want string) {
		t.Helper()
		a, err := newGuest(t, what).tryRegister(g)
		if err != nil || a.status != 400 || a.body != jsonError(want) {
			t.Errorf("%s: %v %+v\nwant %s", what, err, a, want)
		}
		// Those who are registered stay so and are served.
		if page, err := g.get(v.instance+"-8083", 5*time.Second); err != nil || page != ip.String()+" app" {
			t.Errorf("%s: traffic: %v %q", what, err, page)
		}
	}
	for _, status := range []int{500, 403, 304} {
		behaviour.Store(answer(status))
		refused(fmt.Sprint(status), fmt.Sprintf("App authorization failed: Request failed: the authorization service answered with status %d %s", status, http.StatusText(status)))
	}
	redirect := func(status int, to string) handler {
		return func(w http.ResponseWriter, r *http.Request, body string) {
			switch {
			case r.URL.Path == "/app-auth":
				http.Redirect(w, r, to, status)
			case r.URL.Path == "/loop":
				http.Redirect(w, r, "/loop", status)
			case status == 307 && (r.Method != "POST" || !strings.Contains(body, `"instance_id"`)):
				w.WriteHeader(400)
			}
		}
	}
	for _, status := range []int{301, 302, 303, 307} {
		behaviour.Store(redirect(status, "/elsewhere"))
		newGuest(t, fmt.Sprint("redirected by ", status)).register(t, g)
	}
	behaviour.Store(redirect(302, "/loop"))
	refused("a circle", "App authorization failed: Failed to send request: stopped after 10 redirects")
	behaviour.Store(handler(func(http.ResponseWriter, *http.Request, string) { panic(http.ErrAbortHandler) }))
	refused("hangs up", "App authorization failed: Failed to send request: EOF")

	// Slow for some: they wait for the timeout and no longer, the others for nothing.
	slow := make(chan struct{})
	behaviour.Store(handler(func(_ http.ResponseWriter, r *http.Request, body string) {
		if strings.Contains(body, hexOf("slow")) {
			select {
			case <-slow:
			case <-r.Context().Done():
			}
		}
	}))
	waiting := make(chan string, 50)
	for i := range cap(waiting) {
		s := guestOf(t, appInfo(idOf("slow"), idOf(fmt.Sprint("slow ", i))))
		go func() {
			began := time.Now()
			a, err := s.tryRegister(g)
			if d := time.Since(began); d < 2700*time.Millisecond || d > 8*time.Second {
				err = fmt.Errorf("after %s: %w", d, err)
			}
			waiting <- fmt.Sprint(err, a.status, a.body)
		}()
	}
	time.Sleep(100 * time.Millisecond)
	began := time.Now()
	newGuest(t, "quick").register(t, g)
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("a registration waited %s for the webhook's answers about others", d)
	}
	for range cap(waiting) {
		equal(t, "slow", <-waiting, fmt.Sprint(nil, 400, jsonError("App authorization failed: Auth timeout: deadline has elapsed")))
	}
	close(slow)

	srv.Close()
	refused("down", "App authorization failed: Failed to send request: dial tcp "+hook+": connect: connection refused")
	a, err := v.tryRegister(g)
	if err != nil || a.status != 400 {
		t.Errorf("a refresh without a webhook: %v %+v", err, a)
	}
	behaviour.Store(answer(200))
	up()
	newGuest(t, "up again").register(t, g)
	if _, again := v.register(t, g); again != first {
		t.Errorf("the answer changed:\n%s\n%s", first, again)
	}
	g.logged("level=WARN", "registration not authorized", "connection refused")
	if strings.Contains(g.log(), "swordfish") {
		t.Error("the log holds the secret of the webhook's URL")
	}
}

func hexOf(name string) string {
	id := idOf(name)
	return hex.EncodeToString(id[:])
}
