package dev

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func testZone() *Zone {
	return &Zone{
		TXT:     map[string]string{"_dstack-app-address.www.shop.test": "abc:443"},
		Domain:  "apps.dstack.test",
		Address: netip.MustParseAddr("127.0.0.1"),
	}
}

func TestZone(t *testing.T) {
	z := testZone()
	for _, tt := range []struct {
		name  string
		kind  uint16
		rcode int
		want  string // text of the answer, "" = none
	}{
		{"_dstack-app-address.www.shop.test.", dns.TypeTXT, dns.RcodeSuccess, "abc:443"},
		{"_Dstack-App-Address.WWW.shop.test.", dns.TypeTXT, dns.RcodeSuccess, "abc:443"},
		{"_dstack-app-address.www.shop.test.", dns.TypeA, dns.RcodeSuccess, ""},
		{"_tapp-address.www.shop.test.", dns.TypeTXT, dns.RcodeNameError, ""},
		{"x-8080.apps.dstack.test.", dns.TypeA, dns.RcodeSuccess, "127.0.0.1"},
		{"x-8080.apps.dstack.test.", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{"example.com.", dns.TypeA, dns.RcodeNameError, ""},
	} {
		q := new(dns.Msg)
		q.SetQuestion(tt.name, tt.kind)
		m := z.answer(q)
		got := ""
		if len(m.Answer) == 1 {
			switch rr := m.Answer[0].(type) {
			case *dns.TXT:
				got = rr.Txt[0]
			case *dns.A:
				got = rr.A.String()
			}
			if m.Answer[0].Header().Name != tt.name {
				t.Errorf("%s: the answer is for %s", tt.name, m.Answer[0].Header().Name)
			}
		}
		if m.Rcode != tt.rcode || got != tt.want || m.Id != q.Id {
			t.Errorf("%s %s: got %s %q", tt.name, dns.TypeToString[tt.kind], dns.RcodeToString[m.Rcode], got)
		}
		if _, err := m.Pack(); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestServeDNS(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddrPort(l.Addr().String())
	l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeDNS(ctx, addr, testZone(), slog.New(slog.DiscardHandler)) }()
	name := "_dstack-app-address.www.shop.test"
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err = askTXT(t.Context(), addr, name); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), dns.TypeTXT)
	if m, _, err := (&dns.Client{Net: "tcp"}).Exchange(q, addr.String()); err != nil || len(m.Answer) != 1 {
		t.Errorf("over TCP: %v, %v", m, err)
	}
	if err := askTXT(t.Context(), addr, "_dstack-app-address.other.test"); err == nil {
		t.Error("a missing record is found")
	}
	if err := ServeDNS(ctx, addr, testZone(), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a second server on the same address does not fail")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
