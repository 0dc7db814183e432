package adminauth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/bcrypt"
)

// ErrNoCredential is returned by New when nothing is configured that could let an operator in.
var ErrNoCredential = errors.New("the admin server is enabled without authentication: set core.admin.auth_token " +
	"(or DSTACK_GATEWAY_ADMIN_TOKEN) or core.admin.htpasswd_file, or give protection up with core.admin.insecure_no_auth = true")

// Challenge is the WWW-Authenticate header of every refusal.
const Challenge = `Basic realm="dstack-gateway admin"`

// Options say who may come in. The zero value lets nobody in and makes New fail.
type Options struct {
	// Token is the shared secret; surrounding white space does not count, empty means none.
	Token string
	// Htpasswd are users with passwords, nil means none.
	Htpasswd *Htpasswd
	// InsecureNoAuth lets everybody in.
	InsecureNoAuth bool

	// CacheFor is how long a password that was found right is not hashed again, default 5 min.
	CacheFor time.Duration

	Now        func() time.Time      // default time.Now
	Logger     *slog.Logger          // default slog.Default()
	Registerer prometheus.Registerer // nil: metrics are not registered
}

// Authenticator judges requests. It is safe for concurrent use.
type Authenticator struct {
	open     bool
	hasToken bool
	token    [sha256.Size]byte
	users    map[string][]byte
	dummy    []byte
	cacheFor time.Duration
	now      func() time.Time
	log      *slog.Logger
	refused  *prometheus.CounterVec

	// hashing bounds concurrent bcrypt work, waiting those who queue for it.
	hashing, waiting chan struct{}
	cacheKey         [32]byte

	mu    sync.Mutex
	known map[[sha256.Size]byte]time.Time // proven passwords, until when
	// The log gets one line a logEvery, whoever guesses.
	nextLog    time.Time
	suppressed int
}

const (
	maxKnown    = 256
	maxWaiting  = 64
	hashingWait = 5 * time.Second
	logEvery    = 10 * time.Second
)

// New returns ErrNoCredential, or an error that wraps it, unless there is a credential or InsecureNoAuth.
func New(o Options) (*Authenticator, error) {
	token := strings.TrimSpace(o.Token)
	users := o.Htpasswd != nil && len(o.Htpasswd.hashes) > 0
	if token == "" && !users && !o.InsecureNoAuth {
		return nil, ErrNoCredential
	}
	a := &Authenticator{
		open:     o.InsecureNoAuth,
		hasToken: token != "",
		token:    sha256.Sum256([]byte(token)),
		cacheFor: o.CacheFor,
		now:      o.Now,
		log:      o.Logger,
		hashing:  make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		waiting:  make(chan struct{}, maxWaiting),
		known:    make(map[[sha256.Size]byte]time.Time),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "dstack_gateway_admin_auth_refused_total",
			Help: "Requests to the admin server that were refused, by the credential that decided.",
		}, []string{"credential"}),
	}
	if a.cacheFor == 0 {
		a.cacheFor = 5 * time.Minute
	}
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.Default()
	}
	if users {
		a.users = o.Htpasswd.hashes
		for _, hash := range a.users {
			a.dummy = hash // of a typical cost
			break
		}
	}
	rand.Read(a.cacheKey[:])
	for _, c := range []credential{credNone, credHeader, credBearer, credBasic, credQuery, credCrossSite, credOverload} {
		a.refused.WithLabelValues(string(c))
	}
	if o.Registerer != nil {
		if err := o.Registerer.Register(a.refused); err != nil {
			return nil, fmt.Errorf("failed to register the metrics of admin authentication: %w", err)
		}
	}
	return a, nil
}

// credential is what decided about a request.
type credential string

const (
	credNone   credential = "none"
	credHeader credential = "x-admin-token"
	credBearer credential = "bearer"
	credBasic  credential = "basic"
	credQuery  credential = "query"
	// Not credentials, but reasons to refuse.
	credCrossSite credential = "cross-site"
	credOverload  credential = "overload"
)

type queryTokenKey struct{}

// QueryToken returns the token of a request that was let in because of its query. A page has to repeat it in the links
// to its own parts; everything else must treat it as the secret that it is.
func QueryToken(ctx context.Context) (string, bool) {
	token, ok := ctx.Value(queryTokenKey{}).(string)
	return token, ok
}

// Wrap puts authentication before next. Refused requests get 401 with Challenge and an empty body; 403 when a browser
// says that a page of another site made the request; 503 when too many passwords are being checked. What passes has no
// X-Admin-Token, Authorization and token parameter any more.
func (a *Authenticator) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query, hasQuery, rest := cutToken(r.URL.RawQuery)
		ok, by := a.judge(r, query, hasQuery)
		// A browser adds what it remembers to requests that other sites make it send.
		if ok && (by == credBasic || by == credNone) && crossSite(r) {
			ok, by = false, credCrossSite
		}
		if !ok {
			a.refuse(w, r, by)
			return
		}
		ctx := r.Context()
		if by == credQuery {
			ctx = context.WithValue(ctx, queryTokenKey{}, query)
		}
		next.ServeHTTP(w, stripped(r.WithContext(ctx), hasQuery, rest))
	})
}

// judge applies the rules in the order of gateway spec 9.1. The credential is the one that decided.
func (a *Authenticator) judge(r *http.Request, query string, hasQuery bool) (bool, credential) {
	by := credNone
	if a.open {
		return true, by
	}
	if token := r.Header.Get("X-Admin-Token"); token != "" {
		if a.isToken(token) {
			return true, credHeader
		}
		by = credHeader
	}
	scheme, value, _ := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " ")
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		// Decides alone.
		return a.isToken(strings.TrimSpace(value)), credBearer
	case strings.EqualFold(scheme, "Basic"):
		by = credBasic
		if user, pass, ok := parseBasic(value); ok {
			good, overload := a.basic(r.Context(), user, pass)
			if overload {
				by = credOverload
			}
			return good, by
		}
	}
	if hasQuery && r.Method == http.MethodGet {
		return a.isToken(query), credQuery
	}
	return false, by
}

// isToken compares digests, so that neither content nor length shows in the time it takes.
func (a *Authenticator) isToken(s string) bool {
	sum := sha256.Sum256([]byte(s))
	return subtle.ConstantTimeCompare(sum[:], a.token[:]) == 1 && a.hasToken
}

func parseBasic(value string) (user, pass string, ok bool) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(value))
	if err != nil || !utf8.Valid(raw) {
		return "", "", false
	}
	return strings.Cut(string(raw), ":")
}

// basic judges user and password. overload says that the answer is no only because there was no time to look.
func (a *Authenticator) basic(ctx context.Context, user, pass string) (good, overload bool) {
	if a.isToken(pass) || pass == "" && a.isToken(user) {
		return true, false
	}
	if a.users == nil {
		return false, false
	}
	digest := a.digest(user, pass)
	now := a.now()
	a.mu.Lock()
	until, cached := a.known[digest]
	a.mu.Unlock()
	if cached && now.Before(until) {
		return true, false
	}

	release, ok := a.startHashing(ctx)
	if !ok {
		return false, true
	}
	hash, exists := a.users[user]
	if !exists {
		hash = a.dummy // the time must not tell who exists
	}
	good = bcrypt.CompareHashAndPassword(hash, []byte(pass)) == nil && exists
	release()
	if good {
		a.remember(digest, now.Add(a.cacheFor))
	}
	return good, false
}

// digest identifies a user and password in the cache without keeping either.
func (a *Authenticator) digest(user, pass string) (sum [sha256.Size]byte) {
	mac := hmac.New(sha256.New, a.cacheKey[:])
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(user)))
	mac.Write(n[:])
	mac.Write([]byte(user))
	mac.Write([]byte(pass))
	mac.Sum(sum[:0])
	return sum
}

func (a *Authenticator) remember(digest [sha256.Size]byte, until time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxKnown {
		clear(a.known)
	}
	a.known[digest] = until
}

// startHashing waits for its turn, but not for ever and not with everybody.
func (a *Authenticator) startHashing(ctx context.Context) (release func(), ok bool) {
	release = func() { <-a.hashing }
	select {
	case a.hashing <- struct{}{}:
		return release, true
	default:
	}
	select {
	case a.waiting <- struct{}{}:
		defer func() { <-a.waiting }()
	default:
		return nil, false
	}
	timer := time.NewTimer(hashingWait)
	defer timer.Stop()
	select {
	case a.hashing <- struct{}{}:
		return release, true
	case <-timer.C:
	case <-ctx.Done():
	}
	return nil, false
}

// crossSite reports whether a browser says that another site's page made the request. Following a link to the
// dashboard is allowed. Browsers leave Sec-Fetch-Site out on plain HTTP, Origin never on a POST to another site.
func crossSite(r *http.Request) bool {
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" {
		if site == "same-origin" || site == "none" {
			return false
		}
		dashboard := r.URL.Path == "/" && r.Method == http.MethodGet && r.Header.Get("Sec-Fetch-Mode") == "navigate"
		return !dashboard
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return false
	}
	u, err := url.Parse(origin)
	return err != nil || !strings.EqualFold(u.Host, r.Host)
}

func (a *Authenticator) refuse(w http.ResponseWriter, r *http.Request, by credential) {
	a.refused.WithLabelValues(string(by)).Inc()
	a.logRefusal(r, by)
	status := http.StatusUnauthorized
	switch by {
	case credCrossSite:
		status = http.StatusForbidden
	case credOverload:
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "5")
	default:
		w.Header().Set("WWW-Authenticate", Challenge)
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(status)
}

// logRefusal never shows the query, the headers or who the user claims to be: people type passwords as user names.
func (a *Authenticator) logRefusal(r *http.Request, by credential) {
	if by == credNone {
		return // every browser's first request
	}
	now := a.now()
	a.mu.Lock()
	if now.Before(a.nextLog) {
		a.suppressed++
		a.mu.Unlock()
		return
	}
	suppressed := a.suppressed
	a.nextLog, a.suppressed = now.Add(logEvery), 0
	a.mu.Unlock()
	a.log.Warn("admin request refused", "credential", string(by), "peer", r.RemoteAddr, "suppressed", suppressed)
}

// cutToken takes every parameter named token out of a raw query. The first one counts. The others stay as they were
// written.
func cutToken(raw string) (token string, found bool, rest string) {
	if !strings.Contains(raw, "=") {
		return "", false, raw
	}
	kept := make([]string, 0, 4)
	for part := range strings.SplitSeq(raw, "&") {
		name, value, _ := strings.Cut(part, "=")
		if name, err := url.QueryUnescape(name); err != nil || name != "token" {
			kept = append(kept, part)
			continue
		}
		if found {
			continue
		}
		found = true
		// What does not unescape is no token.
		token, _ = url.QueryUnescape(value)
	}
	if !found {
		return "", false, raw
	}
	return token, true, strings.Join(kept, "&")
}

// stripped returns r without secrets.
func stripped(r *http.Request, hasQuery bool, rest string) *http.Request {
	if r.Header.Get("X-Admin-Token") != "" || r.Header.Get("Authorization") != "" {
		r.Header = r.Header.Clone()
		r.Header.Del("X-Admin-Token")
		r.Header.Del("Authorization")
	}
	if hasQuery {
		u := *r.URL
		u.RawQuery = rest
		r.URL = &u
		r.RequestURI = u.RequestURI()
	}
	return r
}
