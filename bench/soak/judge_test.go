package soak

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

func books() (client, app Side) {
	mk := func(sent, received uint64) Side {
		return Side{Kinds: map[string]*Tally{
			"bulk":          {Begun: 3, Orderly: 3, Sent: sent, Received: received, IDs: 7},
			"client resets": {Begun: 2, Cut: 2, Sent: 100, Received: 50},
		}}
	}
	return mk(10, 20), mk(20, 10)
}

func TestSides(t *testing.T) {
	client, app := books()
	if bad := sides(&client, &app, "x"); len(bad) != 0 {
		t.Errorf("equal books: %q", bad)
	}
	for want, f := range map[string]func(c, a *Side){
		"with wrong bytes":    func(c, a *Side) { a.Failed, a.Corrupt, a.Errors = 1, 1, []string{"boom"} },
		"left open":           func(c, a *Side) { a.Open = 1 },
		"ended in order":      func(c, a *Side) { a.Kinds["bulk"].IDs = 6 },
		"the app received":    func(c, a *Side) { a.Kinds["bulk"].Received-- },
		"more received than":  func(c, a *Side) { a.Kinds["client resets"].Received = 101 },
		"without a word":      func(c, a *Side) { a.Nameless = 3 },
		"and 0 at the app":    func(c, a *Side) { delete(a.Kinds, "bulk") },
		"client received 19":  func(c, a *Side) { c.Kinds["bulk"].Received-- },
		"51 at the client":    func(c, a *Side) { a.Kinds["client resets"].Sent, c.Kinds["client resets"].Received = 50, 51 },
		"1 connections faile": func(c, a *Side) { c.Failed = 1 },
	} {
		client, app := books()
		f(&client, &app)
		bad := strings.Join(sides(&client, &app, "x"), "\n")
		if want == "51 at the client" {
			want = "51 of 50 at the client"
		}
		if !strings.Contains(bad, want) {
			t.Errorf("%s not noticed: %q", want, bad)
		}
	}
}

func TestLeft(t *testing.T) {
	base := func() Look {
		return Look{Sockets: 10, Pipes: 2, Others: 9, Goroutines: 40, Kept: 3, Metrics: map[string]float64{}}
	}
	if bad := left(base(), base(), "x"); len(bad) != 0 {
		t.Errorf("same level: %q", bad)
	}
	kept := base()
	kept.Pipes, kept.Kept, kept.Goroutines = 2+2*keptPipes, keptCoros, 40+keptCoros-3
	if bad := left(base(), kept, "x"); len(bad) != 0 {
		t.Errorf("pools: %q", bad)
	}
	for want, f := range map[string]func(l *Look){
		"sockets left":     func(l *Look) { l.Sockets += slack + 1 },
		"pipes left":       func(l *Look) { l.Pipes += 2*keptPipes + 1 },
		"descriptors left": func(l *Look) { l.Others += slack + 1 },
		"12 more in f < ": func(l *Look) {
			l.Goroutines += 12
			l.stacks = []stack{{12, "f < "}}
		},
		"memory in use":  func(l *Look) { l.Live = keptMemory + 1 },
		"for handshakes": func(l *Look) { l.Kept = keptCoros + 1 },
		"connections is 1": func(l *Look) {
			l.Metrics["dstack_gateway_connections"] = 1
		},
		"app_connections is 2": func(l *Look) { l.Metrics[`dstack_gateway_app_connections{app="x"}`] = 2 },
		"connections_active is 1": func(l *Look) {
			l.Metrics[`dstack_gateway_connections_active{mode="unknown"}`] = 1
		},
	} {
		l := base()
		f(&l)
		if bad := strings.Join(left(base(), l, "x"), "\n"); !strings.Contains(bad, want) {
			t.Errorf("%s not noticed: %q", want, bad)
		}
	}
}

func TestJudgeMix(t *testing.T) {
	mixOf := func() *Mix {
		client, app := books()
		client.Kinds[Hasty.String()] = &Tally{Begun: 4, Cut: 4}
		m := &Mix{App: app, After: Look{Metrics: map[string]float64{`dstack_gateway_rejected_total{node_id="1",reason="no_sni"}`: 4}}}
		m.Client.Side, m.Client.OpenMean = client, 99
		return m
	}
	o := &Options{Conns: 100}
	if bad := mixOf().judge(o); len(bad) != 0 {
		t.Errorf("a good run: %q", bad)
	}
	for want, f := range map[string]func(m *Mix){
		"only 80 connections":       func(m *Mix) { m.Client.OpenMean = 80 },
		"handler_panics_total is 1": func(m *Mix) { m.After.Metrics["dstack_gateway_handler_panics_total"] = 1 },
		"accept_shed_total is 3":    func(m *Mix) { m.After.Metrics["dstack_gateway_accept_shed_total"] = 3 },
		"dial_failures_total is 2":  func(m *Mix) { m.After.Metrics[`dstack_gateway_dial_failures_total{reason="other"}`] = 2 },
		"reason no_sni":             func(m *Mix) { m.After.Metrics[`dstack_gateway_rejected_total{node_id="1",reason="no_sni"}`] = 5 },
		"reason dial":               func(m *Mix) { m.After.Metrics[`dstack_gateway_rejected_total{node_id="1",reason="dial"}`] = 1 },
	} {
		m := mixOf()
		f(m)
		if bad := strings.Join(m.judge(o), "\n"); !strings.Contains(bad, want) {
			t.Errorf("%s not noticed: %q", want, bad)
		}
	}
}

func TestJudgePressure(t *testing.T) {
	p := &Pressure{App: Side{Kinds: map[string]*Tally{}}, After: Look{Metrics: map[string]float64{}}}
	if bad := p.judge(); len(bad) != 0 {
		t.Errorf("a good run: %q", bad)
	}
	p.Client.Refused, p.Client.SmallError = 2, "no answer"
	p.After.Metrics["dstack_gateway_accept_shed_total"] = 1
	p.Blind = []string{"no descriptor"}
	bad := strings.Join(p.judge(), "\n")
	for _, want := range []string{"2 of 0 small connections were not served", "no answer", "accept_shed_total is 1", "no descriptor"} {
		if !strings.Contains(bad, want) {
			t.Errorf("%s not noticed: %q", want, bad)
		}
	}
}

func TestBook(t *testing.T) {
	b := newBook("client")
	end := func(k Kind, id uint64, err error) { b.end(&plan{kind: k, id: id}, 1, 2, err) }
	end(Bulk, 5, nil)
	end(Bulk, 6, io.ErrUnexpectedEOF)
	end(ClientResets, 7, io.ErrUnexpectedEOF)
	end(ClientResets, 8, fmt.Errorf("byte 3: %w", ErrCorrupt))
	end(Hasty, 9, nil)
	s := b.side()
	if s.Failed != 2 || s.Corrupt != 1 || len(s.Errors) != 2 || s.Kinds["bulk"].Orderly != 1 || s.Kinds["bulk"].IDs != 5 ||
		s.Kinds["client resets"].Cut != 1 || s.Kinds["hasty"].Cut != 1 || s.Kinds["bulk"].Received != 4 {
		t.Errorf("%+v, bulk %+v", s, s.Kinds["bulk"])
	}
	for range 2 * maxErrors {
		b.fail("x", errors.New("y"))
	}
	if s := b.side(); len(s.Errors) != maxErrors {
		t.Errorf("%d reasons kept", len(s.Errors))
	}
}

func TestParse(t *testing.T) {
	m, err := parseMetrics([]byte("# HELP x\ngo_goroutines 12\ndstack_gateway_connections_active{mode=\"unknown\"} 3\ndstack_gateway_connections_active{mode=\"terminate\"} 4\n" +
		"dstack_gateway_connections 0\ndstack_gateway_connect_seconds_bucket{le=\"1\"} 3\nother 4\n"))
	l := Look{Metrics: m}
	if err != nil || len(m) != 3 || l.Metric("dstack_gateway_connections_active", "") != 7 || l.Metric("dstack_gateway_connections_active", `"unknown"`) != 3 {
		t.Errorf("%v, %v", m, err)
	}
	for _, text := range []string{"", "go_goroutines twelve\n", "not metrics"} {
		if _, err := parseMetrics([]byte(text)); err == nil {
			t.Errorf("%q accepted", text)
		}
	}
	s := parseStacks([]byte("goroutine profile: total 3\n2 @ 0x1 0x2\n#\t0x1\truntime.gopark+0x1\t/a.go:1\n#\t0x2\tgithub.com/x/terminate.(*Worker).coro.func1+0x2\t/b.go:2\n\n1 @ 0x3\n#\t0x3\tmain.main+0x9\t/c.go:3\n"))
	if len(s) != 2 || s[0].count != 2 || !s[0].kept() || s[1].kept() || s[1].text != "main.main < " {
		t.Errorf("%+v", s)
	}
	if n, err := field([]byte("Name:\tx\nThreads:\t11\nVmRSS:\t  123 kB\n"), "VmRSS"); n != 123 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := netstat("TcpExt: A ListenDrops B\nTcpExt: 1 22 3\nIpExt: ListenDrops\nIpExt: 4\n", "ListenDrops"); n != 22 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := netstat("IpExt: ListenDrops\nIpExt: 4\n", "ListenDrops"); err == nil {
		t.Error("missing counter accepted")
	}
	if _, err := field([]byte("Name:\tx\n"), "VmRSS"); err == nil {
		t.Error("missing line accepted")
	}
}

func TestMarkdown(t *testing.T) {
	client, app := books()
	m := &Mix{App: app, Before: Look{Goroutines: 40, Descriptors: 21}, After: Look{Goroutines: 41, Descriptors: 23},
		During: []Look{{Goroutines: 50, Descriptors: 70, Pipes: 4}, {Goroutines: 45, Descriptors: 90}}}
	m.Usage.Wall = 1
	m.Client.Side = client
	r := &Report{Version: "gw 1", Mix: m, Problems: []string{"something odd"},
		Idle:     &Idle{Ends: &IdleCost{Slab: 10}, Forwarded: &IdleCost{Conns: 7, PSS: 1.5, Live: 0.5, Slab: 14}},
		Pressure: &Pressure{Limit: 99}}
	md := r.Markdown()
	for _, want := range []string{"gw 1", "- something odd", "| descriptors | 21 | 90 | 23 |", "| of pipes | 0 | 4 | 0 |", "| forwarded | 7 | 1.5 | 0.5 | 4.0 | 5.5 |",
		"| bulk | 3 | 3 | 0 |", "99 descriptors allowed", "not known"} {
		if !strings.Contains(md, want) {
			t.Errorf("no %q in\n%s", want, md)
		}
	}
	if _, err := r.JSON(); err != nil {
		t.Error(err)
	}
}
