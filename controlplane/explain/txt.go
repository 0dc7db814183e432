package explain

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

const (
	defaultPrefix = "_dstack-app-address"
	legacyPrefix  = "_tapp-address"
	maxDNSName    = 253
	// lookupTimeout is for the records of one name together.
	lookupTimeout = 3 * time.Second
	// resolveTimeout is for the answer of the gateway's own resolver.
	resolveTimeout = 5 * time.Second
)

// txtRecord is one of the records that may hold the address of an app.
type txtRecord struct {
	name string
	kind string
	txt  TXT
	err  error
}

// recordNames are the names asked for a host name, in the order in which they count
// (gateway spec 4.5).
func recordNames(name, prefix string, compat bool) []txtRecord {
	all := []txtRecord{{name: prefix + "." + name, kind: "primary"}}
	if compat && prefix != legacyPrefix {
		all = append(all, txtRecord{name: legacyPrefix + "." + name, kind: "legacy"})
	}
	if _, parent, ok := strings.Cut(name, "."); ok {
		all = append(all, txtRecord{name: prefix + "-wildcard." + parent, kind: "wildcard"})
	}
	kept := all[:0]
	for _, r := range all {
		if len(r.name) <= maxDNSName {
			kept = append(kept, r)
		}
	}
	return kept
}

// readValue reads "<id>:<port>" as the resolver of connections does.
func readValue(v string) (customdomain.Answer, error) {
	id, port, ok := strings.Cut(v, ":")
	switch {
	case !utf8.ValidString(v):
		return customdomain.Answer{}, errors.New("not UTF-8")
	case !ok:
		return customdomain.Answer{}, errors.New("no colon")
	case id == "":
		return customdomain.Answer{}, errors.New("no id before the colon")
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(port, "+"), 10, 16)
	if err != nil || n == 0 {
		return customdomain.Answer{}, fmt.Errorf("port %q is not a number from 1 to 65535", port)
	}
	return customdomain.Answer{ID: id, Port: uint16(n)}, nil
}

// txt finds out where a custom domain leads. The answer of the gateway's resolver
// decides, as it does for connections; DNS is asked again beside it to show every
// record, and a memory that is out of date.
func (t *trace) txt() {
	switch {
	case t.in.bare:
		t.skip(stepTXT, "an id was given, not a host name")
		return
	case t.base != nil:
		t.skip(stepTXT, "platform name: no record is asked for")
		return
	case t.refused():
		t.notReached(stepTXT)
		return
	}
	var records []txtRecord
	var wg sync.WaitGroup
	if t.d.LookupTXT != nil {
		wg.Go(func() { records = t.lookupRecords() })
	}
	answer, err, cached := t.d.Resolver.Cached(t.in.name)
	if !cached {
		ctx, cancel := context.WithTimeout(t.ctx, resolveTimeout)
		answer, err = t.d.Resolver.Resolve(ctx, t.in.name)
		cancel()
	}
	wg.Wait()

	s := newStep(stepTXT, finding.OK, "")
	s.Details = map[string]string{}
	fresh, freshErr, known := winner(records, &s)
	switch {
	case err == nil:
		s.Text = fmt.Sprintf("leads to id %s, port %d, TLS passed through to the app", answer.ID, answer.Port)
		t.id, t.port, t.mode = answer.ID, answer.Port, hostname.Passthrough
	case errors.Is(err, customdomain.ErrMalformed):
		s.Text = err.Error()
		s.Hints = append(s.Hints, "correct the record: one string, <app id>:<port>; a malformed record is final, the other names are not tried")
	case errors.Is(err, customdomain.ErrNotFound):
		s.Text = err.Error()
		s.Hints = append(s.Hints, fmt.Sprintf("publish a TXT record at %s.%s with the text <app id>:<port>", t.d.Prefix, t.in.name))
		if known == nil && len(records) > 0 && strings.HasPrefix(t.in.name, "www.") {
			s.Hints = append(s.Hints, "records of the bare domain do not count for www. and the other way round")
		}
	case errors.Is(err, customdomain.ErrOverload):
		s.Text = err.Error()
		s.Hints = append(s.Hints, "somebody asks for many unknown names: look at rejected_total{reason=\"dns\"} and at the resolvers' speed")
	default:
		s.Text = err.Error()
		s.Hints = append(s.Hints, "check the resolvers (core.proxy.app_address_dns_servers, else /etc/resolv.conf) with dstack-gw doctor, and the name servers of the domain")
	}
	// What the gateway remembers may be older than what DNS says.
	if cached && known != nil {
		now := ""
		switch {
		case freshErr == nil && (err != nil || fresh != answer):
			now = fmt.Sprintf("%s:%d", fresh.ID, fresh.Port)
		case freshErr != nil && err == nil:
			now = "something unreadable"
		}
		if now != "" {
			s.Status = finding.Warn
			s.Text += fmt.Sprintf("; this is what the gateway remembers, DNS says %s by now", now)
			s.Hints = append(s.Hints, "wait until the old record's TTL is over (at most 1 h; 10 s for a missing or malformed one)")
		}
	}
	s.Details["source"] = "DNS, just now"
	if cached {
		s.Details["source"] = "the gateway's memory"
	}
	if err != nil {
		t.refuse(s, dataplane.ReasonDNS)
		return
	}
	t.add(s)
}

func (t *trace) lookupRecords() []txtRecord {
	ctx, cancel := context.WithTimeout(t.ctx, lookupTimeout)
	defer cancel()
	records := recordNames(t.in.name, t.d.Prefix, t.d.Compat)
	var wg sync.WaitGroup
	for i := range records {
		r := &records[i]
		wg.Go(func() { r.txt, r.err = t.d.LookupTXT(ctx, r.name) })
	}
	wg.Wait()
	return records
}

// winner puts the records into s and returns what the first usable one says. won is
// nil when there is none.
func winner(records []txtRecord, s *step) (answer customdomain.Answer, err error, won *txtRecord) {
	if len(records) == 0 {
		return answer, nil, nil
	}
	tab := &finding.Table{Columns: []string{"record", "name", "answer", "use"}}
	s.Table = tab
	for i := range records {
		r := &records[i]
		said, role := "none", ""
		switch {
		case r.err != nil:
			said = "lookup failed: " + strings.ReplaceAll(r.err.Error(), "\n", "; ")
		case len(r.txt.Records) > 0:
			v := first(r.txt)
			said = fmt.Sprintf("%q, TTL %s", v, shortDuration(r.txt.TTL))
			if r.txt.Alias != "" {
				said += ", by way of " + r.txt.Alias
			}
			a, e := readValue(v)
			if e != nil {
				role = "malformed: " + e.Error()
			}
			if won != nil {
				role = "not used, " + won.kind + " comes first"
				break
			}
			answer, err, won = a, e, r
			if e == nil {
				role = "wins"
			}
			if n := len(r.txt.Records); n > 1 {
				s.Status = finding.Warn
				s.Hints = append(s.Hints, fmt.Sprintf("%s has %d TXT records; only the first of an answer counts and resolvers change the order: keep one", r.name, n))
			}
			if n := len(r.txt.Records[0]); n > 1 {
				s.Status = finding.Warn
				s.Hints = append(s.Hints, fmt.Sprintf("the record at %s consists of %d strings, of which only the first counts: write it as one", r.name, n))
			}
		}
		tab.Add(r.kind, r.name, said, role)
	}
	return answer, err, won
}

// first is the string that counts, without the escapes of the presentation format.
func first(x TXT) string {
	if len(x.Records) == 0 || len(x.Records[0]) == 0 {
		return ""
	}
	s := x.Records[0][0]
	if !strings.Contains(s, `\`) {
		return s
	}
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:min(i+4, len(s))], 10, 8); err == nil && i+3 < len(s) {
				b = append(b, byte(n))
				i += 3
				continue
			}
			i++
		}
		b = append(b, s[i])
	}
	return string(b)
}

// shortDuration is a duration in the unit that people would use.
func shortDuration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int64(d/time.Second))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int64(d/time.Minute))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int64(d/time.Hour))
	}
	return fmt.Sprintf("%dd", int64(d/(24*time.Hour)))
}
