package explain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// TXT is what DNS says about the TXT records of a name.
type TXT struct {
	// Records are the records in the order of the answer; each is a list of
	// character-strings. None: the name or its TXT records do not exist.
	Records [][]string
	TTL     time.Duration // of the answer
	Server  string        // who answered
	Alias   string        // the name that the records belong to, when it is another
}

// DNS asks recursive resolvers, without remembering anything.
type DNS struct {
	// Servers are asked in turn until one answers (core.proxy.app_address_dns_servers).
	// Empty: those of /etc/resolv.conf.
	Servers []netip.AddrPort
	// ResolvConf replaces /etc/resolv.conf.
	ResolvConf string
	// Timeout is for one server. Default 1 s.
	Timeout time.Duration
	// Dial opens connections, "udp" or "tcp". Default: that of a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// maxAliases is how many CNAME records are followed.
const maxAliases = 8

// LookupTXT asks for the TXT records of name. A name without records is no error.
func (d *DNS) LookupTXT(ctx context.Context, name string) (TXT, error) {
	servers, err := d.servers()
	if err != nil {
		return TXT{}, err
	}
	at := dns.Fqdn(name)
	for hops := 0; ; {
		m, server, err := d.ask(ctx, servers, at)
		if err != nil {
			return TXT{}, err
		}
		out := TXT{Server: server}
		alias := at
		for hops <= maxAliases {
			for _, rr := range m.Answer {
				if t, ok := rr.(*dns.TXT); ok && strings.EqualFold(t.Hdr.Name, alias) {
					out.Records = append(out.Records, t.Txt)
					out.TTL = time.Duration(t.Hdr.Ttl) * time.Second
				}
			}
			next := cname(m, alias)
			if len(out.Records) > 0 || next == "" {
				break
			}
			alias = next
			hops++
		}
		if len(out.Records) == 0 && hops > maxAliases {
			return TXT{}, fmt.Errorf("more than %d CNAME records to follow", maxAliases)
		}
		if len(out.Records) == 0 && alias != at && m.Rcode == dns.RcodeSuccess && len(m.Ns) == 0 {
			at = alias // the resolver left the rest to us
			continue
		}
		if !strings.EqualFold(alias, dns.Fqdn(name)) {
			out.Alias = strings.TrimSuffix(alias, ".")
		}
		return out, nil
	}
}

func cname(m *dns.Msg, owner string) string {
	for _, rr := range m.Answer {
		if c, ok := rr.(*dns.CNAME); ok && strings.EqualFold(c.Hdr.Name, owner) {
			return c.Target
		}
	}
	return ""
}

func (d *DNS) servers() ([]string, error) {
	var out []string
	for _, s := range d.Servers {
		out = append(out, s.String())
	}
	if len(out) > 0 {
		return out, nil
	}
	path := d.ResolvConf
	if path == "" {
		path = "/etc/resolv.conf"
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the system's resolvers: %w", err)
	}
	defer f.Close()
	conf, err := dns.ClientConfigFromReader(f)
	if err != nil {
		return nil, fmt.Errorf("read the system's resolvers in %s: %w", path, err)
	}
	if len(conf.Servers) == 0 {
		conf.Servers = []string{"127.0.0.1"} // resolv.conf(5)
	}
	for _, s := range conf.Servers {
		out = append(out, net.JoinHostPort(s, conf.Port))
	}
	return out, nil
}

// ask asks the servers in turn.
func (d *DNS) ask(ctx context.Context, servers []string, name string) (*dns.Msg, string, error) {
	var failed []error
	for _, server := range servers {
		m, err := d.exchange(ctx, "udp", server, name)
		if err == nil && m.Truncated {
			m, err = d.exchange(ctx, "tcp", server, name)
		}
		if err == nil && m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
			err = errors.New(dns.RcodeToString[m.Rcode])
		}
		if err == nil {
			return m, server, nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", server, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, "", errors.Join(failed...)
}

func (d *DNS) exchange(ctx context.Context, network, server, name string) (*dns.Msg, error) {
	timeout := d.Timeout
	if timeout <= 0 {
		timeout = time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	dial := d.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	nc, err := dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	deadline, _ := ctx.Deadline()
	if err := nc.SetDeadline(deadline); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	q := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
	q.SetEdns0(1232, false)
	c := &dns.Conn{Conn: nc, UDPSize: 4096}
	if err := c.WriteMsg(q); err != nil {
		return nil, err
	}
	for {
		m, err := c.ReadMsg()
		if err != nil {
			return nil, err
		}
		if m.Id == q.Id && m.Response && len(m.Question) == 1 && strings.EqualFold(m.Question[0].Name, name) {
			return m, nil
		}
	}
}
