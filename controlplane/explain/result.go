package explain

import (
	"fmt"
	"strings"

	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

// result sums the steps up.
func (t *trace) result() {
	r := &t.report
	switch {
	case t.refused():
		f := t.failed[0]
		r.Outcome, r.RefusedBy, r.Reason = Refused, f.step, f.reason.String()
		r.Verdict = fmt.Sprintf("Refused by %s: %s.", f.step, f.text)
		if more := t.failed[1:]; len(more) > 0 {
			var names []string
			for _, m := range more {
				if m.step != f.step {
					names = append(names, m.step)
				}
			}
			if len(names) > 0 {
				r.Verdict += " Also failing: " + strings.Join(names, ", ") + "."
			}
		}
		r.Client = t.clientSees(f)
	case t.broken != "":
		r.Outcome = Broken
		r.Verdict = "Broken: the gateway passes the connection on, but " + t.broken + "."
		r.Client = "connects and fails in the TLS handshake, which is between it and the app."
	case t.builtin():
		r.Outcome = Served
		r.Verdict = fmt.Sprintf("Served: by the gateway itself (%s).", t.id)
		r.Client = "gets the gateway's own HTTP endpoints over TLS."
		if t.svc == hostname.HealthService {
			r.Client = "gets 200 with an empty body for GET /."
		}
	case t.port == 0:
		r.Outcome = Unknown
		r.Verdict = fmt.Sprintf("Unknown: %s is there; give a port (%s:<port>) or a host name to see whether it can be reached.", t.id, t.id)
	case !t.reached():
		r.Outcome = Unknown
		r.Verdict = fmt.Sprintf("Unknown: no rule refuses, but there was no time left to try a connection (limit %s).", t.d.Timeout)
	default:
		r.Outcome = Served
		var to string
		for i := range t.dials {
			if d := &t.dials[i]; d.err == nil {
				to = fmt.Sprintf("instance %s (%s:%d)", d.inst.ID, d.inst.Addr, t.port)
				if n := len(t.dials); n > 1 {
					to += fmt.Sprintf(", the first of %d candidates that accepts", n)
				}
				break
			}
		}
		r.Verdict = "Served: " + modeText(t.mode) + ", connected to " + to + "."
		switch {
		case t.in.bare:
			r.Verdict = "Served: connected to " + to + "."
		case t.mode == hostname.Passthrough:
			r.Client = "speaks TLS with the app itself and sees the app's certificate."
		case t.mode == hostname.TerminateH2:
			r.Client = fmt.Sprintf("sees the gateway's certificate for *.%s and must offer HTTP/2; the app gets HTTP/2 in plaintext.", t.base.Domain)
		default:
			r.Client = fmt.Sprintf("sees the gateway's certificate for *.%s; the app gets plaintext.", t.base.Domain)
		}
	}
}

const closedEarly = "is connected and then cut off right after its ClientHello, without a TLS alert " +
	"(curl: unexpected eof or SSL_ERROR_SYSCALL; browsers: ERR_CONNECTION_CLOSED)."

// clientSees is what a refusal looks like from the other end.
func (t *trace) clientSees(f failure) string {
	switch {
	case t.in.name == "":
		return "cannot send such a server name; a connection without one is closed without a TLS alert."
	case t.in.bare:
		return ""
	case f.step == stepCertificate && t.base != nil && t.base.TLS != nil:
		return "refuses the certificate and closes the connection."
	case f.reason == dataplane.ReasonPortPolicy && t.d.PolicyHold > 0 && strings.Contains(f.text, "not known yet"):
		return fmt.Sprintf("waits up to %s; if the policy does not arrive, it is then cut off without a TLS alert.", shortDuration(t.d.PolicyHold))
	case f.reason == dataplane.ReasonDial && t.mode == hostname.Passthrough:
		return fmt.Sprintf("is connected, gets no answer to its ClientHello and is cut off after at most %s.", shortDuration(t.d.Connect))
	case f.reason == dataplane.ReasonDial:
		return fmt.Sprintf("completes the TLS handshake with the gateway and is then cut off without a response, after at most %s (curl: empty reply from server).", shortDuration(t.d.Connect))
	}
	return closedEarly
}
