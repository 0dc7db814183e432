package customdomain

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// maxAliases bounds the CNAME records followed from one name, within an answer
// and over repeated queries together.
const maxAliases = 8

// lookup asks for the record k and judges the answer.
func (r *Resolver) lookup(ctx context.Context, k key) *entry {
	name := r.recordName(k)
	a, err := r.follow(ctx, name)
	now := r.opt.Clock()
	e := &entry{}
	ttl := failureTTL
	switch {
	case r.ctx.Err() != nil:
		e.err = ErrClosed
	case err != nil:
		e.err = fmt.Errorf("%w: TXT record %s: %w", ErrResolver, name, err)
	case !a.found:
		e.state = absent
		ttl = min(max(a.ttl, r.opt.MinTTL), r.opt.NegativeTTL)
	default:
		value := unescape(a.value)
		if e.answer, err = parseValue(value); err != nil {
			e.state = malformed
			e.err = fmt.Errorf("%w: TXT record %s is %q: %w; want <app id>:<port>", ErrMalformed, name, value, err)
			ttl = min(max(a.ttl, r.opt.MinTTL), r.opt.NegativeTTL)
			break
		}
		e.state = found
		ttl = min(max(a.ttl, r.opt.MinTTL), r.opt.MaxTTL)
	}
	e.expires = now.Add(ttl)
	e.staleUntil = e.expires.Add(max(r.opt.StaleFor, 0))
	return e
}

// follow asks for name and, where the answer ends in an alias that the resolver
// did not follow, for what that points to.
func (r *Resolver) follow(ctx context.Context, name string) (txt, error) {
	ttl, hops := longestTTL, 0
	for {
		m, err := r.servers.ask(ctx, name)
		if err != nil {
			return txt{}, err
		}
		a := readTXT(m, name)
		a.ttl = min(a.ttl, ttl)
		hops += a.hops
		if a.found || a.alias == "" || hops > maxAliases {
			return a, nil
		}
		name, ttl = a.alias, a.ttl
	}
}

// txt is what one message says about the TXT records of a name.
type txt struct {
	found bool
	value string // first character-string of the first record, in presentation format
	ttl   time.Duration
	hops  int    // aliases followed
	alias string // where to go on asking; "" if the message is conclusive
}

const longestTTL = time.Duration(1<<31-1) * time.Second // RFC 2181 8

func readTXT(m *dns.Msg, name string) txt {
	a := txt{ttl: longestTTL}
	for a.hops <= maxAliases {
		if rr := first(m.Answer, dns.TypeTXT, name); rr != nil {
			a.found = true
			a.ttl = min(a.ttl, ttlOf(rr))
			if values := rr.(*dns.TXT).Txt; len(values) > 0 {
				a.value = values[0]
			}
			return a
		}
		rr := first(m.Answer, dns.TypeCNAME, name)
		if rr == nil {
			break
		}
		a.ttl = min(a.ttl, ttlOf(rr))
		a.hops++
		name = rr.(*dns.CNAME).Target
	}
	// RFC 2308 5: what does not exist does so for as long as the SOA record says,
	// and is not to be remembered without one.
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			a.ttl = min(a.ttl, ttlOf(soa), time.Duration(soa.Minttl)*time.Second)
			return a
		}
	}
	if a.hops > 0 && m.Rcode == dns.RcodeSuccess {
		a.alias = name
	} else {
		a.ttl = 0
	}
	return a
}

// first returns the first record of the type that name owns, or nil.
func first(rrs []dns.RR, typ uint16, name string) dns.RR {
	for _, rr := range rrs {
		h := rr.Header()
		if h.Rrtype == typ && h.Class == dns.ClassINET && strings.EqualFold(h.Name, name) {
			return rr
		}
	}
	return nil
}

func ttlOf(rr dns.RR) time.Duration {
	ttl := time.Duration(rr.Header().Ttl) * time.Second
	if ttl > longestTTL {
		return 0 // RFC 2181 8
	}
	return ttl
}
