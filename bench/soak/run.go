package soak

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/arm"
	"github.com/dstack-gw/dstack-gw/bench/cpu"
	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// Options of a run. Zero counts leave a part out.
type Options struct {
	Conns    int           // connections of the mix
	TLS      int           // of which terminated
	Duration time.Duration // of the mix, from when all are open
	Settle   time.Duration // after which nothing may be left; 0 = 5 s
	Idle     int           // forwarded connections of the memory measurement
	IdleTLS  int           // terminated ones
	Stalled  int           // connections whose directions stall in the pressure part
	Seed     uint64

	Gateway string // program
	Exe     string // this program: `Exe soak-agent ...` must call Agent
	Host    *rig.Host
	Log     *slog.Logger
}

const (
	// ramp is how many connections a second are opened.
	ramp = 1000
	// primed is how many connections are opened before memory is measured, so that pools and code are in place.
	primed = 64
	// looking is how often the gateway is looked at.
	looking = 2 * time.Second
	// slack is what may be left beyond the level before: the harness's own connection, a timer.
	slack = 8
	// keptPipes is how many pipes each of the rig's two workers may keep for later.
	keptPipes = 64 * 2
	keptCoros = 256 * 2
	// keptMemory is how many KiB the gateway may keep in pools of buffers and stacks.
	keptMemory = 48 << 10
)

// extra configuration of the gateway: client and app starve at times on a machine shared with the gateway and others,
// which must not count as the gateway's refusals.
const extra = `
[core.proxy.timeouts]
connect = "60s"
handshake = "60s"
`

// gate runs the gateway in a new rig with the app, calls f, and checks that the gateway survived.
func (o *Options) gate(ctx context.Context, binary string, f func(ctx context.Context, s *stage) error) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.Duration+5*time.Minute, errors.New("took too long"))
	defer cancel()
	r, err := o.Host.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	cert, err := arm.NewCertificate(time.Now())
	if err != nil {
		return err
	}
	back, err := startAgent(r, rig.Backend, o.Exe, appCommand)
	if err != nil {
		return err
	}
	defer back.close()
	if err := back.until(ctx, "listening"); err != nil {
		return err
	}
	s := &stage{o: o, rig: r, app: back, cert: cert, began: time.Now()}
	var a arm.Arm = arm.L3{}
	if binary != "" {
		a = arm.Dstack{Label: "ours", Binary: binary, Admin: "pprof = true\n", Extra: extra}
	}
	if err := a.Check(); err != nil {
		return err
	}
	if s.run, err = a.Start(ctx, r, cert); err != nil {
		return err
	}
	if s.run.Control != nil {
		defer s.run.Control.Close()
	}
	err = f(ctx, s)
	if p := s.run.Process; p != nil {
		select {
		case <-p.Done():
			return errors.Join(err, p.Failed("did not survive"))
		default:
		}
		if err != nil {
			return errors.Join(err, p.Failed("state"))
		}
	}
	return err
}

// stage is what a part of the run plays on.
type stage struct {
	o     *Options
	rig   *rig.Rig
	app   *agent
	run   arm.Running
	cert  arm.Certificate
	began time.Time
}

// look has the gateway collect its garbage before.
func (s *stage) look(ctx context.Context) (Look, error) {
	defer s.run.Control.Close() // keeps no connection, which would count
	return look(ctx, s.run, s.began, true)
}

// client starts the client with a spec.
func (s *stage) client(spec Spec) (*agent, error) {
	spec.Addr = s.run.Entry(arm.Passthrough, arm.Requests)
	spec.Pass, spec.Term = arm.Host(arm.Passthrough, arm.Requests), arm.Host(arm.Terminate, arm.Requests)
	spec.Cert, spec.Seed, spec.Ramp = s.cert.DER, s.o.Seed, ramp
	c, err := startAgent(s.rig, rig.Client, s.o.Exe, clientCommand)
	if err != nil {
		return nil, err
	}
	if err := c.say(string(marshal(spec))); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// listenDrops returns how many connections the gateway's kernel dropped because accept(2) came too late.
func (s *stage) listenDrops() (n uint64, err error) {
	err = s.rig.In(rig.Gateway, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err == nil {
			n, err = netstat(string(b), "ListenDrops")
		}
		return err
	})
	return n, err
}

// netstat returns a counter of the group TcpExt: a line of names, then one of values.
func netstat(text, name string) (uint64, error) {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "TcpExt:" {
			continue
		}
		if i := slices.Index(names, name); i >= 0 && i < len(f) {
			return strconv.ParseUint(f[i], 10, 64)
		}
		names = f
	}
	return 0, fmt.Errorf("no counter TcpExt %s in /proc/net/netstat", name)
}

// release tells the app to be neither slow nor stalled any more.
func (s *stage) release(ctx context.Context) error {
	if err := s.app.say("release"); err != nil {
		return err
	}
	return s.app.until(ctx, "released")
}

// book asks the app for its book, once it has no connections left or the time is over.
func (s *stage) book(ctx context.Context, d time.Duration) (Side, error) {
	for end := time.Now().Add(d); ; time.Sleep(100 * time.Millisecond) {
		if err := s.app.say("report"); err != nil {
			return Side{}, err
		}
		l, err := s.app.next(ctx)
		if err != nil {
			return Side{}, err
		}
		if l.Side == nil {
			return Side{}, fmt.Errorf("asking the app for its book: got %+v", l)
		}
		if l.Side.Open == 0 || time.Now().After(end) {
			return *l.Side, nil
		}
	}
}

// Run plays all parts. Its error says that the harness could not do its work; what the gateway did wrong is in
// Report.Problems. It must be called from a goroutine locked to its thread, see rig.Start.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.Settle == 0 {
		o.Settle = 5 * time.Second
	}
	rep := &Report{Options: o, Load: []string{loadavg()}, CPUs: runtime.NumCPU()}
	rep.Kernel = firstLine("/proc/sys/kernel/osrelease")
	version, err := arm.Dstack{Label: "ours", Binary: o.Gateway}.Version(ctx)
	if err != nil {
		return nil, err
	}
	rep.Version = version
	for _, part := range []struct {
		name string
		on   bool
		f    func(context.Context, *Options, *Report) error
	}{
		{"idle memory", o.Idle > 0 || o.IdleTLS > 0, idleMemory},
		{"mix", o.Conns > 0, mix},
		{"pressure", o.Stalled > 0, pressure},
	} {
		if !part.on {
			continue
		}
		o.Log.Info("soak: begin", "part", part.name, "load", loadavg())
		if err := part.f(ctx, &o, rep); err != nil {
			return rep, fmt.Errorf("%s: %w", part.name, err)
		}
		rep.Load = append(rep.Load, loadavg())
	}
	return rep, nil
}

// mix is the main part.
func mix(ctx context.Context, o *Options, rep *Report) error {
	return o.gate(ctx, o.Gateway, func(ctx context.Context, s *stage) error {
		m := &Mix{}
		rep.Mix = m
		var err error
		if m.Before, err = s.look(ctx); err != nil {
			return err
		}
		c, err := s.client(Spec{What: "mix", Conns: o.Conns, TLS: o.TLS, Duration: o.Duration})
		if err != nil {
			return err
		}
		defer c.close()
		if err := c.until(ctx, "up"); err != nil {
			return err
		}
		o.Log.Info("soak: all connections are open", "connections", o.Conns)
		groups := cpu.Groups{Bench: os.Getpid(), Gateway: s.run.PID, Client: c.proc.PID(), Backend: s.app.proc.PID()}
		begin, err := cpu.Begin("/proc")
		if err != nil {
			return err
		}
		if err := c.say("go"); err != nil {
			return err
		}
		for until := time.Now().Add(o.Duration); ; {
			l, err := look(ctx, s.run, s.began, false)
			if err != nil {
				return err
			}
			m.During = append(m.During, l)
			if time.Until(until) < looking {
				time.Sleep(time.Until(until))
				break
			}
			time.Sleep(looking)
		}
		over, err := cpu.End("/proc")
		if err != nil {
			return err
		}
		m.Usage = cpu.Between(begin, over, groups)
		if err := s.release(ctx); err != nil {
			return err
		}
		l, err := c.next(ctx)
		if err != nil {
			return err
		}
		if l.Outcome == nil {
			return fmt.Errorf("the client answered %+v", l)
		}
		m.Client = *l.Outcome
		if l.Error != "" {
			return errors.New(l.Error)
		}
		// What the clients wrote last may still be on its way to apps.
		if m.App, err = s.book(ctx, patience); err != nil {
			return err
		}
		time.Sleep(o.Settle)
		if m.After, err = s.look(ctx); err != nil {
			return err
		}
		if m.ListenDrops, err = s.listenDrops(); err != nil {
			return err
		}
		m.Output = s.run.Process.Output()
		rep.Problems = append(rep.Problems, m.judge(o)...)
		return nil
	})
}

// judge says what is wrong.
func (m *Mix) judge(o *Options) []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, "mix: "+fmt.Sprintf(format, args...)) }
	bad = append(bad, sides(&m.Client.Side, &m.App, "mix")...)
	if m.Client.OpenMean < 0.9*float64(o.Conns) {
		say("only %.0f connections were open on average, %d wanted", m.Client.OpenMean, o.Conns)
	}
	bad = append(bad, left(m.Before, m.After, "mix")...)
	for _, name := range []string{"handler_panics_total", "accept_shed_total", "dial_failures_total"} {
		if n := m.After.Metric("dstack_gateway_"+name, ""); n != 0 {
			say("%s is %.0f", name, n)
		}
	}
	// The hasty ones that are gone before they said a name are refused for that, and in a handshake for it.
	hasty := float64(0)
	if t := m.Client.Kinds[Hasty.String()]; t != nil {
		hasty = float64(t.Begun)
	}
	allowed := map[string]float64{"no_sni": hasty, "tls": hasty}
	for series, n := range m.After.Metrics {
		labels, ok := strings.CutPrefix(series, "dstack_gateway_rejected_total{")
		if !ok {
			continue
		}
		_, reason, _ := strings.Cut(labels, `reason="`)
		reason, _, _ = strings.Cut(reason, `"`)
		if n > allowed[reason] {
			say("%.0f connections were rejected with reason %s, at most %.0f expected", n, reason, allowed[reason])
		}
	}
	return bad
}

// sides compares the books of both ends.
func sides(client, app *Side, part string) []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, part+": "+fmt.Sprintf(format, args...)) }
	for _, s := range []*Side{client, app} {
		if s.Failed > 0 {
			say("%d connections failed, %d with wrong bytes; the first: %s", s.Failed, s.Corrupt, strings.Join(s.Errors, " | "))
		}
	}
	if client.Open != 0 || app.Open != 0 {
		say("connections left open: %d at the client, %d at the app", client.Open, app.Open)
	}
	early := uint64(0)
	for _, name := range slices.Sorted(maps.Keys(client.Kinds)) {
		c, a := client.Kinds[name], app.Kinds[name]
		if a == nil {
			a = &Tally{}
		}
		if c.Orderly != a.Orderly || c.IDs != a.IDs {
			say("kind %s: %d connections ended in order at the client and %d at the app (ids %#x and %#x)", name, c.Orderly, a.Orderly, c.IDs, a.IDs)
		}
		if client.Failed+app.Failed == 0 && c.Orderly > 0 && (c.Sent != a.Received || a.Sent != c.Received) {
			say("kind %s: the client sent %d bytes and the app received %d; the app sent %d and the client received %d", name, c.Sent, a.Received, a.Sent, c.Received)
		}
		if c.Cut > 0 && (a.Received > c.Sent || c.Received > a.Sent) {
			say("kind %s: more received than sent: %d of %d at the app, %d of %d at the client", name, a.Received, c.Sent, c.Received, a.Sent)
		}
		early += c.Cut
	}
	if app.Nameless > early {
		say("%d connections reached the app without a word, only %d were cut", app.Nameless, early)
	}
	return bad
}

// left says what a gateway without connections still holds.
func left(before, after Look, part string) []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, part+": "+fmt.Sprintf(format, args...)) }
	if after.Sockets > before.Sockets+slack {
		say("sockets left: %d before, %d after", before.Sockets, after.Sockets)
	}
	if after.Pipes > before.Pipes+2*keptPipes {
		say("pipes left: %d descriptors before, %d after, %d may be kept", before.Pipes, after.Pipes, 2*keptPipes)
	}
	if after.Others > before.Others+slack {
		say("descriptors left: %d before, %d after", before.Others, after.Others)
	}
	if after.Goroutines-after.Kept > before.Goroutines-before.Kept+slack {
		say("goroutines left: %d before, %d after: %s", before.Goroutines-before.Kept, after.Goroutines-after.Kept, strings.Join(grown(before.stacks, after.stacks), "; "))
	}
	if after.Kept > keptCoros {
		say("%d goroutines kept for handshakes, at most %d expected", after.Kept, keptCoros)
	}
	if after.Live > before.Live+keptMemory {
		say("memory in use: %d KiB before, %d KiB after", before.Live, after.Live)
	}
	for _, name := range []string{"connections", "connections_active", "connections_half_open", "app_connections"} {
		if n := after.Metric("dstack_gateway_"+name, ""); n != 0 {
			say("%s is %.0f without connections", name, n)
		}
	}
	return bad
}

// idleMemory measures what idle connections cost, first without a gateway: what their two ends cost is not the
// gateway's.
func idleMemory(ctx context.Context, o *Options, rep *Report) error {
	rep.Idle = &Idle{}
	for _, x := range []struct {
		name, binary string
		n            int
		tls          bool
		to           **IdleCost
	}{
		{"ends", "", max(o.Idle, o.IdleTLS), false, &rep.Idle.Ends},
		{"forwarded", o.Gateway, o.Idle, false, &rep.Idle.Forwarded},
		{"terminated", o.Gateway, o.IdleTLS, true, &rep.Idle.Terminated},
	} {
		if x.n == 0 {
			continue
		}
		part := "idle " + x.name
		err := o.gate(ctx, x.binary, func(ctx context.Context, s *stage) error {
			spec := Spec{What: "idle", Conns: x.n}
			if x.tls {
				spec.TLS = x.n
			}
			c, err := s.client(spec)
			if err != nil {
				return err
			}
			defer c.close()
			groups := cpu.Groups{Bench: os.Getpid(), Gateway: s.run.PID}
			memory := func(step string) (m cpu.Memory, l Look, err error) {
				if err = c.until(ctx, step); err != nil {
					return
				}
				time.Sleep(2 * time.Second) // timers and deferred frees must have run
				if x.binary != "" {
					l, err = s.look(ctx)
				}
				if err == nil {
					m, err = cpu.ReadMemory("/proc", groups)
				}
				if err == nil {
					err = c.say("go")
				}
				return
			}
			var first Look
			if x.binary != "" {
				if first, err = s.look(ctx); err != nil {
					return err
				}
			}
			before, primedLook, err := memory("primed")
			if err != nil {
				return err
			}
			after, held, err := memory("open")
			if err != nil {
				return err
			}
			if err := c.until(ctx, "closed"); err != nil {
				return err
			}
			time.Sleep(o.Settle)
			if x.binary != "" {
				end, err := s.look(ctx)
				if err != nil {
					return err
				}
				rep.Problems = append(rep.Problems, left(first, end, part)...)
			}
			if err := c.say("go"); err != nil {
				return err
			}
			l, err := c.next(ctx)
			if err != nil {
				return err
			}
			if l.Outcome == nil || l.Error != "" {
				return fmt.Errorf("the client answered %+v", l)
			}
			book, err := s.book(ctx, o.Settle)
			if err != nil {
				return err
			}
			rep.Problems = append(rep.Problems, sides(&l.Outcome.Side, &book, part)...)
			each := func(a, b uint64) float64 { return (float64(b) - float64(a)) / float64(x.n) }
			*x.to = &IdleCost{Conns: x.n, PSS: each(before.RSS, after.RSS), Slab: each(before.Slab, after.Slab),
				Machine: each(before.Used-min(before.Used, before.Foreign), after.Used-min(after.Used, after.Foreign)),
				Foreign: each(before.Foreign, after.Foreign), Live: each(primedLook.Live, held.Live), Descriptors: held.Descriptors, Goroutines: held.Goroutines}
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
	}
	return nil
}

// pressure stalls both directions of many connections of a gateway with few descriptors: enough for the sockets of
// these and of as many small ones, not for a pipe a direction. The small ones must be served.
func pressure(ctx context.Context, o *Options, rep *Report) error {
	p := &Pressure{Stalled: o.Stalled, Small: o.Stalled, Limit: 4*o.Stalled + 150}
	rep.Pressure = p
	dir, err := o.Host.TempDir("pressure")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// A script that becomes the gateway: the limit must be there when it starts.
	script := filepath.Join(dir, "dstack-gw")
	text := fmt.Sprintf("#!/bin/sh\nulimit -n %d || exit 1\nexec '%s' \"$@\"\n", p.Limit, strings.ReplaceAll(o.Gateway, "'", `'\''`))
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		return err
	}
	return o.gate(ctx, script, func(ctx context.Context, s *stage) error {
		if p.Before, err = s.look(ctx); err != nil {
			return err
		}
		c, err := s.client(Spec{What: "pressure", Conns: p.Stalled, Extra: p.Small})
		if err != nil {
			return err
		}
		defer c.close()
		at := func(step string, to *Look) error {
			if err := c.until(ctx, step); err != nil {
				return err
			}
			if step == "stalled" {
				time.Sleep(2 * time.Second)
			}
			// The gateway may have no descriptor for the question: then the rest of the numbers must do.
			var err error
			if *to, err = s.look(ctx); err != nil {
				p.Blind = append(p.Blind, err.Error())
			}
			return c.say("go")
		}
		if err := at("stalled", &p.During); err != nil {
			return err
		}
		if err := at("tried", &p.Tried); err != nil {
			return err
		}
		if err := s.release(ctx); err != nil {
			return err
		}
		l, err := c.next(ctx)
		if err != nil {
			return err
		}
		if l.Outcome == nil || l.Error != "" {
			return fmt.Errorf("the client answered %+v", l)
		}
		p.Client = *l.Outcome
		if p.App, err = s.book(ctx, patience); err != nil {
			return err
		}
		time.Sleep(o.Settle)
		if p.After, err = s.look(ctx); err != nil {
			return err
		}
		p.Output = s.run.Process.Output()
		rep.Problems = append(rep.Problems, p.judge()...)
		return nil
	})
}

// judge says what is wrong.
func (p *Pressure) judge() []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, "pressure: "+fmt.Sprintf(format, args...)) }
	app, client := p.App, p.Client.Side
	if p.Client.Refused > 0 {
		say("%d of %d small connections were not served while %d stalled, with %d descriptors allowed and %d for pipes: %s",
			p.Client.Refused, p.Small, p.Stalled, p.Limit, p.During.Pipes, p.Client.SmallError)
	}
	if n := p.After.Metric("dstack_gateway_accept_shed_total", ""); n > 0 {
		say("accept_shed_total is %.0f", n)
	}
	if n := p.After.Metric("dstack_gateway_handler_panics_total", ""); n > 0 {
		say("handler_panics_total is %.0f", n)
	}
	for _, b := range p.Blind {
		say("%s", b)
	}
	// The small ones are not on the client's book.
	delete(app.Kinds, Quiet.String())
	bad = append(bad, sides(&client, &app, "pressure")...)
	bad = append(bad, left(p.Before, p.After, "pressure")...)
	return bad
}

func loadavg() string { return firstLine("/proc/loadavg") }

func firstLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}
