package customdomain

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// zone answers queries and remembers them. It stands in for a recursive resolver.
type zone struct {
	mu      sync.Mutex
	answers map[string]answer // by name without the trailing dot
	asked   []string
}

// answer is the reply for one name. What is not in a zone does not exist.
type answer struct {
	rrs    []string // zone file lines
	ns     []string
	rcode  int
	silent bool
	reply  func(q *dns.Msg, network string) *dns.Msg // instead of all that
}

const soa = "example. 300 IN SOA ns.example. root.example. 1 2 3 4 120"

func newZone(answers map[string]answer) *zone { return &zone{answers: answers} }

func (z *zone) set(name string, a answer) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.answers[name] = a
}

// setAll changes how every name that the zone knows is answered.
func (z *zone) setAll(a answer) {
	z.mu.Lock()
	defer z.mu.Unlock()
	for name := range z.answers {
		z.answers[name] = a
	}
}

// queries returns the names asked for since the last call, in alphabetical order.
func (z *zone) queries() []string {
	z.mu.Lock()
	defer z.mu.Unlock()
	asked := z.asked
	z.asked = nil
	slices.Sort(asked)
	return asked
}

// handle returns the reply to q, nil for none.
func (z *zone) handle(q *dns.Msg, network string) *dns.Msg {
	name := strings.ToLower(strings.TrimSuffix(q.Question[0].Name, "."))
	z.mu.Lock()
	z.asked = append(z.asked, name)
	a, ok := z.answers[name]
	z.mu.Unlock()
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	switch {
	case !ok:
		m.Rcode = dns.RcodeNameError
		m.Ns = rrs(soa)
	case a.silent:
		return nil
	case a.reply != nil:
		return a.reply(q, network)
	default:
		m.Rcode, m.Answer, m.Ns = a.rcode, rrs(a.rrs...), rrs(a.ns...)
	}
	return m
}

func rrs(lines ...string) (out []dns.RR) {
	for _, line := range lines {
		rr, err := dns.NewRR(line)
		if err != nil {
			panic(err)
		}
		out = append(out, rr)
	}
	return out
}

// txtAt is an answer with one TXT record at name.
func txtAt(name string, ttl int, values ...string) answer {
	return answer{rrs: []string{fmt.Sprintf(`%s. %d IN TXT "%s"`, name, ttl, strings.Join(values, `" "`))}}
}

// serve runs the zone on a loopback address, over UDP and TCP.
func (z *zone) serve(t testing.TB) netip.AddrPort {
	t.Helper()
	var l net.Listener
	var pc net.PacketConn
	for range 20 { // until the UDP port of the same number is free too
		var err error
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if pc, err = net.ListenPacket("udp", l.Addr().String()); err == nil {
			break
		}
		l.Close()
	}
	if pc == nil {
		t.Fatal("no port is free for both UDP and TCP")
	}
	for _, s := range []*dns.Server{{Listener: l}, {PacketConn: pc}} {
		network := "udp"
		if s.Listener != nil {
			network = "tcp"
		}
		s.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			if m := z.handle(q, network); m != nil {
				w.WriteMsg(m)
			}
		})
		done := make(chan error, 1)
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			s.Shutdown()
			if err := <-done; err != nil {
				t.Errorf("DNS server: %v", err)
			}
		})
	}
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// pipes connects to zones without sockets, for tests in a synctest bubble. Both
// networks carry messages the way TCP does.
type pipes map[string]*zone

func (p pipes) dial(ctx context.Context, network, address string) (net.Conn, error) {
	z := p[address]
	if z == nil {
		return nil, fmt.Errorf("nobody at %s", address)
	}
	client, server := net.Pipe()
	go func() {
		defer server.Close()
		for {
			var size [2]byte
			if _, err := io.ReadFull(server, size[:]); err != nil {
				return
			}
			b := make([]byte, binary.BigEndian.Uint16(size[:]))
			if _, err := io.ReadFull(server, b); err != nil {
				return
			}
			q := new(dns.Msg)
			if err := q.Unpack(b); err != nil {
				panic(err)
			}
			m := z.handle(q, network)
			if m == nil {
				continue
			}
			b, err := m.Pack()
			if err != nil {
				panic(err)
			}
			if _, err := server.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)); err != nil {
				return
			}
		}
	}()
	return client, nil
}

var (
	serverA     = netip.MustParseAddrPort("192.0.2.1:53")
	serverB     = netip.MustParseAddrPort("192.0.2.2:53")
	pipeServers = []netip.AddrPort{serverA}
)

// piped returns a Resolver that asks z through pipes.
func piped(t testing.TB, z *zone, opt Options) *Resolver {
	opt.Servers = pipeServers
	opt.Dial = pipes{serverA.String(): z}.dial
	return open(t, opt)
}

func open(t testing.TB, opt Options) *Resolver {
	t.Helper()
	r, err := New(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func resolve(t testing.TB, r *Resolver, name string) (Answer, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return r.Resolve(ctx, name)
}
