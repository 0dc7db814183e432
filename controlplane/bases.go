package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/dstack-gw/dstack-gw/controlplane/certs"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
	"github.com/dstack-gw/dstack-gw/dataplane/terminate"
)

// baseTable keeps the TLS configurations of the base domains. One is made anew only
// when its certificate changed: configurations stay attached to the ticket keys.
type baseTable struct {
	mu     sync.Mutex
	lo, hi uint16
	made   map[string]*baseEntry
}

type baseEntry struct {
	cert      *tls.Certificate
	plain, h2 *tls.Config
}

// openCerts loads the stored and the static certificates.
func (g *Gateway) openCerts(r prometheus.Registerer) (err error) {
	p := &g.cfg.Core.Proxy
	if g.bases.lo, g.bases.hi, err = terminate.Versions(p.TLSVersions); err != nil {
		return fmt.Errorf("core.proxy.tls_versions: %w", err)
	}
	g.bases.made = map[string]*baseEntry{}
	if g.tickets, err = certs.NewTicketKeys(certs.TicketOptions{}); err != nil {
		return err
	}
	if g.certs, err = certs.New(certs.Options{Logger: g.log, Registerer: r}); err != nil {
		return err
	}
	_ = g.reloadCerts() // says itself what was rejected; the others are served
	if p.StaticCert() {
		if err := g.certs.LoadStatic(g.staticFiles()); err != nil {
			return fmt.Errorf("static certificate: %w", err)
		}
	}
	return nil
}

func (g *Gateway) staticFiles() certs.StaticFiles {
	p := &g.cfg.Core.Proxy
	return certs.StaticFiles{BaseDomain: p.BaseDomain, CertPath: p.CertChain, KeyPath: p.CertKey}
}

// reloadCerts builds the certificates in use from the stored ones; the error names
// every domain that was rejected.
func (g *Gateway) reloadCerts() error {
	records := map[string]certs.Record{}
	for domain, c := range g.store.Certs() {
		records[domain] = certs.Record{CertPEM: c.CertPEM, KeyPEM: c.KeyPEM, NotAfter: c.NotAfter, IssuedBy: c.IssuedBy, IssuedAt: c.IssuedAt}
	}
	rejected := g.certs.Reload(records)
	var errs []error
	for domain, err := range rejected {
		errs = append(errs, fmt.Errorf("certificate of %s: %w", domain, err))
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	for _, err := range errs {
		g.log.Error("a stored certificate is not used", "error", err)
	}
	return errors.Join(errs...)
}

// baseList is what the data plane routes as platform domains: those with a
// certificate, and those configured that have none yet.
func (g *Gateway) baseList() []*routing.Base {
	b := &g.bases
	b.mu.Lock()
	defer b.mu.Unlock()
	domains := map[string]bool{}
	for _, d := range g.certs.Domains() {
		domains[d] = false
	}
	for _, z := range g.store.ZTDomains() {
		domains[z.Domain] = true
	}
	if p := &g.cfg.Core.Proxy; p.StaticCert() {
		domains[p.BaseDomain] = true
	}
	var list []*routing.Base
	for d, configured := range domains {
		base := &routing.Base{Domain: d, Configured: configured}
		if cert := g.certs.Get(d); cert != nil {
			e := b.made[d]
			if e == nil || e.cert != cert {
				e = &baseEntry{cert: cert}
				e.plain, e.h2 = terminate.Configs(cert, b.lo, b.hi, nil)
				g.tickets.Attach(e.plain, e.h2)
				b.made[d] = e
			}
			base.TLS, base.TLSH2 = e.plain, e.h2
		}
		list = append(list, base)
	}
	return list
}

// A renewed certificate is served within 2.5 s of its files being left alone: one look to see the change, one to see
// that it is over.
const (
	staticLook = time.Second
	staticTell = 200 * time.Millisecond
)

// watchStatic follows the static files and tells the publisher when they changed.
func (g *Gateway) watchStatic(ctx context.Context) {
	f := g.staticFiles()
	g.bg.Go(func() { g.certs.WatchStatic(ctx, f, staticLook) })
	g.bg.Go(func() {
		last := g.certs.Get(f.BaseDomain)
		tick := time.NewTicker(staticTell)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if now := g.certs.Get(f.BaseDomain); now != last {
				last = now
				g.pub.basesChanged()
			}
		}
	})
}
