package customdomain

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// TestTruncated answers over UDP with as much as fits and over TCP in full.
func TestTruncated(t *testing.T) {
	var mu sync.Mutex
	var networks []string
	z := newZone(map[string]answer{atPrimary: {reply: func(q *dns.Msg, network string) *dns.Msg {
		mu.Lock()
		defer mu.Unlock()
		networks = append(networks, network)
		m := new(dns.Msg).SetReply(q)
		if network == "udp" {
			m.Truncated = true
			m.Answer = rrs(atPrimary + `. 300 IN TXT "wrong:1"`)
			return m
		}
		m.Answer = rrs(atPrimary + `. 300 IN TXT "app:443"`)
		for range 20 {
			m.Answer = append(m.Answer, rrs(atPrimary+`. 300 IN TXT "`+strings.Repeat("x", 200)+`"`)...)
		}
		return m
	}}})
	r := open(t, Options{Servers: []netip.AddrPort{z.serve(t)}})
	if a, err := resolve(t, r, name); err != nil || a != (Answer{"app", 443}) {
		t.Errorf("%+v, %v", a, err)
	}
	if !slices.Equal(networks, []string{"udp", "tcp"}) {
		t.Errorf("asked over %v", networks)
	}
}

// TestQuery checks what is sent, and that it differs from one query to the next.
func TestQuery(t *testing.T) {
	ids := make(map[uint16]bool)
	var mu sync.Mutex
	answers := make(map[string]answer)
	for i := range 20 {
		sni := string(rune('a'+i)) + ".shop.example"
		at := "_dstack-app-address." + sni
		answers[at] = answer{reply: func(q *dns.Msg, network string) *dns.Msg {
			mu.Lock()
			defer mu.Unlock()
			ids[q.Id] = true
			if o := q.IsEdns0(); o == nil || o.UDPSize() != 1232 || !q.RecursionDesired || q.Question[0].Qtype != dns.TypeTXT {
				t.Errorf("query %v", q)
			}
			m := new(dns.Msg).SetReply(q)
			m.Answer = rrs(at + `. 300 IN TXT "app:443"`)
			return m
		}}
	}
	ports := make(map[string]bool)
	z := newZone(answers)
	r := open(t, Options{Servers: []netip.AddrPort{z.serve(t)}, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			mu.Lock()
			defer mu.Unlock()
			ports[c.LocalAddr().String()] = true
		}
		return c, err
	}})
	for at := range answers {
		if _, err := resolve(t, r, strings.TrimPrefix(at, "_dstack-app-address.")); err != nil {
			t.Error(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	// Two of twenty may be equal by chance, all of them will not be.
	if len(ids) < 15 || len(ports) < 15 {
		t.Errorf("20 queries had %d ids and %d source ports", len(ids), len(ports))
	}
}

// TestOldServer refuses EDNS without repeating the question.
func TestOldServer(t *testing.T) {
	for _, rcode := range []int{dns.RcodeFormatError, dns.RcodeNotImplemented} {
		z := newZone(map[string]answer{atPrimary: {reply: func(q *dns.Msg, network string) *dns.Msg {
			m := new(dns.Msg).SetReply(q)
			if q.IsEdns0() != nil {
				m.Rcode, m.Question = rcode, nil
				return m
			}
			m.Answer = rrs(atPrimary + `. 300 IN TXT "app:443"`)
			return m
		}}})
		r := open(t, Options{Servers: []netip.AddrPort{z.serve(t)}})
		if a, err := resolve(t, r, name); err != nil || a != (Answer{"app", 443}) {
			t.Errorf("after %s: %+v, %v", dns.RcodeToString[rcode], a, err)
		}
	}
}

// TestForgedReplies sends what an attacker could before the right reply.
func TestForgedReplies(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		buf := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			q := new(dns.Msg)
			if err := q.Unpack(buf[:n]); err != nil {
				t.Error(err)
				return
			}
			send := func(change func(m *dns.Msg)) {
				m := new(dns.Msg).SetReply(q)
				m.Answer = rrs(q.Question[0].Name + ` 300 IN TXT "evil:1"`)
				change(m)
				b, err := m.Pack()
				if err != nil {
					t.Error(err)
				}
				pc.WriteTo(b, from)
			}
			pc.WriteTo(nil, from)
			pc.WriteTo([]byte("short"), from)
			pc.WriteTo([]byte(strings.Repeat("x", 50)), from)
			send(func(m *dns.Msg) { m.Id++ })
			send(func(m *dns.Msg) { m.Response = false })
			send(func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify })
			send(func(m *dns.Msg) { m.Question = nil })
			send(func(m *dns.Msg) { m.Question[0].Name = "other.example." })
			send(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeA })
			send(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
			send(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
			send(func(m *dns.Msg) { m.Answer = rrs(q.Question[0].Name + ` 300 IN TXT "app:443"`) })
		}
	}()
	r := open(t, Options{Servers: []netip.AddrPort{pc.LocalAddr().(*net.UDPAddr).AddrPort()}})
	if a, err := resolve(t, r, name); err != nil || a != (Answer{"app", 443}) {
		t.Errorf("%+v, %v", a, err)
	}
	pc.Close()
	<-served
}

// TestRefusedPort has nobody behind the first server, which ICMP tells at once.
func TestRefusedPort(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := pc.LocalAddr().(*net.UDPAddr).AddrPort()
	pc.Close()
	z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 300, "app:443")})
	r := open(t, Options{Servers: []netip.AddrPort{dead, z.serve(t)}})
	if a, err := resolve(t, r, name); err != nil || a != (Answer{"app", 443}) {
		t.Errorf("%+v, %v", a, err)
	}
	r = open(t, Options{Servers: []netip.AddrPort{dead}})
	if _, err := resolve(t, r, name); !errors.Is(err, ErrResolver) || !strings.Contains(err.Error(), dead.String()) {
		t.Errorf("%v, want ErrResolver that names %v", err, dead)
	}
}

// TestServers checks who is asked, how often, and how long that takes.
func TestServers(t *testing.T) {
	good := txtAt(atPrimary, 1, "app:443")
	for _, tt := range []struct {
		what   string
		a, b   answer
		wantA  int // queries
		wantB  int
		want   Answer
		err    string
		within time.Duration
	}{
		{"the first one knows", good, answer{silent: true}, 1, 0, Answer{"app", 443}, "", 0},
		{"the first one is silent", answer{silent: true}, good, 1, 1, Answer{"app", 443}, "", firstTry},
		{"the first one fails", servfail, good, 1, 1, Answer{"app", 443}, "", 0},
		{"the first one refuses", answer{rcode: dns.RcodeRefused}, good, 1, 1, Answer{"app", 443}, "", 0},
		{"both fail", servfail, answer{rcode: dns.RcodeRefused}, 1, 1, Answer{}, "192.0.2.1:53: SERVFAIL; 192.0.2.2:53: REFUSED", 0},
		{"unknown code", answer{rcode: 13}, servfail, 1, 1, Answer{}, "RCODE 13", 0},
		{"one fails, one is silent", servfail, answer{silent: true}, 1, 3, Answer{}, "192.0.2.1:53: SERVFAIL; 192.0.2.2:53: ", 5 * time.Second},
		{"both silent", answer{silent: true}, answer{silent: true}, 2, 2, Answer{}, "192.0.2.1:53: ", 5 * time.Second},
	} {
		t.Run(tt.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newZone(map[string]answer{atPrimary: tt.a}), newZone(map[string]answer{atPrimary: tt.b})
				r := open(t, Options{
					Servers: []netip.AddrPort{serverA, serverB},
					Dial:    pipes{serverA.String(): a, serverB.String(): b}.dial,
				})
				begin := time.Now()
				e := r.lookup(timeout(t, r.opt.Timeout), key{primary, name})
				if e.answer != tt.want || e.state == unknown && (!errors.Is(e.err, ErrResolver) || !strings.Contains(e.err.Error(), tt.err)) {
					t.Errorf("%+v, want %+v, error with %q", e, tt.want, tt.err)
				}
				if d := time.Since(begin); d != tt.within {
					t.Errorf("took %v, want %v", d, tt.within)
				}
				if na, nb := len(a.queries()), len(b.queries()); na != tt.wantA || nb != tt.wantB {
					t.Errorf("%d and %d queries, want %d and %d", na, nb, tt.wantA, tt.wantB)
				}
			})
		})
	}
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// TestSuspect keeps a silent server out of the way for a while, and says so once.
func TestSuspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newZone(map[string]answer{atPrimary: {silent: true}})
		b := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 1, "app:443")})
		var log strings.Builder
		r := open(t, Options{
			Servers: []netip.AddrPort{serverA, serverB},
			Dial:    pipes{serverA.String(): a, serverB.String(): b}.dial,
			Logger:  slog.New(slog.NewTextHandler(&log, nil)),
		})
		for i, want := range []int{1, 0, 0, 1} { // queries to the silent one
			e := r.lookup(timeout(t, r.opt.Timeout), key{primary, name})
			if got := len(a.queries()); e.state != found || got != want {
				t.Errorf("lookup %d: %+v, the silent server was asked %d times, want %d", i, e, got, want)
			}
			time.Sleep(suspectFor/3 + time.Second)
		}
		if n := strings.Count(log.String(), "server="+serverA.String()); n != 2 {
			t.Errorf("%d messages in a minute, want 2:\n%s", n, &log)
		}
	})
}

// TestResolvConf follows changes of the system's resolvers.
func TestResolvConf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		write := func(text string) {
			t.Helper()
			next := path + ".new"
			if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(next, path); err != nil {
				t.Fatal(err)
			}
		}
		var log strings.Builder
		write("# by hand\nsearch example\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\noptions ndots:5\n")
		r := open(t, Options{ResolvConf: path, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		check := func(what string, want ...string) {
			t.Helper()
			var got []string
			for _, srv := range r.servers.order() {
				got = append(got, srv.addr)
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s: %q, want %q", what, got, want)
			}
		}
		check("at first", "192.0.2.1:53", "[fe80::1%eth0]:53")
		r.servers.suspect(r.servers.list[0], errors.New("silent"))
		check("under suspicion", "[fe80::1%eth0]:53", "192.0.2.1:53")

		write("nameserver 192.0.2.1\nnameserver 192.0.2.2\n")
		check("changed a moment ago", "[fe80::1%eth0]:53", "192.0.2.1:53")
		time.Sleep(reloadEvery)
		check("changed", "192.0.2.2:53", "192.0.2.1:53")

		log.Reset()
		for range 3 {
			write("nameserver nonsense\n")
			time.Sleep(reloadEvery)
			check("broken", "192.0.2.2:53", "192.0.2.1:53")
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "nonsense") {
			t.Errorf("%d warnings, want 1 that tells what is wrong:\n%s", n, &log)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(reloadEvery)
		check("removed", "192.0.2.2:53", "192.0.2.1:53")
		write("nameserver nonsense\nnameserver 192.0.2.3\n")
		time.Sleep(reloadEvery)
		check("usable in part", "192.0.2.3:53")
		write("")
		time.Sleep(reloadEvery)
		check("empty", "127.0.0.1:53")
	})
}
