package customdomain

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	name       = "www.shop.example"
	atPrimary  = "_dstack-app-address.www.shop.example"
	atLegacy   = "_tapp-address.www.shop.example"
	atWildcard = "_dstack-app-address-wildcard.shop.example"
	id         = "3f9c5be4c1a0a6d7f2e84b915d07c6aa1b2c3d4e"
)

var (
	servfail = answer{rcode: dns.RcodeServerFailure}
	nodata   = answer{ns: []string{soa}}
	allNames = []string{atPrimary, atLegacy, atWildcard}
	sortedBy = func(names ...string) []string { slices.Sort(names); return names }
)

// TestResolve is gateway spec 4.5 against a server on loopback.
func TestResolve(t *testing.T) {
	good := func(at, id string) answer { return txtAt(at, 300, id+":8443") }
	for _, tt := range []struct {
		what    string
		prefix  string
		compat  bool
		sni     string
		zone    map[string]answer
		want    Answer
		err     error
		text    string // part of the error
		queries []string
	}{
		{what: "primary", compat: true,
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, id+":443")},
			want: Answer{id, 443}, queries: []string{atPrimary, atLegacy}},
		{what: "primary beats legacy and wildcard", compat: true,
			zone: map[string]answer{atPrimary: good(atPrimary, "new"), atLegacy: good(atLegacy, "old"), atWildcard: good(atWildcard, "wild")},
			want: Answer{"new", 8443}, queries: []string{atPrimary, atLegacy}},
		{what: "legacy beats wildcard", compat: true,
			zone: map[string]answer{atLegacy: good(atLegacy, "old"), atWildcard: good(atWildcard, "wild")},
			want: Answer{"old", 8443}, queries: []string{atPrimary, atLegacy}},
		{what: "legacy after NODATA", compat: true,
			zone: map[string]answer{atPrimary: nodata, atLegacy: good(atLegacy, "old")},
			want: Answer{"old", 8443}, queries: []string{atPrimary, atLegacy}},
		{what: "legacy after SERVFAIL", compat: true,
			zone: map[string]answer{atPrimary: servfail, atLegacy: good(atLegacy, "old")},
			want: Answer{"old", 8443}, queries: []string{atPrimary, atLegacy}},
		{what: "legacy after an answer without TXT", compat: true,
			zone: map[string]answer{atPrimary: {rrs: []string{atPrimary + ". 300 IN A 192.0.2.1"}}, atLegacy: good(atLegacy, "old")},
			want: Answer{"old", 8443}, queries: []string{atPrimary, atLegacy}},
		{what: "legacy not asked without compat",
			zone: map[string]answer{atLegacy: good(atLegacy, "old")},
			err:  ErrNotFound, queries: []string{atPrimary, atWildcard}},
		{what: "prefix is the legacy one", prefix: "_tapp-address", compat: true,
			zone: map[string]answer{atLegacy: good(atLegacy, "old")},
			want: Answer{"old", 8443}, queries: []string{atLegacy}},
		{what: "wildcard of the legacy prefix", prefix: "_tapp-address", compat: true,
			zone: map[string]answer{"_tapp-address-wildcard.shop.example": good("_tapp-address-wildcard.shop.example", "wild")},
			want: Answer{"wild", 8443}, queries: []string{"_tapp-address-wildcard.shop.example", atLegacy}},
		{what: "wildcard", compat: true,
			zone: map[string]answer{atWildcard: good(atWildcard, "wild")},
			want: Answer{"wild", 8443}, queries: allNames},
		{what: "wildcard after errors", compat: true,
			zone: map[string]answer{atPrimary: servfail, atLegacy: servfail, atWildcard: good(atWildcard, "wild")},
			want: Answer{"wild", 8443}, queries: allNames},
		{what: "wildcard one level up only", compat: true,
			zone: map[string]answer{"_dstack-app-address-wildcard.example": good("_dstack-app-address-wildcard.example", "wild")},
			err:  ErrNotFound, queries: allNames},
		{what: "wildcard under a top-level domain", sni: "shop.example",
			zone: map[string]answer{"_dstack-app-address-wildcard.example": good("_dstack-app-address-wildcard.example", "wild")},
			want: Answer{"wild", 8443}, queries: []string{"_dstack-app-address-wildcard.example", "_dstack-app-address.shop.example"}},
		{what: "no wildcard for a single label", sni: "example",
			err: ErrNotFound, queries: []string{"_dstack-app-address.example"}},
		{what: "nothing", compat: true,
			err: ErrNotFound, text: "no TXT record at " + atPrimary + ", " + atLegacy + ", " + atWildcard, queries: allNames},
		{what: "only errors", compat: true,
			zone: map[string]answer{atPrimary: servfail, atLegacy: servfail, atWildcard: servfail},
			err:  ErrResolver, text: "SERVFAIL", queries: allNames},
		{what: "an error hides whether there is a record", compat: true,
			zone: map[string]answer{atPrimary: servfail},
			err:  ErrResolver, text: "TXT record " + atPrimary, queries: allNames},
		{what: "malformed primary is final", compat: true,
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, "no port"), atLegacy: good(atLegacy, "old"), atWildcard: good(atWildcard, "wild")},
			err:  ErrMalformed, text: `"no port"`, queries: []string{atPrimary, atLegacy}},
		{what: "malformed legacy is final", compat: true,
			zone: map[string]answer{atLegacy: txtAt(atLegacy, 300, "app:0"), atWildcard: good(atWildcard, "wild")},
			err:  ErrMalformed, queries: []string{atPrimary, atLegacy}},
		{what: "malformed legacy does not matter beside primary", compat: true,
			zone: map[string]answer{atPrimary: good(atPrimary, "new"), atLegacy: txtAt(atLegacy, 300, "x")},
			want: Answer{"new", 8443}, queries: []string{atPrimary, atLegacy}},
		{what: "malformed wildcard",
			zone: map[string]answer{atWildcard: txtAt(atWildcard, 300, ":")},
			err:  ErrMalformed, queries: []string{atPrimary, atWildcard}},
		{what: "first record only",
			zone: map[string]answer{atPrimary: {rrs: []string{atPrimary + `. 300 IN TXT "first:1"`, atPrimary + `. 300 IN TXT "second:2"`}}},
			want: Answer{"first", 1}, queries: []string{atPrimary}},
		{what: "first record only, even if malformed",
			zone: map[string]answer{atPrimary: {rrs: []string{atPrimary + `. 300 IN TXT "v=spf1"`, atPrimary + `. 300 IN TXT "second:2"`}}},
			err:  ErrMalformed, queries: []string{atPrimary}},
		{what: "first character-string only",
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, "app:44", "3")},
			want: Answer{"app", 44}, queries: []string{atPrimary}},
		{what: "empty character-string",
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, "")},
			err:  ErrMalformed, queries: []string{atPrimary}},
		{what: "UTF-8",
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, `b\195\188cher:80`)},
			want: Answer{"bücher", 80}, queries: []string{atPrimary}},
		{what: "not UTF-8",
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, `b\252cher:80`)},
			err:  ErrMalformed, queries: []string{atPrimary}},
		{what: "reserved words are none of our business",
			zone: map[string]answer{atPrimary: txtAt(atPrimary, 300, "gateway:80")},
			want: Answer{"gateway", 80}, queries: []string{atPrimary}},
		{what: "upper case and trailing dot", sni: "WWW.Shop.Example.",
			zone: map[string]answer{atPrimary: good(atPrimary, "new")},
			want: Answer{"new", 8443}, queries: []string{atPrimary}},
		{what: "owner in upper case",
			zone: map[string]answer{atPrimary: txtAt(strings.ToUpper(atPrimary), 300, "app:1")},
			want: Answer{"app", 1}, queries: []string{atPrimary}},
		{what: "record of somebody else",
			zone: map[string]answer{atPrimary: txtAt("_dstack-app-address.other.example", 300, "evil:1")},
			err:  ErrNotFound, queries: []string{atPrimary, atWildcard}},
		{what: "aliases in the answer",
			zone: map[string]answer{atPrimary: {rrs: []string{
				"b.example. 300 IN CNAME c.example.", `c.example. 300 IN TXT "app:1"`, atPrimary + ". 300 IN CNAME b.example."}}},
			want: Answer{"app", 1}, queries: []string{atPrimary}},
		{what: "alias to be followed",
			zone: map[string]answer{
				atPrimary:   {rrs: []string{atPrimary + ". 300 IN CNAME b.example."}},
				"b.example": {rrs: []string{"b.example. 300 IN CNAME c.example."}},
				"c.example": txtAt("c.example", 300, "app:1")},
			want: Answer{"app", 1}, queries: sortedBy(atPrimary, "b.example", "c.example")},
		{what: "alias that leads nowhere",
			zone: map[string]answer{atPrimary: {rrs: []string{atPrimary + ". 300 IN CNAME b.example."}, rcode: dns.RcodeNameError}, atWildcard: good(atWildcard, "wild")},
			want: Answer{"wild", 8443}, queries: sortedBy(atPrimary, atWildcard)},
		{what: "alias to a name without TXT",
			zone: map[string]answer{atPrimary: {rrs: []string{atPrimary + ". 300 IN CNAME b.example."}, ns: []string{soa}}},
			err:  ErrNotFound, queries: sortedBy(atPrimary, atWildcard)},
		{what: "alias loop in one answer",
			zone: map[string]answer{atPrimary: {rrs: []string{atPrimary + ". 300 IN CNAME b.example.", "b.example. 300 IN CNAME " + atPrimary + "."}}},
			err:  ErrNotFound, queries: sortedBy(atPrimary, atWildcard)},
		{what: "not a DNS name", sni: "a b.example", err: ErrNotFound, text: `"a b.example" is not a DNS name`},
		{what: "address", sni: "192.0.2.1", err: ErrNotFound},
		{what: "longest name has room for no record",
			sni: strings.Repeat(strings.Repeat("a", 62)+".", 4) + "b", err: ErrNotFound,
			queries: []string{"_dstack-app-address-wildcard" + strings.Repeat("."+strings.Repeat("a", 62), 3) + ".b"}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			z := newZone(tt.zone)
			r := open(t, Options{Prefix: tt.prefix, Compat: tt.compat, Servers: []netip.AddrPort{z.serve(t)}})
			sni := tt.sni
			if sni == "" {
				sni = name
			}
			got, err := resolve(t, r, sni)
			if got != tt.want || !errors.Is(err, tt.err) {
				t.Fatalf("%+v, %v; want %+v, %v", got, err, tt.want, tt.err)
			}
			if err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %q does not mention %q", err, tt.text)
			}
			r.wg.Wait() // the legacy record may not have been needed
			if asked := z.queries(); !slices.Equal(asked, sortedBy(slices.Clone(tt.queries)...)) {
				t.Errorf("asked for %q, want %q", asked, tt.queries)
			}
		})
	}
}

// TestAliasLoop follows a loop over repeated queries and gives up.
func TestAliasLoop(t *testing.T) {
	z := newZone(map[string]answer{
		atPrimary:   {rrs: []string{atPrimary + ". 300 IN CNAME b.example."}},
		"b.example": {rrs: []string{"b.example. 300 IN CNAME " + atPrimary + "."}},
	})
	r := open(t, Options{Servers: []netip.AddrPort{z.serve(t)}})
	if _, err := resolve(t, r, name); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v, want ErrNotFound", err)
	}
	if n := len(z.queries()); n != maxAliases+2 { // and the wildcard record
		t.Errorf("%d queries, want %d", n, maxAliases+2)
	}
}

// TestCached checks that memory gives the same answers as the network, and knows
// what it does not know.
func TestCached(t *testing.T) {
	wild := "_dstack-app-address-wildcard.example"
	z := newZone(map[string]answer{
		"_dstack-app-address.a.example": txtAt("_dstack-app-address.a.example", 300, "a:1"),
		"_tapp-address.b.example":       txtAt("_tapp-address.b.example", 300, "b:2"),
		"_dstack-app-address.c.example": txtAt("_dstack-app-address.c.example", 300, "?"),
		wild:                            txtAt(wild, 300, "wild:3"),
	})
	r := open(t, Options{Compat: true, Servers: []netip.AddrPort{z.serve(t)}})
	for _, sni := range []string{"a.example", "b.example", "c.example", "d.example", "d.d.example"} {
		if a, err, ok := r.Cached(sni); ok {
			t.Fatalf("%s: %+v, %v before it was looked up", sni, a, err)
		}
		want, wantErr := resolve(t, r, sni)
		z.queries()
		got, err, ok := r.Cached(strings.ToUpper(sni))
		if !ok || got != want || (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
			t.Errorf("%s: from memory %+v, %v, %v; from the network %+v, %v", sni, got, err, ok, want, wantErr)
		}
		if got, err := resolve(t, r, sni); got != want || (err == nil) != (wantErr == nil) {
			t.Errorf("%s: the second time %+v, %v; the first time %+v, %v", sni, got, err, want, wantErr)
		}
	}
	if asked := z.queries(); len(asked) != 0 {
		t.Errorf("asked again for %q", asked)
	}
	if _, err, ok := r.Cached("not a name"); !ok || !errors.Is(err, ErrNotFound) {
		t.Errorf("not a name: %v, %v", err, ok)
	}
	for _, sni := range []string{"a.example", "b.example", "d.example"} {
		if n := testing.AllocsPerRun(100, func() { r.Cached(sni) }); n != 0 {
			t.Errorf("%s: %v allocations", sni, n)
		}
	}
}

func TestNew(t *testing.T) {
	valid := []netip.AddrPort{serverA}
	for _, tt := range []struct {
		what string
		opt  Options
		text string // of the error, "" for none
	}{
		{"defaults but for the server", Options{Servers: valid}, ""},
		{"longest prefix", Options{Servers: valid, Prefix: strings.Repeat("p", 63-len("-wildcard"))}, ""},
		{"prefix too long", Options{Servers: valid, Prefix: strings.Repeat("p", 64-len("-wildcard"))}, "is not a DNS label"},
		{"prefix of two labels", Options{Servers: valid, Prefix: "_a._b"}, "is not a DNS label"},
		{"prefix with a space", Options{Servers: valid, Prefix: "a b"}, "is not a DNS label"},
		{"invalid server", Options{Servers: []netip.AddrPort{{}}}, "is not ip:port"},
		{"server without port", Options{Servers: []netip.AddrPort{netip.AddrPortFrom(serverA.Addr(), 0)}}, "is not ip:port"},
		{"no resolv.conf", Options{ResolvConf: t.TempDir() + "/absent"}, "app_address_dns_servers"},
	} {
		r, err := New(tt.opt)
		if tt.text == "" {
			if err != nil {
				t.Errorf("%s: %v", tt.what, err)
				continue
			}
			r.Close()
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want an error with %q", tt.what, err, tt.text)
		}
	}
}

func TestMetrics(t *testing.T) {
	z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 300, "app:1")})
	reg := prometheus.NewPedanticRegistry()
	opt := Options{Compat: true, Servers: []netip.AddrPort{z.serve(t)}, Registerer: reg}
	r := open(t, opt)
	if _, err := New(opt); err == nil {
		t.Error("a second resolver registered the same metrics")
	}
	resolve(t, r, name)
	resolve(t, r, name)
	resolve(t, r, "other.example")
	r.wg.Wait()
	got := gather(t, reg)
	for series, want := range map[string]float64{
		"cache_misses_total":          2,
		"cache_hits_total":            1,
		"lookups_total found":         1,
		"lookups_total absent":        4,
		"lookups_total malformed":     0,
		"lookups_total failed":        0,
		"lookup_seconds":              5,
		"cache_entries":               5,
		"lookups_in_progress":         0,
		"coalesced_total":             0,
		"stale_total":                 0,
		"refused_total":               0,
		"server_failures_total never": 0,
	} {
		if got[metricPrefix+series] != want {
			t.Errorf("%s = %v, want %v", series, got[metricPrefix+series], want)
		}
	}
	r.Close()
	if got := gather(t, reg); len(got) != 0 {
		t.Errorf("still registered after Close: %v", got)
	}
}

// gather returns the values of all series, histograms by their count, by name and
// first label value.
func gather(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			series := f.GetName()
			if l := m.GetLabel(); len(l) > 0 {
				series += " " + l[0].GetValue()
			}
			out[series] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}

func BenchmarkCached(b *testing.B) {
	z := newZone(map[string]answer{
		atPrimary:  txtAt(atPrimary, 300, "app:1"),
		atWildcard: txtAt(atWildcard, 300, "wild:1"),
	})
	r := open(b, Options{Compat: true, Servers: []netip.AddrPort{z.serve(b)}})
	for what, sni := range map[string]string{"primary": name, "wildcard": "other.shop.example"} {
		resolve(b, r, sni)
		r.wg.Wait()
		b.Run(what, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err, ok := r.Cached(sni); err != nil || !ok {
						b.Error(err, ok)
						return
					}
				}
			})
		})
	}
}
