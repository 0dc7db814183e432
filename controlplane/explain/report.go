package explain

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/dataplane"
)

// The names of the steps, in the order of a report.
const (
	stepName        = "name"
	stepListener    = "listener"
	stepAddress     = "public address"
	stepDomain      = "domain"
	stepLabel       = "label"
	stepReserved    = "reserved name"
	stepTXT         = "txt"
	stepTarget      = "app"
	stepInstances   = "instances"
	stepPolicy      = "port policy"
	stepLimit       = "app limit"
	stepCertificate = "certificate"
	stepTunnel      = "tunnel"
	stepConnect     = "connect"
	stepAppTLS      = "app tls"
)

// Outcome says what becomes of a connection.
type Outcome string

const (
	Served  Outcome = "served"  // it reaches the app, or the gateway's own endpoint
	Refused Outcome = "refused" // the gateway closes it
	Broken  Outcome = "broken"  // the gateway does its part and the client still fails
	Unknown Outcome = "unknown" // not enough was asked or answered in time
)

// Step is one decision on the way of a connection.
type Step struct {
	Name string `json:"name"`
	finding.Finding
}

// Report is the answer to one question.
type Report struct {
	Input string `json:"input"`
	// Name is the host name as connections are routed by it; empty for ids.
	Name   string    `json:"name,omitempty"`
	At     time.Time `json:"at"`
	TookMS int64     `json:"took_ms"`
	Steps  []Step    `json:"steps"`

	Outcome Outcome `json:"outcome"`
	// RefusedBy is the step whose rule decides, Reason what rejected_total{reason} and
	// the access log call it; both are empty unless the outcome is Refused.
	RefusedBy string `json:"refused_by,omitempty"`
	Reason    string `json:"reason,omitempty"`
	// Verdict is the outcome in one sentence, Client what somebody who connects sees.
	Verdict string `json:"verdict"`
	Client  string `json:"client,omitempty"`
}

// Status sums the report up: Fail unless the connection is served, Warn when a step warns.
func (r *Report) Status() finding.Status {
	switch r.Outcome {
	case Refused, Broken:
		return finding.Fail
	case Unknown:
		return finding.Warn
	}
	s := finding.OK
	for i := range r.Steps {
		if r.Steps[i].Status == finding.Warn {
			s = finding.Warn
		}
	}
	return s
}

// WriteText renders the report without colours.
func (r *Report) WriteText(w io.Writer) error { return r.Write(w, finding.Style{}) }

// Write renders the report as text.
func (r *Report) Write(w io.Writer, s finding.Style) error {
	names := make([]string, len(r.Steps))
	for i := range r.Steps {
		names[i] = r.Steps[i].Name
	}
	p := finding.NewPrinter(s, names)
	p.Line(fmt.Sprintf("%s at %s", r.Input, r.At.Format(time.RFC3339)))
	p.Line("")
	for i := range r.Steps {
		p.Finding(r.Steps[i].Name, r.Steps[i].Finding)
	}
	p.Line("")
	p.Status(r.Status(), r.Verdict)
	if r.Client != "" {
		p.Line("The client: " + r.Client)
	}
	_, err := p.WriteTo(w)
	return err
}

// ---- building ----

type step = Step

// failure is a step that refuses.
type failure struct {
	step   string
	reason dataplane.Reason
	text   string
}

func (t *trace) add(s step) { t.report.Steps = append(t.report.Steps, s) }

func (t *trace) ok(name, format string, args ...any) {
	t.add(newStep(name, finding.OK, format, args...))
}

func (t *trace) skip(name, format string, args ...any) {
	t.add(newStep(name, finding.Skip, format, args...))
}

func newStep(name string, s finding.Status, format string, args ...any) step {
	return step{Name: name, Finding: finding.Finding{Status: s, Text: fmt.Sprintf(format, args...)}}
}

// refuse adds s as a step that ends a connection. What follows is looked at all the
// same where it can be: an operator wants to know everything that is wrong.
func (t *trace) refuse(s step, reason dataplane.Reason) {
	s.Status = finding.Fail
	t.add(s)
	t.failed = append(t.failed, failure{s.Name, reason, s.Text})
}

// insertAfter puts s behind the step of that name.
func (t *trace) insertAfter(name string, s step) {
	for i := range t.report.Steps {
		if t.report.Steps[i].Name == name {
			t.report.Steps = append(t.report.Steps[:i+1], append([]step{s}, t.report.Steps[i+1:]...)...)
			return
		}
	}
}

func (t *trace) refused() bool { return len(t.failed) > 0 }

// notReached skips a step for which an earlier one did not leave enough.
func (t *trace) notReached(name string) {
	if t.refused() {
		t.skip(name, "not reached: %s refuses", t.failed[0].step)
		return
	}
	t.skip(name, "not reached")
}

func (t *trace) busy() {
	s := newStep(stepName, finding.Skip, "too many reports are being made; this one had no turn within %s", t.d.Timeout)
	s.Hints = []string{"ask again in a few seconds"}
	t.add(s)
	t.report.Outcome = Unknown
	t.report.Verdict = "Unknown: the gateway is busy with other reports."
}

// list joins a few of many.
func list(all []string, most int) string {
	if len(all) <= most {
		return strings.Join(all, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
}

// count is "1 instance" or "5 instances".
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
