package explain

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

// readInput is the step "name". It reports false when there is nothing to route by.
func (t *trace) readInput() bool {
	in, err := parseInput(t.report.Input)
	if err != nil {
		s := newStep(stepName, finding.Fail, "%q is not the name of a server: %v", t.report.Input, err)
		s.Hints = []string{"give a host name such as <app id>.<base domain>, a URL, or an app or instance id"}
		t.refuse(s, dataplane.ReasonNoSNI)
		t.result()
		return false
	}
	t.in = in
	if in.bare {
		t.ok(stepName, "%s is taken for an id, as it has no dot", in.name)
		return true
	}
	t.report.Name = in.name
	s := newStep(stepName, finding.OK, "%s", in.name)
	switch {
	case in.unicode:
		s.Text += ", which is what browsers send for the name given"
	case in.folded:
		s.Text += ", folded to lower case"
	}
	// The router takes any label; the TLS implementations around it do not.
	for label := range strings.SplitSeq(in.name, ".") {
		if problem := labelProblem(label); problem != "" {
			s.Status = finding.Warn
			s.Text += fmt.Sprintf("; the label %q %s, so many TLS clients and servers refuse the name", label, problem)
			s.Hints = []string{"use a name whose labels are 1 to 63 letters, digits and inner hyphens"}
			break
		}
	}
	t.add(s)
	return true
}

func labelProblem(label string) string {
	switch {
	case label == "":
		return "is empty"
	case len(label) > 63:
		return fmt.Sprintf("has %d bytes", len(label))
	case label[0] == '-' || label[len(label)-1] == '-':
		return "begins or ends with a hyphen"
	}
	for i := range len(label) {
		if c := label[i]; !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
			return fmt.Sprintf("has a %q", c)
		}
	}
	return ""
}

// listener says whether the proxy serves the port that the client would use.
func (t *trace) listener() {
	if t.in.bare {
		t.skip(stepListener, "not looked at for an id")
		return
	}
	var ports []uint16
	for _, l := range t.d.Listeners {
		ports = append(ports, l.Port())
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	want := t.in.port
	if want == 0 && (t.in.scheme == "https" || t.in.scheme == "wss") {
		want = 443
	}
	s := newStep(stepListener, finding.OK, "the proxy listens on port %s", portRanges(ports))
	switch {
	case len(ports) == 0:
		s.Status, s.Text = finding.Warn, "the proxy has no listener, so nobody can connect"
		s.Hints = []string{"see the log for why core.proxy.listen_port was not bound, and run dstack-gw doctor"}
	case t.in.scheme == "http" || t.in.scheme == "ws":
		s.Status = finding.Warn
		s.Text = fmt.Sprintf("%s:// is plaintext, the gateway serves TLS only and closes what does not begin with a ClientHello", t.in.scheme)
		s.Hints = []string{"use https://"}
	case want != 0 && !slices.Contains(ports, want):
		s.Status = finding.Warn
		s.Text = fmt.Sprintf("nothing here listens on port %d, the proxy listens on port %s", want, portRanges(ports))
		s.Hints = []string{fmt.Sprintf("that is fine if a load balancer or NAT maps port %d to one of them; otherwise set core.proxy.listen_port", want)}
	}
	if t.d.InboundPROXY {
		from := "every source"
		if len(t.d.TrustedSources) > 0 {
			from = list(texts(t.d.TrustedSources), 4)
		}
		s.Details = map[string]string{"PROXY header": "required from " + from + "; a client that connects directly is closed (core.proxy.inbound_pp_enabled)"}
	}
	t.add(s)
}

func texts[T fmt.Stringer](all []T) []string {
	out := make([]string, len(all))
	for i, v := range all {
		out[i] = v.String()
	}
	return out
}

// portRanges writes ascending ports as "443, 8000-8010".
func portRanges(ports []uint16) string {
	var out []string
	for i := 0; i < len(ports); {
		j := i
		for j+1 < len(ports) && ports[j+1] == ports[j]+1 {
			j++
		}
		if i == j {
			out = append(out, fmt.Sprint(ports[i]))
		} else {
			out = append(out, fmt.Sprintf("%d-%d", ports[i], ports[j]))
		}
		i = j + 1
	}
	return list(out, 8)
}

// publicAddress is where DNS sends the clients of the name. It never refuses: the
// gateway routes whoever arrives.
func (t *trace) publicAddress() step {
	switch {
	case t.in.bare:
		return newStep(stepAddress, finding.Skip, "not looked at for an id")
	case t.d.LookupHost == nil:
		return newStep(stepAddress, finding.Skip, "this gateway does not look addresses up")
	}
	ctx, cancel := context.WithTimeout(t.ctx, 3*time.Second)
	defer cancel()
	addrs, err := t.d.LookupHost(ctx, t.in.name)
	if err != nil || len(addrs) == 0 {
		s := newStep(stepAddress, finding.Warn, "%s has no address in DNS, so clients cannot find the gateway", t.in.name)
		if err != nil {
			s.Text += ": " + err.Error()
		}
		s.Hints = []string{"publish an A or CNAME record that leads to the gateway or its load balancer"}
		return s
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	where := list(texts(addrs), 4)
	if len(t.d.PublicAddrs) == 0 {
		return newStep(stepAddress, finding.OK, "DNS says %s", where)
	}
	for _, a := range addrs {
		if slices.ContainsFunc(t.d.PublicAddrs, func(p netip.Addr) bool { return p.Unmap() == a }) {
			return newStep(stepAddress, finding.OK, "DNS says %s, which is this gateway", where)
		}
	}
	s := newStep(stepAddress, finding.Warn, "DNS says %s, this gateway is reached at %s", where, list(texts(t.d.PublicAddrs), 4))
	s.Hints = []string{"that is fine if the address is another gateway, a load balancer or NAT in front of this one; otherwise correct the A or CNAME record"}
	return s
}

// domain tells platform names from custom ones.
func (t *trace) domain() {
	if t.in.bare {
		t.skip(stepDomain, "an id is the same under every base domain")
		return
	}
	name := t.in.name
	_, rest, ok := hostname.Split(name)
	if !ok {
		s := newStep(stepDomain, finding.Fail, "%s cannot be split into a label and a base domain", name)
		t.refuse(s, dataplane.ReasonNoSNI)
		return
	}
	if base := t.snap.Base(rest); base != nil {
		t.base = base
		s := newStep(stepDomain, finding.OK, "platform name: %s is a base domain", rest)
		if !base.Configured {
			s.Status = finding.Warn
			s.Text += " only because a certificate for it is left, it is not configured any more and will stop working when that expires"
			s.Hints = []string{"add it again with the admin RPC AddZtDomain if it is still wanted"}
		}
		t.add(s)
		return
	}
	s := newStep(stepDomain, finding.OK, "custom domain: %s is no base domain of this gateway, so TXT records decide", rest)
	var known []string
	for _, b := range t.snap.Bases() {
		known = append(known, b.Domain)
	}
	switch {
	case t.snap.Base(name) != nil:
		s.Status = finding.Warn
		s.Text = name + " is itself a base domain; platform names have one label in front of it. It is routed like a custom domain, by TXT records"
		s.Hints = []string{"ask for <app id>." + name}
	case t.parentBase(rest) != "":
		parent := t.parentBase(rest)
		s.Status = finding.Warn
		s.Text = fmt.Sprintf("%s is below the base domain %s, but with more than one label in front of it; it is routed like a custom domain, by TXT records", name, parent)
		s.Hints = []string{"ask for <app id>." + parent + ": wildcard certificates and platform names have exactly one label there"}
	case len(known) == 0:
		s.Status = finding.Warn
		s.Text += "; it has no base domain at all"
		s.Hints = []string{"add one with the admin RPC AddZtDomain, or set core.proxy.base_domain, cert_chain and cert_key"}
	default:
		if near := nearest(rest, known); near != "" {
			s.Status = finding.Warn
			s.Hints = []string{fmt.Sprintf("is it a slip of the pen for %s?", near)}
		}
	}
	if len(known) > 0 {
		slices.Sort(known)
		s.Details = map[string]string{"base domains": list(known, 6)}
	}
	t.add(s)
}

// parentBase returns the base domain above rest.
func (t *trace) parentBase(rest string) string {
	for {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			return ""
		}
		if t.snap.Base(parent) != nil {
			return parent
		}
		rest = parent
	}
}

// label reads the label of a platform name, or a bare id, and finds reserved words.
func (t *trace) label() {
	switch {
	case t.in.bare:
		t.bareLabel()
	case t.base == nil && t.refused():
		t.notReached(stepLabel)
		t.notReached(stepReserved)
	case t.base == nil:
		t.skip(stepLabel, "custom domain: the TXT record names app and port")
		t.skip(stepReserved, "custom domain: no word is reserved in TXT records")
	default:
		label, _, _ := hostname.Split(t.in.name)
		target, err := hostname.ParseLabel(label)
		if err != nil {
			t.refuse(t.badLabel(label, err), dataplane.ReasonUnknownApp)
			t.notReached(stepReserved)
			return
		}
		t.id, t.port, t.mode = target.ID, target.Port, target.Mode
		t.ok(stepLabel, "%q means id %s, port %d, %s", label, t.id, t.port, modeText(t.mode))
		t.reserved(target)
	}
}

func modeText(m hostname.Mode) string {
	switch m {
	case hostname.Passthrough:
		return "TLS passed through to the app"
	case hostname.TerminateH2:
		return "TLS ends at the gateway, HTTP/2 only"
	}
	return "TLS ends at the gateway"
}

func (t *trace) bareLabel() {
	name := t.in.name
	known := func(id string) bool { return t.snap.Instance(id) != nil || t.snap.App(id) != nil }
	target, err := hostname.ParseLabel(name)
	lower := strings.ToLower(name)
	switch {
	case known(name) || err != nil && t.in.port != 0:
		t.id, t.port = name, t.in.port
	case err != nil && known(lower):
		t.id, t.port = lower, t.in.port
	case err != nil:
		t.refuse(t.badLabel(name, err), dataplane.ReasonUnknownApp)
		t.notReached(stepReserved)
		return
	default:
		t.id, t.mode = target.ID, target.Mode
		if strings.Contains(name, "-") {
			t.port = target.Port
		}
		if t.in.port != 0 {
			t.port = t.in.port
		}
		if !known(t.id) {
			t.id = strings.ToLower(t.id)
		}
	}
	if t.port == 0 {
		t.ok(stepLabel, "id %s, no port given", t.id)
	} else {
		t.ok(stepLabel, "id %s, port %d", t.id, t.port)
	}
	t.skip(stepReserved, "an id was given, not a host name")
}

// badLabel explains which rule of the grammar refuses the label.
func (t *trace) badLabel(label string, err error) step {
	s := newStep(stepLabel, finding.Fail, "the label %q is refused: %v", label, err)
	id, rest, _ := strings.Cut(label, "-")
	port, _, more := strings.Cut(rest, "-")
	switch {
	case errors.Is(err, hostname.ErrEmptyID):
		s.Text += "; nothing stands before the dash"
		s.Hints = []string{"write <app id>-<port>"}
	case errors.Is(err, hostname.ErrSuffix):
		s.Text += "; \"s\" (passthrough) and \"g\" (HTTP/2 at the gateway) exclude each other"
		s.Hints = []string{fmt.Sprintf("write %s or %s", id+"-"+strings.TrimRight(port, "sg")+"s", id+"-"+strings.TrimRight(port, "sg")+"g")}
	case errors.Is(err, hostname.ErrPort):
		digits := strings.TrimRight(port, "sg")
		switch {
		case strings.HasSuffix(port, "gs"):
			s.Text += fmt.Sprintf(": of %q only the last letter is a suffix; \"s\" and \"g\" exclude each other", port)
			s.Hints = []string{fmt.Sprintf("write %s-%ss for passthrough or %s-%sg for HTTP/2 at the gateway", id, digits, id, digits)}
		default:
			s.Text += fmt.Sprintf(": %q is not a number from 1 to 65535, optionally with \"s\" or \"g\" behind it", port)
			s.Hints = []string{"write <app id>-<port>, with s behind the port for passthrough or g for HTTP/2"}
		}
	case errors.Is(err, hostname.ErrFormat) && more:
		s.Text += "; there may be one dash only, between id and port"
		s.Hints = []string{"ids have no dash: use the 40 hex digits of the app or instance id, not its name"}
	}
	return s
}

// reserved looks for the words that stand for the gateway itself.
func (t *trace) reserved(target hostname.Target) {
	svc := target.Service()
	switch svc {
	case hostname.NoService:
		if hostname.Reserved(target.ID) != hostname.NoService {
			t.ok(stepReserved, "%q is reserved only where TLS ends at the gateway; as passthrough it is an ordinary id", target.ID)
			return
		}
		t.ok(stepReserved, "%s is an ordinary id", target.ID)
	case hostname.LocalhostService:
		if t.d.Localhost {
			s := newStep(stepReserved, finding.Warn, "\"localhost\" leads to 127.0.0.1 of this gateway, without a port policy")
			s.Hints = []string{"core.debug.insecure_localhost_backend is for tests: switch it off in production"}
			t.svc = svc
			t.add(s)
			return
		}
		t.ok(stepReserved, "\"localhost\" is an ordinary id, as core.debug.insecure_localhost_backend is off")
	default:
		if err := svc.CheckPort(target.Port); err != nil {
			s := newStep(stepReserved, finding.Fail, "%q is served by the gateway itself, and not on port %d: %v", target.ID, target.Port, err)
			s.Hints = []string{fmt.Sprintf("use %s.%s", target.ID, t.base.Domain)}
			t.refuse(s, dataplane.ReasonPortPolicy)
			return
		}
		t.svc = svc
		t.ok(stepReserved, "%q is served by the gateway itself", target.ID)
	}
}

// builtin reports that the gateway serves the name itself.
func (t *trace) builtin() bool {
	return t.svc == hostname.GatewayService || t.svc == hostname.HealthService
}

// nearest returns the one of known that differs from name by one or two letters.
func nearest(name string, known []string) string {
	best, found := 3, ""
	for _, k := range known {
		if len(k) < 6 {
			continue
		}
		if d := distance(name, k, best); d < best {
			best, found = d, k
		}
	}
	return found
}

// distance is the number of letters to insert, delete or replace, or most if it is
// not smaller.
func distance(a, b string, most int) int {
	if len(a)-len(b) >= most || len(b)-len(a) >= most {
		return most
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		least := row[0]
		for j := range len(b) {
			next := diag
			if a[i] != b[j] {
				next = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], next
			least = min(least, next)
		}
		if least >= most {
			return most
		}
	}
	return min(row[len(b)], most)
}
