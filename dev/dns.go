package dev

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Zone is what the DNS server answers: TXT records by name, and one address for
// every name under a domain. Names are in lower case without the dot at the end.
type Zone struct {
	TXT     map[string]string
	Domain  string
	Address netip.Addr
}

const zoneTTL = 10 // seconds

// answer handles one question.
func (z *Zone) answer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	m.Authoritative, m.RecursionAvailable = true, true
	if len(q.Question) != 1 || q.Question[0].Qclass != dns.ClassINET {
		m.Rcode = dns.RcodeNotImplemented
		return m
	}
	question := q.Question[0]
	name := strings.ToLower(strings.TrimSuffix(question.Name, "."))
	header := dns.RR_Header{Name: question.Name, Class: dns.ClassINET, Ttl: zoneTTL}
	text, isTXT := z.TXT[name]
	isHost := strings.HasSuffix(name, "."+z.Domain)
	switch {
	case isTXT && question.Qtype == dns.TypeTXT:
		header.Rrtype = dns.TypeTXT
		m.Answer = []dns.RR{&dns.TXT{Hdr: header, Txt: []string{text}}}
	case isHost && question.Qtype == dns.TypeA:
		header.Rrtype = dns.TypeA
		m.Answer = []dns.RR{&dns.A{Hdr: header, A: net.IP(z.Address.AsSlice())}}
	default:
		if !isTXT && !isHost {
			m.Rcode = dns.RcodeNameError
		}
		// How long the absence may be remembered (RFC 2308).
		zone := dns.Fqdn(name[strings.LastIndexByte(name, '.')+1:])
		m.Ns = []dns.RR{&dns.SOA{
			Hdr: dns.RR_Header{Name: zone, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: zoneTTL},
			Ns:  dns.Fqdn("ns." + z.Domain), Mbox: dns.Fqdn("hostmaster." + z.Domain), Serial: 1,
			Refresh: 3600, Retry: 600, Expire: 86400, Minttl: zoneTTL,
		}}
	}
	return m
}

// ServeDNS answers on UDP and TCP until ctx ends.
func ServeDNS(ctx context.Context, addr netip.AddrPort, z *Zone, log *slog.Logger) error {
	packets, err := net.ListenPacket("udp", addr.String())
	if err != nil {
		return fmt.Errorf("DNS server: %w", err)
	}
	streams, err := net.Listen("tcp", addr.String())
	if err != nil {
		packets.Close()
		return fmt.Errorf("DNS server: %w", err)
	}
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := z.answer(q)
		if len(q.Question) == 1 {
			log.Debug("asked", slog.String("name", q.Question[0].Name), slog.Int("rcode", m.Rcode), slog.Int("answers", len(m.Answer)))
		}
		if err := w.WriteMsg(m); err != nil {
			log.Warn("answering failed", slog.String("error", err.Error()))
		}
	})
	servers := []*dns.Server{{PacketConn: packets, Handler: h}, {Listener: streams, Handler: h}}
	ended := make(chan error, len(servers))
	ready := make(chan struct{}, len(servers))
	for _, s := range servers {
		s.NotifyStartedFunc = func() { ready <- struct{}{} }
		go func() { ended <- s.ActivateAndServe() }()
	}
	left := len(servers)
	started := 0
wait:
	for {
		// A server that has not started yet cannot be stopped.
		done := ctx.Done()
		if started < len(servers) {
			done = nil
		}
		select {
		case <-ready:
			started++
		case <-done:
			break wait
		case err = <-ended:
			left--
			break wait
		}
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for _, s := range servers {
		if serr := s.ShutdownContext(stop); serr != nil {
			log.Debug("stopping", slog.String("error", serr.Error()))
		}
	}
	for range left {
		if serr := <-ended; err == nil {
			err = serr
		}
	}
	if err != nil {
		return fmt.Errorf("DNS server: %w", err)
	}
	return nil
}

// askTXT asks for a record and fails if there is none.
func askTXT(ctx context.Context, server netip.AddrPort, name string) error {
	q := new(dns.Msg)
	q.SetQuestion(dns.Fqdn(name), dns.TypeTXT)
	c := &dns.Client{Timeout: time.Second}
	m, _, err := c.ExchangeContext(ctx, q, server.String())
	if err != nil {
		return err
	}
	if len(m.Answer) == 0 {
		return fmt.Errorf("%s has no TXT record for %s (another DNS server?)", server, name)
	}
	return nil
}
