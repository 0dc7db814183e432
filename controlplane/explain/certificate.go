package explain

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

// certificate looks at what the gateway shows to clients whose TLS it ends.
func (t *trace) certificate() {
	switch {
	case t.in.bare:
		t.skip(stepCertificate, "an id was given, not a host name")
		return
	case t.base == nil && t.refused():
		t.notReached(stepCertificate)
		return
	case t.base == nil:
		t.skip(stepCertificate, "custom domain: TLS ends in the app, which has the certificate")
		return
	case t.port == 0:
		t.notReached(stepCertificate)
		return
	case t.mode == hostname.Passthrough:
		t.skip(stepCertificate, "passthrough: TLS ends in the app, which has the certificate")
		return
	}
	cfg := t.base.TLS
	if t.mode == hostname.TerminateH2 {
		cfg = t.base.TLSH2
	}
	chain, err := chainOf(cfg)
	if err != nil {
		s := newStep(stepCertificate, finding.Fail, "no certificate for *.%s is loaded: %v", t.base.Domain, err)
		s.Hints = []string{"see dstack-gw doctor for why it was not issued or loaded; passthrough names (<id>-<port>s) work without it"}
		t.refuse(s, dataplane.ReasonTLS)
		return
	}
	c := judge(chain, t.in.name, t.now, t.d.Roots)
	s := step{Name: stepCertificate, Finding: c.finding}
	s.Text = "TLS ends here with a certificate " + s.Text
	if t.mode == hostname.TerminateH2 {
		s.Details["ALPN"] = "h2 only: a client that offers something else is refused"
	}
	if c.finding.Status == finding.Fail {
		s.Hints = []string{"renew it with the admin RPC RenewZtDomainCert, and see dstack-gw doctor for why that did not happen by itself"}
		t.refuse(s, dataplane.ReasonTLS)
		return
	}
	if c.finding.Status == finding.Warn {
		s.Hints = append(s.Hints, "see dstack-gw doctor for the state of renewal")
	}
	t.add(s)
}

func chainOf(cfg *tls.Config) ([]*x509.Certificate, error) {
	if cfg == nil || len(cfg.Certificates) == 0 {
		return nil, errors.New("the base domain has none")
	}
	var chain []*x509.Certificate
	for _, der := range cfg.Certificates[0].Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, errors.New("the chain is empty")
	}
	return chain, nil
}

// judgement is what a client would think of a certificate.
type judgement struct {
	finding finding.Finding
	// problem is why a client refuses it, "" if it does not.
	problem string
}

// judge looks at a chain as a client of name does. Text begins with "for <names>".
func judge(chain []*x509.Certificate, name string, now time.Time, roots *x509.CertPool) judgement {
	leaf := chain[0]
	names := leaf.DNSNames
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	j := judgement{finding: finding.Finding{Status: finding.OK, Details: map[string]string{
		"issuer":  leaf.Issuer.String(),
		"serial":  fmt.Sprintf("%x", leaf.SerialNumber),
		"expires": leaf.NotAfter.UTC().Format(time.RFC3339),
	}}}
	f := &j.finding
	left := leaf.NotAfter.Sub(now)
	f.Text = fmt.Sprintf("for %s", list(names, 4))
	if len(names) == 0 {
		f.Text = "without any name"
	}
	if left > 0 {
		f.Text += fmt.Sprintf(" that is valid for %s more", shortDuration(left))
	}
	bad := func(s finding.Status, problem string) {
		f.Status = finding.Worst(f.Status, s)
		f.Text += "; " + problem
		if j.problem == "" {
			j.problem = problem
		}
	}
	switch {
	case left <= 0:
		bad(finding.Fail, fmt.Sprintf("it expired %s ago", shortDuration(-left)))
	case now.Before(leaf.NotBefore):
		bad(finding.Fail, fmt.Sprintf("it is valid only from %s on: is this machine's clock right?", leaf.NotBefore.UTC().Format(time.RFC3339)))
	}
	if err := leaf.VerifyHostname(name); err != nil {
		bad(finding.Fail, "it is not for "+name)
	}
	if f.Status == finding.OK {
		// Trust depends on the client; only what this machine says is known.
		pool := x509.NewCertPool()
		for _, c := range chain[1:] {
			pool.AddCert(c)
		}
		_, err := leaf.Verify(x509.VerifyOptions{Intermediates: pool, Roots: roots, CurrentTime: now})
		_, noRoots := errors.AsType[x509.SystemRootsError](err)
		switch {
		case err == nil || noRoots:
		case isStaging(leaf):
			bad(finding.Warn, "it was issued by a staging CA, which browsers do not trust")
		case len(chain) == 1 && leaf.Issuer.String() != leaf.Subject.String():
			bad(finding.Warn, "this machine does not trust it: the intermediate certificates are missing in the chain or the CA is private")
		default:
			bad(finding.Warn, "this machine does not trust its CA")
		}
	}
	if life := leaf.NotAfter.Sub(leaf.NotBefore); left > 0 && left < life/6 {
		f.Status = finding.Worst(f.Status, finding.Warn)
		f.Text += "; it should have been renewed by now"
	}
	return j
}

func isStaging(c *x509.Certificate) bool {
	return strings.Contains(strings.ToUpper(c.Issuer.String()), "STAGING")
}
