package certs

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options configures New. All fields may be left zero.
type Options struct {
	Logger     *slog.Logger          // default slog.Default()
	Now        func() time.Time      // default time.Now
	Registerer prometheus.Registerer // nil: metrics are not registered
}

// Store holds the certificates of the proxied base domains. Readers see an
// immutable snapshot; writers take turns.
type Store struct {
	log *slog.Logger
	now func() time.Time
	met *metrics

	snap atomic.Pointer[map[string]*tls.Certificate]

	mu      sync.Mutex
	records map[string]entry // from the store
	static  map[string]entry // from files, hides a record of the same domain
}

type entry struct {
	cert     *tls.Certificate
	expires  time.Time
	notAfter uint64   // of the record
	sum      [32]byte // of the record
}

// New returns an empty store.
func New(opt Options) (*Store, error) {
	s := &Store{log: opt.Logger, now: opt.Now, records: map[string]entry{}, static: map[string]entry{}}
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.met = newMetrics(s)
	s.snap.Store(&map[string]*tls.Certificate{})
	if opt.Registerer != nil {
		if err := opt.Registerer.Register(s.met); err != nil {
			return nil, fmt.Errorf("register certificate metrics: %w", err)
		}
	}
	return s, nil
}

// Get returns the certificate for *.baseDomain, nil if there is none. The name
// is in lower case without a trailing dot, as the hostname parser yields it.
func (s *Store) Get(baseDomain string) *tls.Certificate {
	return (*s.snap.Load())[baseDomain]
}

// Lookup returns the certificate for a server name: that of everything behind
// its first dot. The base domain itself and deeper names have none.
func (s *Store) Lookup(serverName string) *tls.Certificate {
	_, base, ok := strings.Cut(serverName, ".")
	if !ok {
		return nil
	}
	return s.Get(canonical(base))
}

// ErrNoCertificate is wrapped by GetCertificate's error.
var ErrNoCertificate = errors.New("no certificate for this name")

// GetCertificate is for tls.Config.
func (s *Store) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := s.Lookup(hello.ServerName); c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("%w: %q", ErrNoCertificate, hello.ServerName)
}

// Reload replaces all records, base domain to record: the path taken at start
// and whenever the stored records changed. A rejected domain disappears and is
// in the result with the reason, the others are served. Records whose content
// did not change are not parsed again. Static certificates stay.
func (s *Store) Reload(records map[string]Record) (rejected map[string]error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := make(map[string]entry, len(records))
	rejected = map[string]error{}
	for name, r := range records {
		domain := canonical(name)
		e, err := s.accept(domain, r)
		if err != nil {
			rejected[name] = s.reject(domain, err, "the domain has no certificate until a valid one is stored")
			continue
		}
		next[domain] = e
	}
	for domain := range s.records {
		if _, ok := next[domain]; !ok {
			s.log.Info("certificate withdrawn", slog.String("domain", domain))
		}
	}
	s.records = next
	s.publish()
	return rejected
}

// Update installs one record. A rejected one leaves what is installed.
func (s *Store) Update(baseDomain string, r Record) error {
	domain := canonical(baseDomain)
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.accept(domain, r)
	if err != nil {
		return s.reject(domain, err, "the previous certificate stays")
	}
	s.records[domain] = e
	s.publish()
	return nil
}

// Pin installs a record that, like a static certificate, stays through every
// Reload and hides a stored record of the same domain. It is for certificates
// made by DevCA, which no store knows. A rejected one leaves what is installed.
func (s *Store) Pin(baseDomain string, r Record) error {
	domain := canonical(baseDomain)
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.accept(domain, r)
	if err != nil {
		return s.reject(domain, err, "the previous certificate stays")
	}
	s.static[domain] = e
	s.publish()
	return nil
}

// Remove withdraws the record of a domain.
func (s *Store) Remove(baseDomain string) {
	domain := canonical(baseDomain)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.records[domain]; ok {
		delete(s.records, domain)
		s.publish()
		s.log.Info("certificate withdrawn", slog.String("domain", domain))
	}
}

// Expiry returns when each served certificate ends, by base domain: the
// record's number or the X.509 field, whichever is first.
func (s *Store) Expiry() map[string]time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]time.Time, len(s.records)+len(s.static))
	for _, m := range []map[string]entry{s.records, s.static} {
		for domain, e := range m {
			out[domain] = e.expires
		}
	}
	return out
}

// Domains returns the base domains with a certificate, sorted.
func (s *Store) Domains() []string {
	return slices.Sorted(maps.Keys(*s.snap.Load()))
}

// accept turns a record into an entry, with mu held.
func (s *Store) accept(domain string, r Record) (entry, error) {
	if domain == "" {
		return entry{}, errors.New("the base domain is empty")
	}
	e := entry{notAfter: r.NotAfter, sum: r.sum()}
	old, known := s.records[domain]
	if known && old.sum == e.sum && uint64(max(0, s.now().Unix())) < r.NotAfter {
		e.cert = old.cert
		e.expires = r.expiry(e.cert.Leaf)
		return e, nil
	}
	cert, err := r.Accept(s.now())
	if err != nil {
		return entry{}, err
	}
	e.cert = cert
	e.expires = r.expiry(cert.Leaf)
	s.announce(domain, e, "store")
	return e, nil
}

// announce logs what is about to be served, with mu held.
func (s *Store) announce(domain string, e entry, source string) {
	leaf := e.cert.Leaf
	s.log.Info("certificate installed",
		slog.String("domain", domain), slog.String("from", source), slog.String("issuer", leaf.Issuer.String()),
		slog.String("serial", leaf.SerialNumber.Text(16)), slog.String("key", keyKind(leaf)), slog.Time("expires", e.expires))
	if err := leaf.VerifyHostname("any." + domain); err != nil {
		s.log.Warn("the certificate is not for this domain: clients will refuse it",
			slog.String("domain", domain), slog.String("names", strings.Join(leaf.DNSNames, " ")))
	}
}

func (s *Store) reject(domain string, err error, hint string) error {
	s.met.rejected.Inc()
	s.log.Error("a certificate was rejected", slog.String("domain", domain), slog.String("error", err.Error()), slog.String("hint", hint))
	return fmt.Errorf("certificate for %s: %w", domain, err)
}

// publish makes the current entries visible, with mu held.
func (s *Store) publish() {
	m := make(map[string]*tls.Certificate, len(s.records)+len(s.static))
	for domain, e := range s.records {
		m[domain] = e.cert
	}
	for domain, e := range s.static {
		m[domain] = e.cert
	}
	s.snap.Store(&m)
}

// canonical is the form domains are compared in. It allocates only for names
// that are not in it already.
func canonical(domain string) string {
	return strings.ToLower(strings.TrimSuffix(domain, "."))
}
