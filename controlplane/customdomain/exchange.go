package customdomain

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	// ednsSize is the UDP payload offered: what passes an IPv6 path unfragmented.
	ednsSize = 1232
	// readSize is the UDP payload taken, should a server send more than offered.
	readSize = 4096

	rounds   = 3 // times that a silent server is asked
	firstTry = 1 * time.Second
)

// rcodeError is an answer that says neither what the record is nor that there is
// none.
type rcodeError int

func (e rcodeError) Error() string {
	if s, ok := dns.RcodeToString[int(e)]; ok {
		return s
	}
	return fmt.Sprintf("RCODE %d", int(e))
}

// attempts are the last failures of each server.
type attempts []attempt

type attempt struct {
	addr string
	err  error
}

func (a *attempts) add(addr string, err error) {
	for i := range *a {
		if (*a)[i].addr == addr {
			(*a)[i].err = err
			return
		}
	}
	*a = append(*a, attempt{addr, err})
}

func (a attempts) Error() string {
	parts := make([]string, len(a))
	for i, t := range a {
		parts[i] = t.addr + ": " + t.err.Error()
	}
	return strings.Join(parts, "; ")
}

// ask sends a TXT query for name to the servers in turn until one of them knows
// that the name exists or that it does not. Silent servers are asked again, with
// more patience.
func (s *servers) ask(ctx context.Context, name string) (*dns.Msg, error) {
	var failed attempts
	asked := s.order()
	for round := range rounds {
		var silent []*server
		for _, srv := range asked {
			m, err := s.try(ctx, srv, name, firstTry<<round)
			if err == nil {
				return m, nil
			}
			failed.add(srv.addr, err)
			if ctx.Err() != nil {
				return nil, failed
			}
			var rcode rcodeError
			if errors.As(err, &rcode) {
				continue
			}
			s.suspect(srv, err)
			silent = append(silent, srv)
		}
		asked = silent
	}
	return nil, failed
}

// try asks one server over UDP and, where the answer does not fit, over TCP.
func (s *servers) try(ctx context.Context, srv *server, name string, patience time.Duration) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	q := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
	q.SetEdns0(ednsSize, false)
	m, err := s.exchange(ctx, "udp", srv.addr, q)
	if err == nil && (m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented || m.Rcode == dns.RcodeBadVers) {
		// RFC 6891 7: a server of before EDNS.
		q = new(dns.Msg).SetQuestion(name, dns.TypeTXT)
		m, err = s.exchange(ctx, "udp", srv.addr, q)
	}
	if err == nil && m.Truncated {
		if m, err = s.exchange(ctx, "tcp", srv.addr, q); err != nil {
			err = fmt.Errorf("over TCP, the answer over UDP being truncated: %w", err)
		}
	}
	if err == nil && m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		err = rcodeError(m.Rcode)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// exchange sends q over a connection of its own, so that the source port is as
// hard to guess as the id, and waits for the reply that matches.
func (s *servers) exchange(ctx context.Context, network, addr string, q *dns.Msg) (*dns.Msg, error) {
	nc, err := s.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	if d, ok := ctx.Deadline(); ok {
		if err := nc.SetDeadline(d); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c := &dns.Conn{Conn: nc, UDPSize: readSize}
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	for {
		b, err := c.ReadMsgHeader(nil)
		if errors.Is(err, dns.ErrShortRead) {
			continue
		}
		if err != nil {
			return nil, err
		}
		m := new(dns.Msg)
		if err := m.Unpack(b); err != nil && !m.Truncated || !matches(q, m) {
			continue // from somebody else, or late; the right one may follow
		}
		return m, nil
	}
}

// matches tells whether m is a reply to q (RFC 5452 9.1; the address is what the
// socket is connected to).
func matches(q, m *dns.Msg) bool {
	if !m.Response || m.Id != q.Id || m.Opcode != dns.OpcodeQuery {
		return false
	}
	if len(m.Question) == 0 {
		// Servers that did not understand the question do not repeat it.
		return m.Rcode == dns.RcodeFormatError || m.Rcode == dns.RcodeNotImplemented
	}
	want, got := q.Question[0], m.Question[0]
	return len(m.Question) == 1 && got.Qtype == want.Qtype && got.Qclass == want.Qclass && strings.EqualFold(got.Name, want.Name)
}
