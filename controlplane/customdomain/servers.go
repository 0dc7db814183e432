package customdomain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// reloadEvery is how long a change of the system's resolvers may go unnoticed.
	reloadEvery = 5 * time.Second
	// suspectFor is how long a silent server is asked after the others.
	suspectFor = 30 * time.Second
)

// servers are the resolvers to ask.
type servers struct {
	path  string // of the file they come from, "" if they are given
	clock func() time.Time
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	log   *slog.Logger

	failures *prometheus.CounterVec // by server

	mu      sync.Mutex // guards what follows
	list    []*server
	info    fs.FileInfo // of path when it was read
	checked time.Time
	broken  bool // path could not be read at the last attempt
}

type server struct {
	addr    string
	suspect atomic.Int64 // until then, unix time in nanoseconds
}

func newServers(opt Options) (*servers, error) {
	s := &servers{
		clock: opt.Clock,
		dial:  opt.Dial,
		log:   opt.Logger,
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: metricPrefix + "server_failures_total",
			Help: "Queries that a resolver did not answer, by its address.",
		}, []string{"server"}),
	}
	if len(opt.Servers) > 0 {
		for _, a := range opt.Servers {
			if !a.IsValid() || a.Port() == 0 {
				return nil, fmt.Errorf("resolver address %q is not ip:port", a)
			}
			s.list = append(s.list, &server{addr: a.String()})
		}
		return s, nil
	}
	s.path, s.checked = opt.ResolvConf, s.clock()
	info, err := os.Stat(s.path)
	if err == nil {
		err = s.read(info)
	}
	if err != nil {
		return nil, fmt.Errorf("read the system's resolvers (set app_address_dns_servers to do without): %w", err)
	}
	return s, nil
}

// read takes over the resolvers in the file, keeping what is known about those
// that stay. s.mu is held, or s not shared yet.
func (s *servers) read(info fs.FileInfo) error {
	conf, err := dns.ClientConfigFromFile(s.path)
	if err != nil {
		return err
	}
	if len(conf.Servers) == 0 {
		conf.Servers = []string{"127.0.0.1"} // resolv.conf(5)
	}
	known := make(map[string]*server, len(s.list))
	for _, srv := range s.list {
		known[srv.addr] = srv
	}
	var list []*server
	var bad error
	for _, name := range conf.Servers {
		ip, err := netip.ParseAddr(name)
		if err != nil {
			bad = errors.Join(bad, fmt.Errorf("%s: nameserver: %w", s.path, err))
			continue
		}
		addr := netip.AddrPortFrom(ip, 53).String()
		srv := known[addr]
		if srv == nil {
			srv = &server{addr: addr}
		}
		list = append(list, srv)
	}
	if len(list) == 0 {
		return bad
	}
	s.list, s.info = list, info
	return nil
}

// reload reads the file again if it has changed. s.mu is held.
func (s *servers) reload(now time.Time) {
	if s.path == "" || now.Sub(s.checked) < reloadEvery {
		return
	}
	s.checked = now
	info, err := os.Stat(s.path)
	if err == nil {
		if !s.broken && os.SameFile(info, s.info) && info.ModTime().Equal(s.info.ModTime()) && info.Size() == s.info.Size() {
			return
		}
		err = s.read(info)
	}
	if err != nil && !s.broken {
		s.log.Warn("cannot read the system's resolvers again, keeping those known", "file", s.path, "err", err)
	}
	s.broken = err != nil
}

// order returns the servers in the order in which to ask them: as configured,
// those under suspicion last.
func (s *servers) order() []*server {
	now := s.clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reload(now)
	sorted := make([]*server, 0, len(s.list))
	for _, suspect := range []bool{false, true} {
		for _, srv := range s.list {
			if (now.UnixNano() < srv.suspect.Load()) == suspect {
				sorted = append(sorted, srv)
			}
		}
	}
	return sorted
}

// suspect notes that a server did not answer. One that is well comes back by
// itself: a zone that is slow to resolve can bring it under suspicion too.
func (s *servers) suspect(srv *server, err error) {
	s.failures.WithLabelValues(srv.addr).Inc()
	now := s.clock()
	until := srv.suspect.Load()
	if now.UnixNano() < until || !srv.suspect.CompareAndSwap(until, now.Add(suspectFor).UnixNano()) {
		return
	}
	s.log.Warn("resolver does not answer, asking it last for a while",
		"server", srv.addr, "for", suspectFor, "err", err)
}
