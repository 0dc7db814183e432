package adminauth

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/bcrypt"
)

const secret = "correct horse battery staple"

func hash(t testing.TB, password string, cost int) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

func users(t testing.TB, lines ...string) *Htpasswd {
	t.Helper()
	h, err := ReadHtpasswd(strings.NewReader(strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func basic(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }

func TestNewFailsClosed(t *testing.T) {
	for name, o := range map[string]Options{
		"nothing":            {},
		"blank token":        {Token: " \t\n"},
		"htpasswd of nobody": {Htpasswd: &Htpasswd{}},
	} {
		if _, err := New(o); !errors.Is(err, ErrNoCredential) {
			t.Errorf("%s: %v, want ErrNoCredential", name, err)
		}
	}
	for name, o := range map[string]Options{
		"token":    {Token: "x"},
		"htpasswd": {Htpasswd: users(t, "u:"+hash(t, "p", 4))},
		"open":     {InsecureNoAuth: true},
	} {
		if _, err := New(o); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCredentials goes through the table of gateway spec 9.1.
func TestCredentials(t *testing.T) {
	both := Options{Token: "  " + secret + "\n", Htpasswd: users(t, "alice:"+hash(t, "wonder", 4), "bob:"+strings.Replace(hash(t, "builder", 4), "$2a$", "$2y$", 1))}
	tokenOnly := Options{Token: secret}
	usersOnly := Options{Htpasswd: both.Htpasswd}
	open := Options{InsecureNoAuth: true, Token: secret}
	q := "?token=correct+horse%20battery+staple"

	type hdr map[string]string
	for _, tc := range []struct {
		name   string
		o      Options
		method string
		target string
		h      hdr
		want   int
	}{
		{"no credential", both, "GET", "/", nil, 401},
		{"no credential, unknown path", both, "GET", "/nowhere", nil, 401},
		{"no credential, odd method", both, "PROPFIND", "/", nil, 401},
		{"header", both, "POST", "/", hdr{"X-Admin-Token": secret}, 200},
		{"header, any method", both, "DELETE", "/x", hdr{"X-Admin-Token": secret}, 200},
		{"wrong header", both, "POST", "/", hdr{"X-Admin-Token": secret + "x"}, 401},
		{"wrong header, right bearer", both, "POST", "/", hdr{"X-Admin-Token": "x", "Authorization": "Bearer " + secret}, 200},
		{"right header, wrong bearer", both, "POST", "/", hdr{"X-Admin-Token": secret, "Authorization": "Bearer x"}, 200},
		{"wrong header, right query", both, "GET", "/" + q, hdr{"X-Admin-Token": "x"}, 200},
		{"bearer", both, "POST", "/", hdr{"Authorization": "Bearer " + secret}, 200},
		{"bearer, lower case", both, "POST", "/", hdr{"Authorization": "bearer " + secret}, 200},
		{"bearer, upper case", both, "POST", "/", hdr{"Authorization": "BEARER " + secret}, 200},
		{"bearer, prefix of the token", both, "POST", "/", hdr{"Authorization": "Bearer " + secret[:5]}, 401},
		{"wrong bearer, right query", both, "GET", "/" + q, hdr{"Authorization": "Bearer x"}, 401},
		{"empty bearer, right query", both, "GET", "/" + q, hdr{"Authorization": "Bearer"}, 401},
		{"empty bearer without a token", usersOnly, "GET", "/", hdr{"Authorization": "Bearer "}, 401},
		{"empty header without a token", usersOnly, "GET", "/", hdr{"X-Admin-Token": ""}, 401},
		{"empty query without a token", usersOnly, "GET", "/?token=", nil, 401},
		{"empty basic without a token", usersOnly, "GET", "/", hdr{"Authorization": basic(":")}, 401},
		{"basic, user", both, "GET", "/", hdr{"Authorization": basic("alice:wonder")}, 200},
		{"basic, user with $2y$", both, "GET", "/", hdr{"Authorization": basic("bob:builder")}, 200},
		{"basic, scheme in any case", both, "GET", "/", hdr{"Authorization": "bAsIc " + basic("alice:wonder")[6:]}, 200},
		{"basic, wrong password", both, "GET", "/", hdr{"Authorization": basic("alice:wonders")}, 401},
		{"basic, password of somebody else", both, "GET", "/", hdr{"Authorization": basic("bob:wonder")}, 401},
		{"basic, nobody", both, "GET", "/", hdr{"Authorization": basic("mallory:wonder")}, 401},
		{"basic, empty password", both, "GET", "/", hdr{"Authorization": basic("alice:")}, 401},
		{"basic, token as password of anybody", both, "GET", "/", hdr{"Authorization": basic("whoever:" + secret)}, 200},
		{"basic, token as user", both, "GET", "/", hdr{"Authorization": basic(secret + ":")}, 200},
		{"basic, token as user with a password", both, "GET", "/", hdr{"Authorization": basic(secret + ":x")}, 401},
		{"basic, token only", tokenOnly, "GET", "/", hdr{"Authorization": basic("alice:wonder")}, 401},
		{"basic without colon, right query", both, "GET", "/" + q, hdr{"Authorization": basic("alice")}, 200},
		{"basic without base64, right query", both, "GET", "/" + q, hdr{"Authorization": "Basic !!!"}, 200},
		{"basic without base64", both, "GET", "/", hdr{"Authorization": "Basic !!!"}, 401},
		{"basic not UTF-8", both, "GET", "/", hdr{"Authorization": basic("alice:\xff")}, 401},
		{"wrong basic, right query", both, "GET", "/" + q, hdr{"Authorization": basic("alice:x")}, 401},
		{"other scheme, right query", both, "GET", "/" + q, hdr{"Authorization": "Digest x"}, 200},
		{"query", both, "GET", "/prpc/Status" + q, nil, 200},
		{"query, not alone", both, "GET", "/prpc/GetInfo" + q + "&id=1", nil, 200},
		{"query, wrong", both, "GET", "/?token=x", nil, 401},
		{"query, first counts", both, "GET", "/?token=x&token=" + q[7:], nil, 401},
		{"query, encoded name", both, "GET", "/?t%6fken=" + q[7:], nil, 200},
		{"query, bad escape", both, "GET", "/?token=%zz", nil, 401},
		{"query on POST", both, "POST", "/" + q, nil, 401},
		{"query on HEAD", both, "HEAD", "/" + q, nil, 401},
		{"open", open, "GET", "/", nil, 200},
		{"open, wrong credential", open, "GET", "/", hdr{"Authorization": "Bearer x"}, 200},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.o.Logger = slog.New(slog.DiscardHandler)
			a, err := New(tc.o)
			if err != nil {
				t.Fatal(err)
			}
			r := httptest.NewRequest(tc.method, tc.target, nil)
			for k, v := range tc.h {
				r.Header.Set(k, v)
			}
			called := false
			w := httptest.NewRecorder()
			a.Wrap(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				called = true
				if r.Header.Get("Authorization")+r.Header.Get("X-Admin-Token") != "" || r.URL.Query().Has("token") || strings.Contains(r.RequestURI, "token") {
					t.Errorf("a secret is left in the request: %v %v %v", r.Header, r.URL, r.RequestURI)
				}
			})).ServeHTTP(w, r)
			if w.Code != tc.want || called != (tc.want == 200) {
				t.Fatalf("status %d, handler called %v; want %d", w.Code, called, tc.want)
			}
			if tc.want == 401 {
				if got := w.Header().Get("WWW-Authenticate"); got != `Basic realm="dstack-gateway admin"` {
					t.Errorf("WWW-Authenticate %q", got)
				}
				if w.Body.Len() != 0 {
					t.Errorf("body %q", w.Body)
				}
			}
		})
	}
}

func TestQueryIsCutOut(t *testing.T) {
	for _, tc := range []struct{ raw, token, rest string }{
		{"token=a", "a", ""},
		{"json&token=a%26b", "a&b", "json"},
		{"a[b]=%7e&token=x&c=1&token=y", "x", "a[b]=%7e&c=1"},
		{"tokens=a&mytoken=b", "", "tokens=a&mytoken=b"},
		{"token", "", "token"},
		{"a=1&token", "", "a=1"},
		{"&&token=x&", "x", "&&"},
		{"", "", ""},
		{"%zz=1&token=x", "x", "%zz=1"},
	} {
		token, _, rest := cutToken(tc.raw)
		if token != tc.token || rest != tc.rest {
			t.Errorf("%q: token %q rest %q, want %q %q", tc.raw, token, rest, tc.token, tc.rest)
		}
	}
}

func TestQueryTokenIsInTheContext(t *testing.T) {
	a, err := New(Options{Token: "s&cret"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		target, header, want string
		uri                  string
	}{
		{"/?token=s%26cret&x=1", "", "s&cret", "/?x=1"},
		{"/?token=s%26cret", "s&cret", "", "/"},
		{"/?y=2", "s&cret", "", "/?y=2"},
	} {
		r := httptest.NewRequest("GET", tc.target, nil)
		r.Header.Set("X-Admin-Token", tc.header)
		w := httptest.NewRecorder()
		a.Wrap(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if got, ok := QueryToken(r.Context()); got != tc.want || ok != (tc.want != "") {
				t.Errorf("%s: QueryToken %q %v", tc.target, got, ok)
			}
			if r.RequestURI != tc.uri {
				t.Errorf("RequestURI %q, want %q", r.RequestURI, tc.uri)
			}
		})).ServeHTTP(w, r)
		if w.Code != 200 {
			t.Errorf("%s: status %d", tc.target, w.Code)
		}
	}
}

func TestPagesOfOtherSites(t *testing.T) {
	a, err := New(Options{Token: secret, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	type hdr map[string]string
	for _, tc := range []struct {
		name, method, path string
		h                  hdr
		want               int
	}{
		{"command line", "POST", "/prpc/Exit", nil, 200},
		{"own page", "POST", "/prpc/Exit", hdr{"Sec-Fetch-Site": "same-origin", "Origin": "http://example.com"}, 200},
		{"own page, no fetch metadata", "POST", "/prpc/Exit", hdr{"Origin": "http://example.com"}, 200},
		{"typed address", "GET", "/prpc/Status", hdr{"Sec-Fetch-Site": "none"}, 200},
		{"other site", "POST", "/prpc/Exit", hdr{"Sec-Fetch-Site": "cross-site"}, 403},
		{"sibling site", "POST", "/prpc/Exit", hdr{"Sec-Fetch-Site": "same-site"}, 403},
		{"image on another site", "GET", "/prpc/Exit", hdr{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403},
		{"image of the dashboard", "GET", "/", hdr{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403},
		{"link to a method", "GET", "/prpc/Exit", hdr{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403},
		{"link to the dashboard", "GET", "/", hdr{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200},
		{"other site, no fetch metadata", "POST", "/prpc/Exit", hdr{"Origin": "http://evil.example"}, 403},
		{"sandboxed page", "POST", "/prpc/Exit", hdr{"Origin": "null"}, 403},
	} {
		r := httptest.NewRequest(tc.method, tc.path, nil)
		for k, v := range tc.h {
			r.Header.Set(k, v)
		}
		serve := func(auth string) int {
			r.Header.Set("Authorization", auth)
			w := httptest.NewRecorder()
			a.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, r)
			return w.Code
		}
		if got := serve(basic("x:" + secret)); got != tc.want {
			t.Errorf("%s with the browser's password: %d, want %d", tc.name, got, tc.want)
		}
		// No page can make a browser send a token that it does not know.
		if got := serve("Bearer " + secret); got != 200 {
			t.Errorf("%s with a bearer token: %d, want 200", tc.name, got)
		}
	}
}

func TestPasswordsAreCachedForAWhile(t *testing.T) {
	now := time.Unix(1700000000, 0)
	a, err := New(Options{Htpasswd: users(t, "alice:"+hash(t, "wonder", 4)), Now: func() time.Time { return now }, CacheFor: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	good := func(user, pass string) bool {
		ok, overload := a.basic(t.Context(), user, pass)
		if overload {
			t.Fatal("overload")
		}
		return ok
	}
	if !good("alice", "wonder") {
		t.Fatal("refused")
	}
	// From here on the hash is gone: only the cache can answer.
	a.users["alice"] = []byte(hash(t, "another", 4))
	if !good("alice", "wonder") {
		t.Error("not cached")
	}
	if good("alicewonder", "") || good("alic", "ewonder") {
		t.Error("the cache mixes user and password up")
	}
	now = now.Add(time.Minute)
	if good("alice", "wonder") {
		t.Error("cached for too long")
	}
	if good("alice", "nonsense") {
		t.Error("a wrong password passes")
	}
	for i := range 3 * maxKnown {
		a.remember([32]byte{byte(i), byte(i >> 8)}, now)
	}
	if len(a.known) > maxKnown {
		t.Errorf("%d remembered passwords", len(a.known))
	}
}

func TestGuessingIsBounded(t *testing.T) {
	a, err := New(Options{Token: secret, Htpasswd: users(t, "alice:"+hash(t, "wonder", 4)), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	for range cap(a.hashing) {
		a.hashing <- struct{}{}
	}
	for range cap(a.waiting) {
		a.waiting <- struct{}{}
	}
	serve := func(auth string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", auth)
		w := httptest.NewRecorder()
		a.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, r)
		return w
	}
	if w := serve(basic("alice:wonder")); w.Code != 503 || w.Header().Get("Retry-After") == "" || w.Header().Get("WWW-Authenticate") != "" {
		t.Errorf("%d %v, want 503 without a challenge", w.Code, w.Header())
	}
	if w := serve(basic("alice:" + secret)); w.Code != 200 {
		t.Errorf("a token needs no hashing, yet: %d", w.Code)
	}
	<-a.waiting
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, ok := a.startHashing(ctx); ok {
		t.Error("a caller who left got a turn")
	}
	<-a.hashing
	if w := serve(basic("alice:wonder")); w.Code != 200 {
		t.Errorf("with room: %d", w.Code)
	}
}

func TestConcurrentLogins(t *testing.T) {
	a, err := New(Options{Htpasswd: users(t, "alice:"+hash(t, "wonder", 4)), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	h := a.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	var wg sync.WaitGroup
	for n := range 50 {
		wg.Go(func() {
			pass, want := "wonder", 200
			if n%2 == 0 {
				pass, want = "x", 401
			}
			r := httptest.NewRequest("GET", "/", nil)
			r.SetBasicAuth("alice", pass)
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != want {
				t.Errorf("password %q: %d", pass, w.Code)
			}
		})
	}
	wg.Wait()
}

func TestLogShowsNoSecret(t *testing.T) {
	var log bytes.Buffer
	now := time.Unix(1700000000, 0)
	reg := prometheus.NewRegistry()
	a, err := New(Options{
		Token: secret, Htpasswd: users(t, "alice:"+hash(t, "wonder", 4)), Registerer: reg,
		Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Now:    func() time.Time { return now },
	})
	if err != nil {
		t.Fatal(err)
	}
	h := a.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	try := func(set func(*http.Request)) {
		r := httptest.NewRequest("GET", "/prpc/Status?token=guess-q", nil)
		set(r)
		h.ServeHTTP(httptest.NewRecorder(), r)
	}
	try(func(*http.Request) {})
	try(func(r *http.Request) { r.Header.Set("X-Admin-Token", "guess-h"); r.URL.RawQuery = "" })
	now = now.Add(time.Minute)
	try(func(r *http.Request) { r.Header.Set("Authorization", "Bearer guess-b") })
	now = now.Add(time.Minute)
	try(func(r *http.Request) { r.SetBasicAuth("guess-u", "guess-p") })
	now = now.Add(time.Minute)
	try(func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+secret) })
	if strings.Contains(log.String(), "guess") || strings.Contains(log.String(), secret) {
		t.Errorf("the log shows secrets:\n%s", &log)
	}
	if n := strings.Count(log.String(), "admin request refused"); n != 3 {
		t.Errorf("%d lines, want 3 (one was too soon):\n%s", n, &log)
	}
	if !strings.Contains(log.String(), "suppressed=1") {
		t.Errorf("the suppressed refusal is not told:\n%s", &log)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			counts[f.GetName()+"/"+m.Label[0].GetValue()] = m.Counter.GetValue()
		}
	}
	want := map[string]float64{"none": 0, "x-admin-token": 1, "bearer": 1, "basic": 1, "query": 1, "cross-site": 0, "overload": 0}
	for label, n := range want {
		if got, ok := counts["dstack_gateway_admin_auth_refused_total/"+label]; !ok || got != n {
			t.Errorf("refused by %s: %v, want %v", label, got, n)
		}
	}
	if len(counts) != len(want) {
		t.Errorf("series %v", counts)
	}
	if _, err := New(Options{Token: secret, Registerer: reg}); err == nil {
		t.Error("metrics registered twice without an error")
	}
}

func TestReadHtpasswd(t *testing.T) {
	h4, other := hash(t, "p", 4), hash(t, "q", 4)
	for _, tc := range []struct{ name, text, err string }{
		{"plain", "u:" + h4, ""},
		{"CRLF, comments, blanks", "# people\r\n\r\n  u:" + h4 + " \r\n#x:y\r\n", ""},
		{"2b", "u:$2b" + h4[3:], ""},
		{"2y", "u:$2y" + h4[3:], ""},
		{"twice", "u:" + other + "\nu:" + h4, ""},
		{"empty", "", "there is no user"},
		{"comments only", "# nothing\n\n", "there is no user"},
		{"md5", "v:" + h4 + "\nu:$apr1$abc$def", `line 2: the password of user "u" is not a bcrypt hash`},
		{"plain text", "u:secretword", "not a bcrypt hash"},
		{"sha", "u:{SHA}2jmj7l5rSw0yVb/vlWAYkK/YBwk=", "not a bcrypt hash"},
		{"2x", "u:$2x" + h4[3:], "not a bcrypt hash"},
		{"short", "u:" + h4[:59], "not a bcrypt hash"},
		{"cost not a number", "u:$2a$xx" + h4[6:], "not a bcrypt hash"},
		{"no colon", "justaname", "line 1 is not of the form"},
		{"no user", ":" + h4, "line 1 is not of the form"},
		{"long line", "u:" + strings.Repeat("x", 70<<10), "token too long"},
		{"long file", strings.Repeat("# filler filler filler filler\n", 40<<10), "larger than"},
	} {
		h, err := ReadHtpasswd(strings.NewReader(tc.text))
		if tc.err == "" {
			if err != nil {
				t.Errorf("%s: %v", tc.name, err)
			} else if bcrypt.CompareHashAndPassword(h.hashes["u"], []byte("p")) != nil {
				t.Errorf("%s: password p is refused", tc.name)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.err)
		}
		if err != nil && strings.Contains(err.Error(), "secretword") {
			t.Errorf("%s: the error shows the password: %v", tc.name, err)
		}
	}
	if _, err := ReadHtpasswd(io.MultiReader(strings.NewReader("u:"+h4+"\n"), failing{})); err == nil || !strings.Contains(err.Error(), "disk gone") {
		t.Errorf("read error: %v", err)
	}
	if _, err := LoadHtpasswd(t.TempDir() + "/missing"); err == nil || !strings.Contains(err.Error(), "htpasswd_file") {
		t.Errorf("missing file: %v", err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("disk gone") }

// FuzzQuery: whatever the query, no token parameter stays behind, and without one nothing changes.
func FuzzQuery(f *testing.F) {
	for _, s := range []string{"token=a", "a=1&token=%zz&token=b", "t%6Fken=x;token=y", "&&=&token", "json&a[b]=c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		_, found, rest := cutToken(raw)
		if !found && rest != raw && !strings.Contains(rest, "&") && strings.Contains(rest, "token=") {
			t.Fatalf("%q became %q", raw, rest)
		}
		if _, again, _ := cutToken(rest); again {
			t.Fatalf("%q: a token is left in %q", raw, rest)
		}
	})
}
