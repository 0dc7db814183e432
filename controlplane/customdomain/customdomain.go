package customdomain

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options configure a Resolver. Zero values mean the defaults.
type Options struct {
	// Prefix is the first label of the records. Default "_dstack-app-address".
	Prefix string
	// Compat also asks for "_tapp-address" records, which older apps publish.
	Compat bool

	// Servers are the resolvers to ask, over UDP and TCP, in order of preference.
	// They must recurse. Default: those of ResolvConf.
	Servers []netip.AddrPort
	// ResolvConf is the file with the system's resolvers, read again when it
	// changes. Default /etc/resolv.conf.
	ResolvConf string
	// Timeout bounds the lookup of one record over all servers and retries.
	// Default 5 s.
	Timeout time.Duration
	// MaxOutstanding bounds the lookups in progress, each of which holds one
	// socket. Default 1024.
	MaxOutstanding int

	// CacheSize bounds the records remembered, at least 256. Default 4096, which is
	// about 1 MiB.
	CacheSize int
	// MinTTL and MaxTTL bound how long a record is believed, whatever its TTL says.
	// Defaults 1 s and 1 h.
	MinTTL, MaxTTL time.Duration
	// NegativeTTL bounds how long a missing or malformed record is remembered; a
	// customer who has just published one waits no longer. Default and maximum 10 s.
	NegativeTTL time.Duration
	// StaleFor is how long an expired record is used while the resolvers fail.
	// Default 1 h, negative for never.
	StaleFor time.Duration

	// Clock tells the time by which records expire. Default time.Now.
	Clock func() time.Time
	// Dial opens connections to resolvers; network is "udp" or "tcp". Default: that
	// of a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Logger gets failures of resolvers, at most one message a server and half
	// minute. Default: none.
	Logger *slog.Logger
	// Registerer gets the metrics, named dstack_gateway_custom_domain_*. Default:
	// none.
	Registerer prometheus.Registerer
}

const (
	defaultPrefix     = "_dstack-app-address"
	defaultResolvConf = "/etc/resolv.conf"

	minCacheSize   = 256
	maxNegativeTTL = 10 * time.Second

	// failureTTL keeps a failing lookup from being repeated for every connection.
	// RFC 9520 asks for a second at least.
	failureTTL = 2 * time.Second
	// staleWait is how long a lookup may take before an expired record is used
	// instead; staleRetry is how long that record is then used before the resolvers
	// are asked again (RFC 8767 4 and 5, shortened for a 5 s budget).
	staleWait  = 750 * time.Millisecond
	staleRetry = 5 * time.Second
)

// The kinds of errors that Resolve and Cached return, always wrapped.
var (
	// ErrNotFound: no record exists, or the name cannot have one.
	ErrNotFound = errors.New("custom domain has no app address")
	// ErrMalformed: a record exists but does not hold "<id>:<port>".
	ErrMalformed = errors.New("app address record is malformed")
	// ErrResolver: the resolvers failed, so that a record may or may not exist.
	ErrResolver = errors.New("app address lookup failed")
	// ErrOverload: MaxOutstanding lookups are in progress.
	ErrOverload = errors.New("too many app address lookups in progress")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("app address resolver is closed")
)

// Resolver looks up custom domains. It is safe for concurrent use.
type Resolver struct {
	opt     Options
	labels  [kinds]string // first labels of the records, "" if not to be asked
	cache   *cache
	servers *servers
	metrics *metrics

	ctx    context.Context // of all lookups
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // guards flights and closed
	flights map[key]*flight
	closed  bool
}

// New returns a Resolver, which must be closed. It fails when the prefix is not a
// DNS label, when the system's resolvers are needed and cannot be read, and when
// the metrics are registered already.
func New(opt Options) (*Resolver, error) {
	setDefault(&opt.Prefix, defaultPrefix)
	setDefault(&opt.ResolvConf, defaultResolvConf)
	setDefault(&opt.Timeout, 5*time.Second)
	setDefault(&opt.MaxOutstanding, 1024)
	setDefault(&opt.CacheSize, 4096)
	setDefault(&opt.MinTTL, time.Second)
	setDefault(&opt.MaxTTL, time.Hour)
	setDefault(&opt.NegativeTTL, maxNegativeTTL)
	setDefault(&opt.StaleFor, time.Hour)
	opt.CacheSize = max(opt.CacheSize, minCacheSize)
	opt.NegativeTTL = min(opt.NegativeTTL, maxNegativeTTL)
	if opt.Clock == nil {
		opt.Clock = time.Now
	}
	if opt.Dial == nil {
		opt.Dial = new(net.Dialer).DialContext
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Resolver{
		opt:     opt,
		cache:   newCache(opt.CacheSize),
		flights: make(map[key]*flight),
	}
	r.labels[primary] = opt.Prefix
	r.labels[wildcard] = opt.Prefix + wildcardSuffix
	if opt.Compat && opt.Prefix != legacyLabel {
		r.labels[legacy] = legacyLabel
	}
	if _, ok := canonical(r.labels[wildcard]); !ok || strings.Contains(opt.Prefix, ".") {
		return nil, fmt.Errorf("app address prefix %q is not a DNS label of at most %d letters, digits, '-' and '_'",
			opt.Prefix, maxLabelSize-len(wildcardSuffix))
	}
	var err error
	if r.servers, err = newServers(opt); err != nil {
		return nil, err
	}
	r.metrics = newMetrics(r)
	if opt.Registerer != nil {
		if err := opt.Registerer.Register(r.metrics); err != nil {
			return nil, fmt.Errorf("register metrics of the app address resolver: %w", err)
		}
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

func setDefault[T comparable](v *T, d T) {
	if *v == *new(T) {
		*v = d
	}
}

// Close ends the lookups in progress and waits for them. Those who wait for one
// get ErrClosed.
func (r *Resolver) Close() error {
	r.mu.Lock()
	first := !r.closed
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.wg.Wait()
	if first && r.opt.Registerer != nil {
		r.opt.Registerer.Unregister(r.metrics)
	}
	return nil
}

// Resolve returns where the custom domain name, a complete host name, points.
// The primary and the legacy record are looked up together and the primary one
// wins; the wildcard record of the parent domain counts only if neither exists
// or can be had. A malformed record is final.
//
// The error wraps ErrNotFound, ErrMalformed, ErrResolver, ErrOverload or
// ErrClosed. When ctx ends first it wraps the error of ctx, and ErrResolver too
// if that is its deadline; the lookup goes on for others.
func (r *Resolver) Resolve(ctx context.Context, name string) (Answer, error) {
	a, err, ok := r.Cached(name)
	if ok {
		return a, err
	}
	r.metrics.misses.Inc()
	name, _ = canonical(name)
	recs := r.records(name)
	pending := [kinds]wait{}
	started := 0
	v := verdict{r: r, name: name}
	for i, k := range recs.keys[:recs.n] {
		// Everything but the wildcard record is asked at once.
		for ; started < recs.n && (started <= i || recs.keys[started].kind != wildcard); started++ {
			pending[started] = r.start(recs.keys[started])
		}
		e, err := r.wait(ctx, k, pending[i])
		if err != nil {
			return Answer{}, err
		}
		if v.add(e) {
			return v.result()
		}
	}
	return v.result()
}

// Cached is Resolve out of memory. It reports false when a record would have to
// be looked up, and does not block, nor allocate when it succeeds for a name in
// lower case.
func (r *Resolver) Cached(name string) (answer Answer, err error, ok bool) {
	canon, ok := canonical(name)
	if !ok {
		return Answer{}, fmt.Errorf("%w: %q is not a DNS name", ErrNotFound, name), true
	}
	now := r.opt.Clock()
	recs := r.records(canon)
	v := verdict{r: r, name: canon}
	for _, k := range recs.keys[:recs.n] {
		e := r.cache.get(k)
		if !e.fresh(now) {
			return Answer{}, nil, false
		}
		e.touch(now)
		if v.add(e) {
			break
		}
	}
	r.metrics.hits.Inc()
	answer, err = v.result()
	return answer, err, true
}

// verdict sums up the records of a name, in the order in which they count.
type verdict struct {
	r       *Resolver
	name    string
	last    *entry // found or malformed
	failure error  // why a record before it may have been missed
}

// add takes the next record into account and reports whether it settles the
// matter.
func (v *verdict) add(e *entry) bool {
	switch e.state {
	case found, malformed:
		v.last = e
		return true
	}
	if v.failure == nil {
		v.failure = e.err
	}
	return false
}

func (v *verdict) result() (Answer, error) {
	switch {
	case v.last == nil && v.failure == nil:
		return Answer{}, &notFoundError{r: v.r, name: v.name}
	case v.last == nil:
		return Answer{}, v.failure
	}
	if v.last.stale {
		v.r.metrics.stale.Inc()
	}
	if v.last.state == malformed {
		return Answer{}, v.last.err
	}
	return v.last.answer, nil
}

// notFoundError is formatted only if somebody reads it: names that lead nowhere
// are what scanners ask for.
type notFoundError struct {
	r    *Resolver
	name string
}

func (e *notFoundError) Error() string {
	recs := e.r.records(e.name)
	var names []string
	for _, k := range recs.keys[:recs.n] {
		names = append(names, strings.TrimSuffix(e.r.recordName(k), "."))
	}
	return fmt.Sprintf("%v: no TXT record at %s", ErrNotFound, strings.Join(names, ", "))
}

func (e *notFoundError) Unwrap() error { return ErrNotFound }
