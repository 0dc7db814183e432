package explain

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
)

// bothProtocols listens on one port with UDP and TCP. A port that is free for the one
// may be taken for the other.
func bothProtocols(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	for attempt := 0; ; attempt++ {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", pc.LocalAddr().String())
		if err == nil {
			return pc, ln
		}
		pc.Close()
		if attempt == 20 {
			t.Fatal(err)
		}
	}
}

// nameserver answers with zone file lines by name; "servfail" and "silent" are what
// they say. Names that it does not know do not exist.
func nameserver(t *testing.T, zone map[string][]string) netip.AddrPort {
	t.Helper()
	pc, ln := bothProtocols(t)
	at := netip.MustParseAddrPort(pc.LocalAddr().String())
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		_, udp := w.RemoteAddr().(*net.UDPAddr)
		lines, ok := zone[strings.ToLower(strings.TrimSuffix(q.Question[0].Name, "."))]
		if !ok {
			m.Rcode = dns.RcodeNameError
			soa, _ := dns.NewRR("example. 60 IN SOA ns.example. root.example. 1 2 3 4 60")
			m.Ns = append(m.Ns, soa)
		}
		for _, l := range lines {
			switch {
			case l == "servfail":
				m.Rcode = dns.RcodeServerFailure
			case l == "silent":
				return
			case l == "truncated" && udp:
				m.Truncated = true
				_ = w.WriteMsg(m)
				return
			case l == "truncated":
			default:
				rr, err := dns.NewRR(l)
				if err != nil {
					t.Error(err)
				}
				m.Answer = append(m.Answer, rr)
			}
		}
		_ = w.WriteMsg(m)
	})
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: ln, Handler: h}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		done := make(chan struct{})
		go func() { _ = s.ActivateAndServe(); close(done) }()
		<-up
		t.Cleanup(func() { _ = s.Shutdown(); <-done })
	}
	return at
}

func TestLookupTXT(t *testing.T) {
	at := nameserver(t, map[string][]string{
		"one.example":  {`one.example. 300 IN TXT "app:443"`},
		"two.example":  {`two.example. 60 IN TXT "app:4" "43"`, `two.example. 60 IN TXT "other:1"`},
		"esc.example":  {`esc.example. 60 IN TXT "b\195\188\"c:80"`},
		"via.example":  {`via.example. 60 IN CNAME one.example.`, `one.example. 300 IN TXT "app:443"`},
		"far.example":  {`far.example. 60 IN CNAME one.example.`},
		"loop.example": {`loop.example. 60 IN CNAME loop.example.`},
		"big.example":  {"truncated", `big.example. 300 IN TXT "big:1"`},
		"bad.example":  {"servfail"},
		"a.example":    {`a.example. 60 IN A 192.0.2.1`},
		"mute.example": {"silent"},
	})
	d := &DNS{Servers: []netip.AddrPort{at}, Timeout: 200 * time.Millisecond}
	for _, tt := range []struct {
		name, first, alias, err string
		records                 int
	}{
		{name: "one.example", first: "app:443", records: 1},
		{name: "ONE.example", first: "app:443", records: 1},
		{name: "two.example", first: "app:4", records: 2},
		{name: "esc.example", first: `bü"c:80`, records: 1},
		{name: "via.example", first: "app:443", alias: "one.example", records: 1},
		{name: "far.example", first: "app:443", alias: "one.example", records: 1},
		{name: "big.example", first: "big:1", records: 1},
		{name: "a.example"}, {name: "none.example"},
		{name: "bad.example", err: "SERVFAIL"},
		{name: "mute.example", err: "i/o timeout"},
		{name: "loop.example", err: "CNAME"},
	} {
		x, err := d.LookupTXT(t.Context(), tt.name)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %+v, %v", tt.name, x, err)
			}
			continue
		}
		if err != nil || len(x.Records) != tt.records || first(x) != tt.first || x.Alias != tt.alias || x.Server != at.String() {
			t.Errorf("%s: %+v, %v", tt.name, x, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.LookupTXT(ctx, "one.example"); err == nil {
		t.Error("no error after the end of the context")
	}
}

func TestResolvConf(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver 192.0.2.1\nnameserver 2001:db8::1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := (&DNS{ResolvConf: path}).servers()
	if err != nil || strings.Join(got, " ") != "192.0.2.1:53 [2001:db8::1]:53" {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := (&DNS{ResolvConf: filepath.Join(dir, "none")}).LookupTXT(t.Context(), "x.example"); err == nil || !strings.Contains(err.Error(), "system's resolvers") {
		t.Error(err)
	}
}

// The values that explain calls malformed are those that connections refuse, and the
// records that it says win are those that win: the real resolver is the judge.
func TestAgreesWithResolver(t *testing.T) {
	values := []string{"app:443", "app:+443", "app:0443", "app:0", "app:65536", "app", ":1", "app:", "a:b:1", "a:1:2", " app:1", "app: 1", "", `b\252:1`, `b\195\188:1`, `a\\b:1`, `a\"b:1`}
	records := []string{"_dstack-app-address.x.shop.example", "_tapp-address.x.shop.example", "_dstack-app-address-wildcard.shop.example"}
	for _, v := range values {
		for i := range records {
			zone := map[string][]string{}
			for _, name := range records[i:] {
				zone[name] = []string{name + `. 60 IN TXT "` + v + `"`}
				if name != records[i] {
					zone[name] = []string{name + `. 60 IN TXT "later:9"`}
				}
			}
			at := nameserver(t, zone)
			r, err := customdomain.New(customdomain.Options{Compat: true, Servers: []netip.AddrPort{at}})
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld(t)
			w.deps.Resolver = r
			w.deps.LookupTXT = (&DNS{Servers: []netip.AddrPort{at}}).LookupTXT
			w.deps.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, net.ErrClosed }
			want, wantErr := r.Resolve(t.Context(), "x.shop.example")

			e, err := New(w.deps)
			if err != nil {
				t.Fatal(err)
			}
			tr := &trace{e: e, d: &e.d, ctx: t.Context(), now: now, snap: w.snap, in: input{name: "x.shop.example"}}
			var s step
			got, gotErr, won := winner(tr.lookupRecords(), &s)
			if (wantErr == nil) != (gotErr == nil) || wantErr == nil && got != want || won == nil || won.name != records[i] {
				t.Errorf("%q at %s: %v, %v; connections get %v, %v", v, records[i], got, gotErr, want, wantErr)
			}
			r.Close()
		}
	}
}

func TestRecordNames(t *testing.T) {
	join := func(r []txtRecord) string {
		var names []string
		for _, x := range r {
			names = append(names, x.name)
		}
		return strings.Join(names, " ")
	}
	for _, tt := range []struct {
		name, prefix string
		compat       bool
		want         string
	}{
		{"www.shop.example", defaultPrefix, true, "_dstack-app-address.www.shop.example _tapp-address.www.shop.example _dstack-app-address-wildcard.shop.example"},
		{"www.shop.example", "_p", false, "_p.www.shop.example _p-wildcard.shop.example"},
		{"www.shop.example", legacyPrefix, true, "_tapp-address.www.shop.example _tapp-address-wildcard.shop.example"},
		{strings.Repeat("a", 60) + "." + strings.Repeat("b.", 90) + "c", defaultPrefix, true, "_dstack-app-address-wildcard." + strings.Repeat("b.", 90) + "c"},
	} {
		if got := join(recordNames(tt.name, tt.prefix, tt.compat)); got != tt.want {
			t.Errorf("%s: %s", tt.name, got)
		}
	}
}
