package dataplane

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/loop/looptest"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// What a fuzz input does, instruction by instruction: an operation, then for the
// writing ones a length of two bytes and that many bytes.
const (
	opWrite    = iota // the client writes
	opWriteApp        // the app writes, if it was reached
	opPause           // up to 4 ms
	opClose           // the client ends its direction
	opCloseApp        // the app does
	opReset           // the client resets
	opResetApp        // the app does
	opCount
)

// FuzzConn feeds a running server whatever a client and an app may say and do, at any
// time. Every connection must end, and nothing of it may stay. Coverage differs from
// run to run, so fuzz with -fuzzminimizetime 1x.
func FuzzConn(f *testing.F) {
	for _, s := range seeds(f) {
		f.Add(s)
	}
	r := newRig(f, func(o *Options) {
		o.Handshake, o.Connect, o.Idle, o.PolicyHold, o.Resolve = 60*time.Millisecond, 60*time.Millisecond, 60*time.Millisecond, 60*time.Millisecond, 60*time.Millisecond
		o.DeferAccept = 0
	})
	proxied := newRig(f, func(o *Options) {
		o.InboundPROXY, o.PPHeader, o.Handshake, o.Connect, o.Idle = true, 60*time.Millisecond, 60*time.Millisecond, 60*time.Millisecond, 60*time.Millisecond
		o.DeferAccept = 0
	})
	apps, dialled := map[*rig]<-chan *net.TCPConn{}, map[*rig]int{}
	for i, r := range []*rig{r, proxied} {
		// The names of the inputs carry the port; workers of a fuzzing run differ by address.
		addr := netip.AddrFrom4([4]byte{127, byte(10 + i), byte(os.Getpid() >> 8), byte(os.Getpid())}).String()
		_, apps[r] = handover(f, fmt.Sprintf("%s:%d", addr, fuzzPort))
		r.instance("i1", testApp, addr, routing.Policy{Known: true, Ports: map[uint16]bool{fuzzPort: true}})
	}

	f.Fuzz(func(t *testing.T, script []byte) {
		r := r
		if len(script) > 0 && script[0]&0x80 != 0 {
			r = proxied
		}
		raw, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		dialled[r]++
		c := raw.(*net.TCPConn)
		defer c.Close()
		go func() { _, _ = io.Copy(io.Discard, c) }()
		var app *net.TCPConn
		patience := 3 * time.Millisecond
		reach := func() bool {
			if app == nil {
				select {
				case app = <-apps[r]:
					go func() { _, _ = io.Copy(io.Discard, app) }()
				case <-time.After(patience):
					patience = 0
				}
			}
			return app != nil
		}
		for range 40 { // instructions; more would only take time
			if len(script) == 0 {
				break
			}
			op := int(script[0]&0x7f) % opCount
			script = script[1:]
			var body []byte
			if op <= opWriteApp && len(script) >= 2 {
				n := min(int(script[0])<<8|int(script[1]), len(script)-2)
				body, script = script[2:2+n], script[2+n:]
			}
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			switch op {
			case opWrite:
				_, _ = c.Write(body)
			case opWriteApp:
				if reach() {
					_, _ = app.Write(body)
				}
			case opPause:
				time.Sleep(time.Duration(len(script)%5) * time.Millisecond)
			case opClose:
				_ = c.CloseWrite()
			case opCloseApp:
				if reach() {
					_ = app.CloseWrite()
				}
			case opReset:
				reset(c)
			case opResetApp:
				if reach() {
					reset(app)
				}
			}
		}
		c.Close()
		looptest.Wait(t, "the connection ends", func() bool {
			for len(r.hooks.ended) > 0 {
				if rec := <-r.hooks.ended; rec.Reason == ReasonInternal {
					t.Fatalf("ended with %v", rec.Detail)
				}
			}
			for len(apps[r]) > 0 {
				(<-apps[r]).Close()
			}
			accepted := 0
			for _, w := range r.workers {
				accepted += int(w.stats.accepted.Load())
			}
			return accepted == dialled[r] && r.Connections() == 0
		})
		if app != nil {
			app.Close()
		}
		r.hooks.mu.Lock()
		r.hooks.records = nil
		r.hooks.mu.Unlock()
		(&rig{Server: r.Server, t: t}).quiet()
	})
}

const fuzzPort = 28443

// seeds are scripts around real hellos.
func seeds(t testing.TB) map[string][]byte {
	hello := func(name string) []byte {
		return recordHello(t, name, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} })
	}
	write := func(op byte, b []byte) []byte {
		return append([]byte{op, byte(len(b) >> 8), byte(len(b))}, b...)
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	pass := hello(fmt.Sprintf("%s-%ds.%s", testApp, fuzzPort, testBase))
	term := hello(fmt.Sprintf("%s-%d.%s", testApp, fuzzPort, testBase))
	return map[string][]byte{
		"passthrough":     join(write(opWrite, pass), write(opWriteApp, []byte("hello")), write(opWrite, []byte("data")), []byte{opClose, opPause, opCloseApp}),
		"passthrough-cut": join(write(opWrite, pass[:50]), []byte{opPause}, write(opWrite, pass[50:]), []byte{opResetApp, opPause}, write(opWrite, []byte("x"))),
		"client-reset":    join(write(opWrite, pass), write(opWriteApp, []byte("x")), []byte{opReset}),
		"terminate":       join(write(opWrite, term), []byte{opPause}, write(opWrite, []byte{20, 3, 3, 0, 1, 1, 23, 3, 3, 0, 5, 1, 2, 3, 4, 5})),
		"alert":           join(write(opWrite, term), write(opWrite, []byte{21, 3, 3, 0, 2, 2, 80}), []byte{opClose}),
		"custom":          write(opWrite, hello("www.shop.example")),
		"builtin":         join(write(opWrite, hello("gateway."+testBase)), []byte{opPause, opReset}),
		"not-tls":         write(opWrite, []byte("GET / HTTP/1.1\r\n\r\n")),
		"proxy-v1":        join(write(0x80|opWrite, []byte("PROXY TCP4 9.8.7.6 1.2.3.4 1234 443\r\n")), []byte{opPause}, write(opWrite, pass), write(opWriteApp, []byte("x"))),
		"proxy-v2": join(write(0x80|opWrite, append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x09\x08\x07\x06\x01\x02\x03\x04\x04\xd2\x01\xbb"), term...)),
			[]byte{opClose}),
		"empty": {},
	}
}
