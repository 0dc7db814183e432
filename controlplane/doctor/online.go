package doctor

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// Gateway is what the online checks ask of a running gateway. A nil function leaves
// its check out.
type Gateway struct {
	Version string
	Started time.Time
	Now     func() time.Time // default time.Now

	// Config and Host are what the process runs with; nil leaves the checks of the
	// machine out.
	Config *config.Config
	Host   *Host

	WireGuard func() wireguard.Status
	Store     func() store.Status
	// Snapshot and Selection are those of the data plane.
	Snapshot  func() *routing.Snapshot
	Mono      func() int64
	Selection routing.Selection
	// Connections counts the open client connections.
	Connections func() int64
	// CertificateNote says what is known about the issuance of a base domain's
	// certificate, "" for nothing; pending tells that one is on its way.
	CertificateNote func(domain string) (note string, pending bool)
	Listeners       func() []Listener
	PolicyFetches   func() PolicyFetches
	// AccessLogDropped and Panics count since the start.
	AccessLogDropped func() uint64
	Panics           func() uint64
	// Capabilities are things that may be on or off, each with its reason.
	Capabilities func() []Capability
}

// Listener is one of the gateway's servers.
type Listener struct {
	Name, Address string
	// Err says why it does not listen, "" if it does.
	Err string
}

// PolicyFetches is how the port policies of guests that report none are had.
type PolicyFetches struct {
	InFlight int
	Failed   uint64 // fetches given up since the start
	Last     string // why the last of them was, with the instance
}

// Capability is something that the gateway does when it can.
type Capability struct {
	Name string
	On   bool
	// Reason says why it is on or off, and what being off costs.
	Reason string
	// Wanted: it is configured, so being off is worth a warning.
	Wanted bool
}

// Online are the checks of a running gateway, made inside it.
func Online(g Gateway) []Check {
	if g.Now == nil {
		g.Now = time.Now
	}
	var list []Check
	if g.Config != nil && g.Host != nil {
		list = machine(g.Config, g.Host, true)
	}
	add := func(have bool, name string, f func() Result) {
		if have {
			list = append(list, Check{name, GroupGateway, func(context.Context) Result { return f() }})
		}
	}
	add(true, "process", g.checkProcess)
	add(g.Listeners != nil, "listeners", g.checkListeners)
	add(g.WireGuard != nil, "wireguard", g.checkWireGuard)
	add(g.Store != nil, "store", g.checkStore)
	add(g.Snapshot != nil, "certificates", g.checkCertificates)
	add(g.Snapshot != nil, "instances", g.checkInstances)
	add(g.PolicyFetches != nil, "port policies", g.checkPolicies)
	add(g.AccessLogDropped != nil, "access log", g.checkAccessLog)
	add(g.Panics != nil, "panics", g.checkPanics)
	add(g.Capabilities != nil, "features", g.checkCapabilities)
	return list
}

func (g *Gateway) checkProcess() Result {
	r := ok("version %s, up for %s", g.Version, span(g.Now().Sub(g.Started)))
	if g.Connections != nil {
		r.Text += fmt.Sprintf(", %s open", plural(int(g.Connections()), "connection"))
	}
	return r
}

func (g *Gateway) checkListeners() Result {
	all := g.Listeners()
	tab := &finding.Table{Columns: []string{"server", "address", "state"}}
	var down []string
	for _, l := range all {
		state := "listens"
		if l.Err != "" {
			state = l.Err
			down = append(down, l.Name)
		}
		tab.Add(l.Name, l.Address, state)
	}
	r := ok("%d of %d listen", len(all)-len(down), len(all))
	if len(down) > 0 {
		r = fail("see the log for why, correct it, and restart", "not listening: %s", strings.Join(down, ", "))
	}
	r.Table = tab
	return r
}

func (g *Gateway) checkWireGuard() Result {
	s := g.WireGuard()
	r := ok("%s is up, %s: %s", s.Interface, s.Mode, orNone(s.Reason))
	r.Details = map[string]string{"peers": fmt.Sprintf("%d wanted, %d on the device", s.Peers, s.Applied)}
	if !s.Refreshed.IsZero() {
		r.Details["handshakes read"] = span(g.Now().Sub(s.Refreshed)) + " ago"
	}
	bad := func(st finding.Status, hint, text string) { worsen(&r, st, hint, text) }
	switch {
	case s.Mode == wireguard.None:
		return skip("no interface: %s", orNone(s.Reason))
	case s.Mode == wireguard.Unmanaged:
		bad(finding.Fail, fmt.Sprintf("ip link delete %s and restart, or set core.wg.interface", s.Interface), fmt.Sprintf("%s holds no peers: %s", s.Interface, orNone(s.Reason)))
	case !s.Up:
		bad(finding.Fail, fmt.Sprintf("ip link set %s up; if it is gone, restart the gateway", s.Interface), fmt.Sprintf("%s is missing or down, so no app can be reached: %s", s.Interface, orNone(s.LastError)))
	}
	if s.LastError != "" {
		bad(finding.Warn, "it is repeated every second; if it stays, see dmesg and the log", fmt.Sprintf("%s refused its last change: %s", s.Interface, s.LastError))
	}
	if s.Mode == wireguard.Userspace {
		bad(finding.Warn, "modprobe wireguard and restart, which is several times faster", fmt.Sprintf("%s runs in user space: %s", s.Interface, orNone(s.Reason)))
	}
	if !s.Refreshed.IsZero() && g.Now().Sub(s.Refreshed) > time.Minute {
		bad(finding.Warn, "instances seem to age and will count as stale: see the log", fmt.Sprintf("the handshakes of %s were last read %s ago", s.Interface, span(g.Now().Sub(s.Refreshed))))
	}
	return r
}

// worsen adds a fault to a result, which had none or has others.
func worsen(r *Result, s finding.Status, hint, text string) {
	if r.Status == finding.OK {
		r.Text = text
	} else {
		r.Text += "; " + text
	}
	r.Status = finding.Worst(r.Status, s)
	r.Hints = append(r.Hints, hint)
}

func orNone(s string) string {
	if s == "" {
		return "no reason given"
	}
	return s
}

func (g *Gateway) checkStore() Result {
	s := g.Store()
	r := ok("%s, writable, %s", s.Mode, plural(s.Keys, "key"))
	r.Details = map[string]string{"since": s.Since.UTC().Format(time.RFC3339)}
	if s.DBBytes > 0 {
		r.Details["database"] = fmt.Sprintf("%s, %s in use", bytesText(uint64(s.DBBytes)), bytesText(uint64(s.DBUsedBytes)))
	}
	if !s.BackupAt.IsZero() {
		r.Details["backup"] = span(g.Now().Sub(s.BackupAt)) + " ago"
	}
	bad := func(st finding.Status, hint, text string) { worsen(&r, st, hint, text) }
	if !s.Writable {
		hint := "see the checks data directory and etcd endpoints; traffic and registrations go on meanwhile"
		if s.Connected && !s.HasLeader {
			hint = "etcd has no leader: bring a majority of its members back; traffic and registrations go on meanwhile"
		}
		bad(finding.Fail, hint, fmt.Sprintf("cannot be written since %s: %s", s.Since.UTC().Format(time.RFC3339), orNone(s.Reason)))
	}
	if len(s.Alarms) > 0 {
		bad(finding.Fail, "NOSPACE: raise core.store.quota_bytes or make room; CORRUPT: restore from backup.json", "etcd raises an alarm: "+strings.Join(s.Alarms, ", "))
	}
	if s.Volatile > 0 {
		bad(finding.Fail, "make the data directory writable before anything restarts the process", fmt.Sprintf("%s in memory only and lost with the process", plural(s.Volatile, "registration")))
	}
	if s.Pending > 0 {
		r.Details["waiting"] = fmt.Sprintf("%d for etcd, %s of journal", s.Pending, bytesText(uint64(max(0, s.JournalBytes))))
	}
	if s.Undecodable > 0 {
		bad(finding.Warn, "they were written by another release: upgrade this one", fmt.Sprintf("%s cannot be read by this release", plural(s.Undecodable, "key")))
	}
	if s.BackupError != "" {
		bad(finding.Warn, "see the check data directory", "backup.json cannot be written: "+s.BackupError)
	}
	if len(s.MovedAside) > 0 {
		bad(finding.Warn, "the store was restored from journal and backup; delete them when nobody needs them any more", "damaged databases are kept: "+list(s.MovedAside, 3))
	}
	if s.LastError != "" {
		r.Details["last trouble"] = fmt.Sprintf("%s ago: %s", span(g.Now().Sub(s.LastErrorAt)), s.LastError)
	}
	return r
}

// checkCertificates shows every base domain.
func (g *Gateway) checkCertificates() Result {
	bases := g.Snapshot().Bases()
	slices.SortFunc(bases, func(a, b *routing.Base) int { return cmp.Compare(a.Domain, b.Domain) })
	if len(bases) == 0 {
		return warn("add one with the admin RPC AddZtDomain, or set core.proxy.base_domain, cert_chain and cert_key", "there is no base domain, so only custom domains are served")
	}
	r := Result{Status: finding.OK, Table: &finding.Table{Columns: []string{"base domain", "certificate", "issuer", "note"}}}
	now := g.Now()
	var missing, ending []string
	pendingOnly := true
	for _, b := range bases {
		note, pending := "", false
		if g.CertificateNote != nil {
			note, pending = g.CertificateNote(b.Domain)
		}
		if !b.Configured {
			note = strings.TrimPrefix(note+"; not configured any more", "; ")
		}
		leaf := leafOf(b)
		if leaf == nil {
			missing = append(missing, b.Domain)
			pendingOnly = pendingOnly && pending
			r.Table.Add(b.Domain, "none", "-", note)
			continue
		}
		left := leaf.NotAfter.Sub(now)
		state := "valid for " + span(left) + " more"
		switch {
		case left <= 0:
			state = "expired " + span(-left) + " ago"
			missing = append(missing, b.Domain)
			pendingOnly = pendingOnly && pending
		case now.Before(leaf.NotBefore):
			state = "valid only from " + leaf.NotBefore.UTC().Format(time.RFC3339)
			missing = append(missing, b.Domain)
			pendingOnly = false
		case left < leaf.NotAfter.Sub(leaf.NotBefore)/6:
			ending = append(ending, b.Domain)
		}
		issuer := leaf.Issuer.CommonName
		if issuer == "" {
			issuer = leaf.Issuer.String()
		}
		r.Table.Add(b.Domain, state, issuer, note)
	}
	r.Text = fmt.Sprintf("%s, each with a valid certificate", plural(len(bases), "base domain"))
	if len(missing) > 0 {
		status := finding.Fail
		if pendingOnly {
			status = finding.Warn
		}
		worsen(&r, status, "see the note and the log for why it was not issued, check the DNS credential and CAA records, then RenewZtDomainCert",
			fmt.Sprintf("%d of %s without a usable certificate: %s; names that end TLS at the gateway fail there", len(missing), plural(len(bases), "base domain"), list(missing, 4)))
	}
	if len(ending) > 0 {
		worsen(&r, finding.Warn, "see the log for why renewal fails, check the DNS credential and rate limits of the CA, then RenewZtDomainCert",
			list(ending, 4)+" should have been renewed by now")
	}
	return r
}

func leafOf(b *routing.Base) *x509.Certificate {
	if b.TLS == nil || len(b.TLS.Certificates) == 0 || len(b.TLS.Certificates[0].Certificate) == 0 {
		return nil
	}
	c, err := x509.ParseCertificate(b.TLS.Certificates[0].Certificate[0])
	if err != nil {
		return nil
	}
	return c
}

// checkInstances counts who is alive.
func (g *Gateway) checkInstances() Result {
	snap := g.Snapshot()
	now := g.Now().Unix()
	total, online, unknown, failing := 0, 0, 0, 0
	type sick struct {
		i    *routing.Instance
		last int64
	}
	var stale []sick
	snap.Instances(func(i *routing.Instance) bool {
		total++
		last := i.State.Handshake.Load()
		if last > 0 && now-last < int64(g.Selection.Stale/time.Second) {
			online++
		} else {
			stale = append(stale, sick{i, last})
		}
		if !i.Policy.Known {
			unknown++
		}
		if f := i.State.FailedAt.Load(); g.Mono != nil && f != 0 && g.Mono()-f < int64(g.Selection.Penalty) {
			failing++
		}
		return true
	})
	if total == 0 {
		return ok("none is registered")
	}
	r := ok("%d of %s had a WireGuard handshake in the last %s", online, plural(total, "instance"), span(g.Selection.Stale))
	r.Details = map[string]string{}
	if unknown > 0 {
		r.Details["port policy unknown"] = fmt.Sprint(unknown)
	}
	if failing > 0 {
		r.Details["dial failed lately"] = fmt.Sprint(failing)
	}
	if len(stale) == 0 {
		return r
	}
	const most = 10
	slices.SortFunc(stale, func(a, b sick) int { return cmp.Or(cmp.Compare(b.last, a.last), cmp.Compare(a.i.ID, b.i.ID)) })
	r.Table = &finding.Table{Columns: []string{"stale instance", "app", "address", "last handshake"}}
	for _, s := range stale[:min(len(stale), most)] {
		last := "never"
		if s.last > 0 {
			last = span(time.Duration(now-s.last)*time.Second) + " ago"
		}
		r.Table.Add(s.i.ID, s.i.AppID, s.i.Addr.String(), last)
	}
	if len(stale) > most {
		r.Details["stale and not shown"] = fmt.Sprint(len(stale) - most)
	}
	hint := "see whether their CVMs run; dstack-gw explain <instance id> shows the tunnel of one"
	switch {
	case online == 0:
		r.Status = finding.Fail
		r.Text = fmt.Sprintf("none of %s had a WireGuard handshake in the last %s: no app can be reached by its id", plural(total, "instance"), span(g.Selection.Stale))
		r.Hints = []string{"see whether UDP reaches core.wg.endpoint from outside, and the check wireguard", hint}
	case len(stale)*5 > total:
		r.Status = finding.Warn
		r.Hints = []string{hint}
	}
	return r
}

func (g *Gateway) checkPolicies() Result {
	p := g.PolicyFetches()
	r := ok("no fetch failed, %d under way", p.InFlight)
	if p.Failed > 0 {
		r = warn("see whether the guest's agent answers at core.proxy.agent_port over the tunnel; the next connection asks again, and SetInstancePortPolicy overrides",
			"fetches from guest agents were given up %d times since the start; the ports of those instances stay closed", p.Failed)
		if p.Last != "" {
			r.Details = map[string]string{"last": p.Last}
		}
	}
	return r
}

func (g *Gateway) checkAccessLog() Result {
	if n := g.AccessLogDropped(); n > 0 {
		return warn("raise core.log.sample, or make the log's reader (journald, container runtime) faster", "%d lines were left out since the start, because the log could not keep up", n)
	}
	return ok("no line was left out")
}

func (g *Gateway) checkPanics() Result {
	if n := g.Panics(); n > 0 {
		return warn("this is a bug: report it with the stack in the log (search for \"panicked\")", "%d since the start; each closed one connection", n)
	}
	return ok("none")
}

func (g *Gateway) checkCapabilities() Result {
	all := g.Capabilities()
	r := Result{Status: finding.OK, Table: &finding.Table{Columns: []string{"feature", "state", "because"}}}
	on := 0
	var off []string
	for _, c := range all {
		state := "off"
		if c.On {
			state = "on"
			on++
		} else if c.Wanted {
			off = append(off, c.Name)
		}
		r.Table.Add(c.Name, state, orNone(c.Reason))
	}
	r.Text = fmt.Sprintf("%d of %d are on", on, len(all))
	if len(off) > 0 {
		r.Status = finding.Warn
		r.Text = "configured but off: " + strings.Join(off, ", ")
		r.Hints = []string{"the reasons below say what is missing; without them the gateway works, slower"}
	}
	return r
}
