package explain

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/proxyproto"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// dial is one connection to an app, made to see whether it is accepted.
type dial struct {
	inst *routing.Instance
	err  error
	took time.Duration
	// tls is how the app answered a ClientHello; nil if none was sent.
	tls *tlsAnswer
}

type tlsAnswer struct {
	state tls.ConnectionState
	err   error
	took  time.Duration
}

// maxSickDials is how many instances are dialled although no connection would go there.
const maxSickDials = 3

// probe connects to the instances that a connection would try. What a policy refuses
// is not touched: the owner of the app does not want to see connections there.
func (t *trace) probe() {
	if t.port == 0 || t.builtin() {
		return
	}
	try := t.cands
	if t.app != nil && len(try) == 0 {
		try = t.allowed[:min(len(t.allowed), maxSickDials)]
	}
	if len(try) == 0 || t.ctx.Err() != nil {
		return
	}
	t.dials = make([]dial, len(try))
	var wg sync.WaitGroup
	for i, inst := range try {
		d := &t.dials[i]
		d.inst = inst
		wg.Go(func() { t.dial(d, i == 0) })
	}
	wg.Wait()
}

func (t *trace) dial(d *dial, first bool) {
	ctx, cancel := context.WithTimeout(t.ctx, t.d.ProbeTimeout)
	defer cancel()
	began := t.d.Now()
	nc, err := t.d.Dial(ctx, "tcp", netip.AddrPortFrom(d.inst.Addr, t.port).String())
	d.took, d.err = t.d.Now().Sub(began), err
	if err != nil {
		return
	}
	defer nc.Close()
	// One instance is enough to see whether the app speaks TLS.
	if first && t.mode == hostname.Passthrough && !t.in.bare {
		d.tls = t.hello(nc, d.inst)
	}
}

// hello shakes hands with the app as a client of the name would.
func (t *trace) hello(nc net.Conn, inst *routing.Instance) *tlsAnswer {
	began := t.d.Now()
	ctx, cancel := context.WithTimeout(t.ctx, t.d.ProbeTimeout)
	defer cancel()
	if deadline, ok := ctx.Deadline(); ok {
		_ = nc.SetDeadline(deadline)
	}
	if _, pp := inst.Policy.Check(t.port); pp && !inst.Trusted {
		if _, err := nc.Write(proxyproto.FromAddrs(nc.LocalAddr(), nc.RemoteAddr()).Append(nil)); err != nil {
			return &tlsAnswer{err: err, took: t.d.Now().Sub(began)}
		}
	}
	c := tls.Client(nc, &tls.Config{
		ServerName: t.in.name,
		NextProtos: []string{"h2", "http/1.1"},
		MinVersion: tls.VersionTLS10,
		// The certificate is what the step reports on; nothing is sent over the connection.
		InsecureSkipVerify: true,
	})
	err := c.HandshakeContext(ctx)
	return &tlsAnswer{state: c.ConnectionState(), err: err, took: t.d.Now().Sub(began)}
}

// reached reports whether some instance accepted.
func (t *trace) reached() bool {
	for i := range t.dials {
		if t.dials[i].err == nil {
			return true
		}
	}
	return false
}

// silence is how long a live tunnel says nothing at most: twice the keepalive of
// 25 s, and some seconds for the table to be read.
const silence = 75 * time.Second

// tunnel shows the WireGuard peers of the instances that would be tried.
func (t *trace) tunnel() {
	st := t.d.WireGuard.Status()
	insts := t.cands
	if len(insts) == 0 {
		insts = t.shown[:min(len(t.shown), maxSickDials)]
	}
	switch {
	case t.builtin():
		t.skip(stepTunnel, "no app is involved")
		return
	case t.app == nil && len(t.cands) > 0:
		t.skip(stepTunnel, "127.0.0.1 needs none")
		return
	case len(insts) == 0:
		t.notReached(stepTunnel)
		return
	case st.Mode == wireguard.None:
		t.skip(stepTunnel, "this gateway has no WireGuard interface: %s", either(st.Reason, "core.wg.mode is none"))
		return
	}
	table := t.d.WireGuard.Handshakes()
	s := step{Name: stepTunnel}
	s.Table = &finding.Table{Columns: []string{"instance", "peer", "endpoint", "handshake", "last receive", "received", "sent"}}
	alive := 0
	var states []string
	for _, i := range insts {
		state, p := t.peer(table, i)
		if state == "alive" {
			alive++
		}
		states = append(states, state)
		endpoint := "-"
		if p.Endpoint.IsValid() {
			endpoint = p.Endpoint.String()
		}
		s.Table.Add(i.ID, state, endpoint, t.ago(p.LastHandshake), t.ago(p.LastRx), byteCount(p.RxBytes), byteCount(p.TxBytes))
	}
	s.Details = map[string]string{"interface": fmt.Sprintf("%s, %s: %s", st.Interface, st.Mode, either(st.Reason, "no reason given")),
		"read": t.ago(table.Taken)}
	has := func(state string) bool {
		for _, x := range states {
			if strings.HasPrefix(x, state) {
				return true
			}
		}
		return false
	}
	switch {
	case !st.Up:
		s.Hints = append(s.Hints, fmt.Sprintf("%s is missing or down (%s): ip link set %s up, or restart the gateway", st.Interface, either(st.LastError, st.Reason), st.Interface))
	case st.Mode == wireguard.Unmanaged:
		s.Hints = append(s.Hints, fmt.Sprintf("%s is no WireGuard interface (%s): remove it, so that the gateway can make its own, or set core.wg.interface", st.Interface, either(st.Reason, "adopted")))
	case has("missing"):
		hint := "the peer is not on the device yet: ask again in a few seconds"
		if st.LastError != "" {
			hint = fmt.Sprintf("the device refused its last change (%s): see dstack-gw doctor", st.LastError)
		}
		s.Hints = append(s.Hints, hint)
	case has("without"):
		s.Hints = append(s.Hints, "the guest never got through: check that core.wg.endpoint is reachable over UDP from the CVM's host, that no firewall or NAT drops it, "+
			"and that the guest registered with this gateway's current public key")
	case has("silent"):
		s.Hints = append(s.Hints, "a live guest is heard every 25 s: see whether the CVM still runs, and whether the path between lost a NAT mapping or route")
	}
	switch {
	case !st.Up:
		s.Text = st.Interface + " is not up"
	case alive == len(insts):
		s.Text = fmt.Sprintf("%s, all alive", count(len(insts), "tunnel"))
	case alive == 0:
		s.Text = fmt.Sprintf("nothing gets through to the app: the tunnel is %s", list(dedupe(states), 3))
	default:
		s.Text = fmt.Sprintf("%d of %s alive", alive, count(len(insts), "tunnel"))
	}
	switch {
	case st.Up && alive == len(insts):
		s.Status = finding.OK
	case (!st.Up || alive == 0) && len(t.dials) > 0 && !t.reached():
		// The data plane does not look at tunnels; the dial fails for want of one.
		t.refuse(s, dataplane.ReasonDial)
		return
	default:
		s.Status = finding.Warn
	}
	t.add(s)
}

func dedupe(all []string) []string {
	var out []string
	seen := map[string]bool{}
	for _, s := range all {
		if !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out
}

// peer says in a word or two how the tunnel of an instance is.
func (t *trace) peer(table *wireguard.Table, i *routing.Instance) (string, wireguard.PeerState) {
	rec, ok := t.d.Registry.Instance(i.ID)
	if !ok {
		return "not registered any more", wireguard.PeerState{}
	}
	key, err := wgtypes.ParseKey(rec.PublicKey)
	if err != nil {
		return "unusable key", wireguard.PeerState{}
	}
	p, ok := table.Peers[key]
	switch {
	case !ok && table.Taken.IsZero():
		return "unknown, the device was not read yet", p
	case !ok:
		return "missing on the device", p
	case p.LastHandshake.IsZero():
		return "without any handshake", p
	case t.now.Sub(later(p.LastRx, p.LastHandshake)) > silence+t.now.Sub(table.Taken):
		return "silent", p
	}
	return "alive", p
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

func (t *trace) ago(at time.Time) string {
	if at.IsZero() {
		return "never"
	}
	return shortDuration(max(0, t.now.Sub(at)).Round(time.Second)) + " ago"
}

// byteCount is a number of bytes for reading.
func byteCount(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, u := float64(n)/1024, 0
	for v >= 1024 && u < len(units)-1 {
		v /= 1024
		u++
	}
	return fmt.Sprintf("%.1f %ciB", v, units[u])
}

// connect shows the dials.
func (t *trace) connect() {
	switch {
	case t.builtin():
		t.skip(stepConnect, "no app is involved")
		return
	case t.port == 0 && !t.refused():
		t.skip(stepConnect, "no port was given")
		return
	case len(t.dials) == 0 && t.ctx.Err() != nil:
		t.skip(stepConnect, "no time was left of %s", t.d.Timeout)
		return
	case len(t.dials) == 0:
		t.notReached(stepConnect)
		return
	}
	s := step{Name: stepConnect}
	s.Table = &finding.Table{Columns: []string{"instance", "address", "result", "took"}}
	good := 0
	var hints []string
	var texts []string
	for i := range t.dials {
		d := &t.dials[i]
		result := "accepted"
		if d.err == nil {
			good++
		} else {
			var hint string
			result, hint = dialProblem(d.err, t.port)
			hints = append(hints, hint)
			texts = append(texts, result)
		}
		s.Table.Add(d.inst.ID, netip.AddrPortFrom(d.inst.Addr, t.port).String(), result, shortDuration(d.took))
	}
	s.Hints = dedupe(hints)
	switch {
	case good == len(t.dials):
		s.Status = finding.OK
		s.Text = fmt.Sprintf("port %d is accepted by %s", t.port, count(good, "instance"))
	case good > 0:
		s.Status = finding.Warn
		s.Text = fmt.Sprintf("port %d is accepted by %d of %s; the others cost time: %s", t.port, good, count(len(t.dials), "instance"), list(dedupe(texts), 3))
	default:
		s.Text = fmt.Sprintf("no instance of %d accepts a connection on port %d: %s", len(t.dials), t.port, list(dedupe(texts), 3))
		t.refuse(s, dataplane.ReasonDial)
		return
	}
	t.add(s)
}

// dialProblem names an error of connect(2) over WireGuard and what to do about it.
func dialProblem(err error, port uint16) (result, hint string) {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "refused", fmt.Sprintf("the CVM is reached but nothing listens on port %d there: publish the container's port in the compose file "+
			"(ports: \"%d:...\") and have it listen on 0.0.0.0 rather than 127.0.0.1", port, port)
	case errors.Is(err, unix.ENOKEY):
		return "no WireGuard peer", "no peer has the instance's address: see the step tunnel"
	case errors.Is(err, unix.EDESTADDRREQ):
		return "no WireGuard endpoint", "the gateway does not know where the guest is until it calls in: see the step tunnel"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return "no free local port", "the ephemeral ports towards this address are used up: widen net.ipv4.ip_local_port_range or add instances"
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return "no free descriptor", "raise the limit on open files of the gateway"
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "unreachable", "there is no route to the instance: check that core.wg.ip has the mask of the whole overlay and that the interface is up"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "forbidden", "a firewall rule of this machine refuses the connection"
	case errors.Is(err, unix.ECONNRESET):
		return "reset", "something in the CVM closes the connection at once: look at the app's log"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ETIMEDOUT),
		errors.As(err, &timeout) && timeout.Timeout():
		return "timeout", "no answer through the tunnel: the CVM is down, its tunnel is, or its firewall drops the packets (see the step tunnel)"
	}
	return err.Error(), "look at the log of the gateway"
}

// appTLS shows how the app answered a ClientHello.
func (t *trace) appTLS() {
	var a *tlsAnswer
	if len(t.dials) > 0 {
		a = t.dials[0].tls
	}
	switch {
	case t.builtin():
		t.skip(stepAppTLS, "no app is involved")
		return
	case t.in.bare:
		t.skip(stepAppTLS, "an id was given: there is no server name to ask for")
		return
	case t.port != 0 && t.mode != hostname.Passthrough:
		t.skip(stepAppTLS, "TLS ends at the gateway, the app gets plaintext")
		return
	case a == nil:
		t.notReached(stepAppTLS)
		return
	}
	who := t.dials[0].inst.ID
	s := newStep(stepAppTLS, finding.OK, "instance %s ", who)
	if a.err != nil {
		var problem, hint string
		problem, hint = helloProblem(a.err, t.port)
		s.Status = finding.Fail
		s.Text += problem
		s.Hints = []string{hint}
		if t.base != nil {
			s.Hints = append(s.Hints, fmt.Sprintf("or have TLS end at the gateway: %s-%d.%s, without the s", t.id, t.port, t.base.Domain))
		}
		t.add(s)
		t.broken = s.Text
		return
	}
	s.Text += fmt.Sprintf("speaks %s, answered in %s, ", tls.VersionName(a.state.Version), shortDuration(a.took))
	if len(a.state.PeerCertificates) == 0 {
		s.Text += "without a certificate"
		s.Status = finding.Warn
		t.add(s)
		return
	}
	j := judge(a.state.PeerCertificates, t.in.name, t.now, t.d.Roots)
	s.Status = j.finding.Status
	s.Text += "with a certificate " + j.finding.Text
	s.Details = j.finding.Details
	if alpn := a.state.NegotiatedProtocol; alpn != "" {
		s.Details["ALPN"] = alpn
	}
	if s.Status == finding.Fail {
		// Clients that trust the key by other means, such as attestation, go on.
		s.Status = finding.Warn
		s.Hints = []string{"the certificate is the app's own business: renew it or have it name " + t.in.name + " inside the CVM"}
	}
	t.add(s)
}

func helloProblem(err error, port uint16) (problem, hint string) {
	var timeout net.Error
	hint = fmt.Sprintf("passthrough needs a TLS server on port %d of the app", port)
	if rec, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		if strings.HasPrefix(string(rec.RecordHeader[:]), "HTTP") {
			return "answers plaintext HTTP instead of TLS", hint
		}
		return fmt.Sprintf("does not speak TLS: its answer begins with %q", rec.RecordHeader[:]), hint
	}
	if alert, ok := errors.AsType[tls.AlertError](err); ok {
		return "refuses the handshake: " + alert.Error(), "the app's TLS server does not want this name or these protocol versions: look at its configuration and log"
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "accepts the connection and does not answer a ClientHello", hint
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "closes the connection after the ClientHello", hint + "; if it expects a PROXY header, declare the port with pp in port_policy"
	}
	return "fails in the TLS handshake: " + err.Error(), hint
}
