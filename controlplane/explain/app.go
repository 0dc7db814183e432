package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// maxRows is how many instances a table shows.
const maxRows = 24

// idSize is the length of the ids that KMS-registered guests have, in hex digits.
const idSize = 40

// target finds the instance or app that the id stands for, instances first.
func (t *trace) target() {
	switch {
	case t.builtin():
		t.skip(stepTarget, "no app: the gateway serves the name itself")
		return
	case t.id == "":
		t.notReached(stepTarget)
		return
	case t.id == hostname.LocalhostID && t.d.Localhost:
		t.cands = []*routing.Instance{{ID: hostname.LocalhostID, Addr: netip.AddrFrom4([4]byte{127, 0, 0, 1}), Trusted: true, State: new(routing.State)}}
		t.shown = t.cands
		t.ok(stepTarget, "no app: the debugging backend on 127.0.0.1")
		return
	}
	if inst := t.snap.Instance(t.id); inst != nil {
		t.inst, t.app = inst, t.snap.App(inst.AppID)
		t.ok(stepTarget, "%s is an instance of app %s", t.id, inst.AppID)
		return
	}
	if app := t.snap.App(t.id); app != nil {
		t.app = app
		t.ok(stepTarget, "app %s has %s", t.id, count(len(app.Instances), "instance"))
		return
	}
	s := newStep(stepTarget, finding.Fail, "no app and no instance has the id %s (%s registered here)", t.id, count(t.snap.Len(), "instance"))
	s.Hints = t.idHints()
	t.refuse(s, dataplane.ReasonUnknownApp)
}

// idHints guesses what was meant by an id that nobody has.
func (t *trace) idHints() []string {
	var hints []string
	known := func(id string) bool { return t.snap.Instance(id) != nil || t.snap.App(id) != nil }
	id := t.id
	if low := strings.ToLower(id); low != id && known(low) {
		hints = append(hints, fmt.Sprintf("ids are compared exactly: write it in lower case, %s", low))
	}
	if trimmed := strings.TrimRight(id, "sg"); t.base != nil && trimmed != id && known(trimmed) {
		hints = append(hints, fmt.Sprintf("suffix letters count only behind a dash: %s-%s", trimmed, id[len(trimmed):]))
	}
	if t.base == nil && !t.in.bare && hostname.Reserved(id) != hostname.NoService {
		hints = append(hints, fmt.Sprintf("%q is reserved in platform names only, TXT records cannot lead there", id))
	}
	if near := t.similar(id); len(near) > 0 {
		hints = append(hints, "similar ids: "+strings.Join(near, ", "))
	}
	if len(hints) == 0 {
		if len(id) != idSize || strings.Trim(id, "0123456789abcdef") != "" {
			hints = append(hints, fmt.Sprintf("ids are %d lower-case hex digits, this one is not: use the app or instance id instead of a name", idSize))
		}
		hints = append(hints, "if the CVM runs, see whether it registers: its boot log, registrations_total{result} and the log of this gateway tell why it was refused")
	}
	return hints
}

// similar returns a few known ids that begin like id or differ by a letter or two.
func (t *trace) similar(id string) []string {
	const most = 3
	var near []string
	look := func(k string) bool {
		n := min(len(id), len(k), 8)
		if n >= 6 && k[:n] == id[:n] || len(id) >= 6 && distance(id, k, 3) < 3 {
			near = append(near, k)
		}
		return true
	}
	t.snap.Apps(func(a *routing.App) bool { return look(a.ID) })
	if len(near) == 0 {
		t.snap.Instances(func(i *routing.Instance) bool { return look(i.ID) })
	}
	slices.Sort(near)
	return near[:min(len(near), most)]
}

// instances shows who is healthy and in which order they would be tried.
func (t *trace) instances() {
	if t.builtin() || len(t.cands) > 0 {
		t.skip(stepInstances, "no app is involved")
		return
	}
	if t.app == nil {
		t.notReached(stepInstances)
		return
	}
	stale := t.d.Selection.Stale
	var chosen routing.Candidates
	if t.inst != nil {
		chosen.Add(t.inst)
		t.shown = []*routing.Instance{t.inst}
	} else {
		t.app.Choose(&chosen, t.d.Selection, t.now.Unix(), t.d.Mono())
	}
	for i := range chosen.Len() {
		t.cands = append(t.cands, chosen.At(i))
	}
	healthy := 0
	for _, i := range t.app.Instances {
		if t.healthy(i) {
			healthy++
		}
	}
	if t.inst == nil {
		t.shown = t.show(t.app.Instances)
	}
	tab := &finding.Table{Columns: []string{"rank", "instance", "address", "handshake", "health", "connections", "last dial"}}
	for _, i := range t.shown {
		rank := "-"
		if n := slices.Index(t.cands, i); n >= 0 {
			rank = fmt.Sprint(n + 1)
		}
		health := "stale"
		if t.healthy(i) {
			health = "healthy"
		}
		dialled := "ok"
		if f := i.State.FailedAt.Load(); f != 0 {
			ago := time.Duration(max(0, t.d.Mono()-f))
			dialled = "failed " + shortDuration(ago) + " ago"
			if ago < t.d.Selection.Penalty {
				dialled += ", tried last"
			}
		}
		tab.Add(rank, i.ID, i.Addr.String(), t.age(i), health, fmt.Sprint(i.State.Active.Load()), dialled)
	}
	s := step{Name: stepInstances}
	s.Table = tab
	total := len(t.app.Instances)
	s.Details = map[string]string{"healthy is": fmt.Sprintf("a WireGuard handshake younger than %s (core.proxy.timeouts.handshake_stale)", shortDuration(stale))}
	if hidden := total - len(t.shown); t.inst == nil && hidden > 0 {
		s.Details["not shown"] = count(hidden, "instance")
	}
	switch {
	case t.inst != nil && t.healthy(t.inst):
		s.Status, s.Text = finding.OK, "the instance is named, so it alone is tried; it is healthy"
	case t.inst != nil:
		s.Status, s.Text = finding.Warn, "the instance is named, so it alone is tried, although it had no handshake lately"
		s.Hints = []string{"see whether the CVM runs and reaches this gateway over UDP (step tunnel)"}
	case healthy == 0:
		s.Text = fmt.Sprintf("no instance of %d has a WireGuard handshake younger than %s", total, shortDuration(stale))
		s.Hints = append(t.tableHints(), "see whether the CVMs run and reach this gateway over UDP (step tunnel); name an instance id to connect without the health check")
		t.refuse(s, dataplane.ReasonNoInstance)
		return
	case healthy < total:
		s.Status = finding.Warn
		s.Text = fmt.Sprintf("%d of %s healthy, %d tried for a connection", healthy, count(total, "instance"), len(t.cands))
		s.Hints = []string{"the stale ones get no connections: see whether their CVMs still run; they are removed after core.recycle.timeout"}
	default:
		s.Status = finding.OK
		s.Text = fmt.Sprintf("%s healthy, %d tried for a connection", count(total, "instance"), len(t.cands))
	}
	t.add(s)
}

// show picks the instances for tables: those tried, then those that were heard of last.
func (t *trace) show(all []*routing.Instance) []*routing.Instance {
	out := slices.Clone(t.cands)
	rest := slices.DeleteFunc(slices.Clone(all), func(i *routing.Instance) bool { return slices.Contains(t.cands, i) })
	slices.SortStableFunc(rest, func(a, b *routing.Instance) int {
		return int(max(-1, min(1, b.State.Handshake.Load()-a.State.Handshake.Load())))
	})
	for _, i := range rest {
		if len(out) >= maxRows {
			break
		}
		out = append(out, i)
	}
	return out
}

func (t *trace) healthy(i *routing.Instance) bool {
	h := i.State.Handshake.Load()
	return h > 0 && t.now.Unix()-h < int64(t.d.Selection.Stale/time.Second)
}

func (t *trace) age(i *routing.Instance) string {
	h := i.State.Handshake.Load()
	if h == 0 {
		return "never"
	}
	return shortDuration(time.Duration(max(0, t.now.Unix()-h))*time.Second) + " ago"
}

// tableHints tells when the handshakes themselves are not known.
func (t *trace) tableHints() []string {
	st, tab := t.d.WireGuard.Status(), t.d.WireGuard.Handshakes()
	switch {
	case tab.Taken.IsZero():
		return []string{fmt.Sprintf("the handshakes of %s could not be read yet (%s): see dstack-gw doctor", st.Interface, either(st.LastError, st.Reason))}
	case t.now.Sub(tab.Taken) > 2*time.Minute:
		return []string{fmt.Sprintf("the handshakes of %s were last read %s ago (%s): see dstack-gw doctor", st.Interface, shortDuration(t.now.Sub(tab.Taken)), either(st.LastError, st.Reason))}
	}
	return nil
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	if b != "" {
		return b
	}
	return "no reason known"
}

// policy filters the candidates by port, as the data plane does.
func (t *trace) policy() {
	switch {
	case t.builtin():
		t.skip(stepPolicy, "no app is involved")
		return
	case t.svc == hostname.LocalhostService || len(t.cands) == 1 && t.cands[0].Trusted:
		t.skip(stepPolicy, "the debugging backend has none")
		return
	case t.app == nil:
		t.notReached(stepPolicy)
		return
	}
	s := step{Name: stepPolicy}
	s.Table = &finding.Table{Columns: []string{"instance", "source", "policy", "verdict", "PROXY header"}}
	for _, i := range t.shown {
		s.Table.Add(i.ID, t.policySource(i), policyText(&i.Policy), t.verdictText(i), t.proxyText(i))
	}
	if t.port == 0 {
		s.Status = finding.OK
		s.Text = "no port was given, so this is only what the policies say"
		s.Hints = []string{fmt.Sprintf("ask for %s-<port>, %s-<port>s or a host name to have a port judged", t.id, t.id)}
		t.add(s)
		return
	}
	var allowed, denied, unknown []*routing.Instance
	// Without a healthy instance nobody is filtered; what the policies say is still
	// worth knowing.
	judged := t.cands
	if len(judged) == 0 {
		judged = t.shown
	}
	for _, i := range judged {
		switch v, _ := i.Policy.Check(t.port); v {
		case routing.Allow:
			allowed = append(allowed, i)
		case routing.Unknown:
			unknown = append(unknown, i)
		default:
			denied = append(denied, i)
		}
	}
	for _, i := range unknown {
		if t.d.PolicyFetch != nil {
			if said := t.d.PolicyFetch(i.ID); said != "" {
				if s.Details == nil {
					s.Details = map[string]string{}
				}
				s.Details["fetch "+i.ID] = said
			}
		}
	}
	noHealthy := len(t.cands) == 0
	if !noHealthy {
		t.cands = allowed
	}
	t.allowed = allowed
	switch {
	case len(allowed) == len(judged):
		s.Status = finding.OK
		s.Text = fmt.Sprintf("port %d is allowed", t.port)
	case len(allowed) > 0:
		s.Status = finding.Warn
		s.Text = fmt.Sprintf("port %d is allowed by %d of %s that would be tried", t.port, len(allowed), count(len(judged), "instance"))
		s.Hints = []string{"the instances of the app run different compose files, or only some reported a policy"}
	case len(unknown) > 0:
		s.Text = fmt.Sprintf("the port policy of %s is not known yet, and what is not known is refused", count(len(unknown), "instance"))
		if t.d.PolicyHold > 0 {
			s.Text += fmt.Sprintf("; a connection triggers a fetch from the guest agent and waits up to %s for it", shortDuration(t.d.PolicyHold))
		}
		s.Hints = []string{"connect once and ask again; if it stays unknown, see whether the guest's agent answers over the tunnel (core.proxy.agent_port), " +
			"or set an override with the admin RPC SetInstancePortPolicy"}
		s.Status = finding.Fail
	default:
		s.Status = finding.Fail
		s.Text = fmt.Sprintf("port %d denied by app port policy for %s (%s)", t.port, t.app.ID, count(len(judged), "candidate"))
		s.Hints = []string{"add the port to port_policy in the app's compose file and deploy it, use one of the listed ports, or set an override with the admin RPC SetInstancePortPolicy"}
		if len(denied) == 1 && denied[0].Policy.Restrict && len(denied[0].Policy.Ports) == 0 {
			s.Hints[0] = "the policy lists no port at all: " + s.Hints[0]
		}
	}
	if s.Status == finding.Fail {
		t.refuse(s, dataplane.ReasonPortPolicy)
		return
	}
	t.add(s)
}

func (t *trace) policySource(i *routing.Instance) string {
	rec, ok := t.d.Registry.Instance(i.ID)
	if !ok {
		return "not registered any more"
	}
	switch _, src := rec.Effective(); src {
	case registry.SourceAdmin:
		return "operator's override"
	case registry.SourceInstance:
		if rec.PolicyHash != "" {
			return "compose file " + rec.PolicyHash[:min(8, len(rec.PolicyHash))]
		}
		return "instance"
	}
	return "none"
}

func policyText(p *routing.Policy) string {
	switch {
	case !p.Known:
		return "unknown"
	case !p.Restrict:
		return "every port"
	case len(p.Ports) == 0:
		return "no port"
	}
	ports := make([]uint16, 0, len(p.Ports))
	for n := range p.Ports {
		ports = append(ports, n)
	}
	slices.Sort(ports)
	return "only " + portRanges(ports)
}

func (t *trace) verdictText(i *routing.Instance) string {
	if t.port == 0 {
		return "-"
	}
	switch v, _ := i.Policy.Check(t.port); v {
	case routing.Allow:
		return "allow"
	case routing.Unknown:
		return "unknown"
	}
	return "deny"
}

func (t *trace) proxyText(i *routing.Instance) string {
	if t.port == 0 {
		return "-"
	}
	if _, pp := i.Policy.Check(t.port); pp {
		return "sent"
	}
	return "no"
}

// limit compares the open connections of the app with core.proxy.max_connections_per_app.
func (t *trace) limit() {
	if t.app == nil {
		if t.builtin() || len(t.cands) > 0 {
			t.skip(stepLimit, "no app is involved")
		} else {
			t.notReached(stepLimit)
		}
		return
	}
	n := t.app.State.Active.Load()
	most := t.d.MaxPerApp
	if most <= 0 {
		t.ok(stepLimit, "%s open, no limit", count(int(n), "connection"))
		return
	}
	s := newStep(stepLimit, finding.OK, "%d of %d connections open", n, most)
	hint := "raise core.proxy.max_connections_per_app, or find out who holds them (dstack-gw flows); the limit is for one gateway"
	switch {
	case n >= most:
		s.Text += ": the app has reached its limit, more are closed"
		s.Hints = []string{hint}
		t.refuse(s, dataplane.ReasonAppLimit)
		return
	case n*10 >= most*9:
		s.Status = finding.Warn
		s.Text += ": the app is close to its limit"
		s.Hints = []string{hint}
	}
	t.add(s)
}
