package dataplane

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/loop/looptest"
)

// pad makes a hello about size bytes long with an extension that comes first, so that
// the name stands at its end.
func pad(hello []byte, size int) []byte {
	body := hello[9:] // record header and handshake header
	at := 2 + 32
	at += 1 + int(body[at])
	at += 2 + int(binary.BigEndian.Uint16(body[at:]))
	at += 1 + int(body[at])
	exts := body[at+2:]
	n := size - len(hello) - 4
	grown := append([]byte{}, body[:at]...)
	grown = binary.BigEndian.AppendUint16(grown, uint16(len(exts)+4+n))
	grown = append(grown, 0xfa, 0xfa, byte(n>>8), byte(n)) // a type reserved for GREASE (RFC 8701)
	grown = append(grown, make([]byte, n)...)
	grown = append(grown, exts...)
	msg := append([]byte{1, 0, byte(len(grown) >> 8), byte(len(grown))}, grown...)
	return msg
}

// records splits a handshake message over records of at most size bytes.
func records(msg []byte, size int) (out []byte) {
	for len(msg) > 0 {
		n := min(size, len(msg))
		out = append(out, 22, 3, 1, byte(n>>8), byte(n))
		out = append(out, msg[:n]...)
		msg = msg[n:]
	}
	return out
}

// A hello may come in any pieces and be as large as 16 KiB; what the app gets is what
// the client sent.
func TestHellos(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Handshake = 20 * time.Second })
	port, apps := handover(t, "127.0.0.1:0")
	r.instance("i1", testApp, "127.0.0.1", open)
	hello := recordHello(t, fmt.Sprintf("%s-%ds.%s", testApp, port, testBase), nil)
	for _, tc := range []struct {
		name  string
		bytes []byte
		piece int
	}{
		{"whole", hello, len(hello)},
		{"byte by byte", hello, 1},
		{"with data behind it", append(hello[:len(hello):len(hello)], "and more"...), 1 << 20},
		{"16 KiB", records(pad(hello, 16<<10), 16384), 1 << 20},
		{"16 KiB in pieces", records(pad(hello, 16<<10), 16384), 1000},
		{"many records", records(pad(hello, 4<<10), 500), 77},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := net.Dial("tcp", r.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for b := tc.bytes; len(b) > 0; {
				n := min(len(b), tc.piece)
				if _, err := c.Write(b[:n]); err != nil {
					t.Fatal(err)
				}
				b = b[n:]
				if tc.piece < 100 {
					runtime.Gosched()
				}
			}
			_ = c.(*net.TCPConn).CloseWrite()
			app := <-apps
			if got, err := io.ReadAll(app); !bytes.Equal(got, tc.bytes) || err != nil {
				t.Errorf("the app got %d bytes of %d, %v", len(got), len(tc.bytes), err)
			}
			app.Close()
		})
	}
	t.Run("too large", func(t *testing.T) {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = c.Write(records(pad(hello, 20<<10), 16384))
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("got %d bytes", len(b))
		}
	})
	why := map[Reason]int{}
	for range 7 {
		why[r.waitEnd().Reason]++
	}
	if why[ReasonNormal] != 6 || why[ReasonNoSNI] != 1 {
		t.Errorf("recorded as %v", why)
	}
	r.quiet()
}

// A hello whose bytes come one by one to a gateway that terminates.
func TestDrippedHandshake(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Handshake = 20 * time.Second })
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	raw, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	c := tls.Client(&dripConn{Conn: raw}, &tls.Config{ServerName: fmt.Sprintf("%s-%d.%s", testApp, port, testBase), RootCAs: r.pool})
	transfer(t, c, 3000)
}

// The handshake has a limit of its own; a client that stalls in it is recorded as such.
func TestHandshakeTimeout(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Handshake = 500 * time.Millisecond })
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(recordHello(t, fmt.Sprintf("%s-%d.%s", testApp, port, testBase), nil)); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	flight, err := io.ReadAll(c)
	if d := time.Since(begin); len(flight) == 0 || d < 450*time.Millisecond || d > 2*time.Second {
		t.Errorf("%d bytes and the end after %s, %v", len(flight), d, err)
	}
	if rec := r.waitEnd(); rec.Reason != ReasonTimeout || rec.TLSVersion != 0 {
		t.Errorf("record %+v", rec)
	}
	r.quiet()
}

// A resumed session is recorded as one, also between the plain and the h2 name.
func TestResumptionIsRecorded(t *testing.T) {
	r := newRig(t, nil)
	port := backend(t, "127.0.0.1:0", echo)
	r.instance("i1", testApp, "127.0.0.1", open)
	cache := tls.NewLRUClientSessionCache(4)
	for i := range 3 {
		c, err := r.dialTLS(fmt.Sprintf("%s-%d.%s", testApp, port, testBase), func(c *tls.Config) { c.ClientSessionCache = cache })
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, c, 10)
		c.Close()
		if rec := r.waitEnd(); rec.Resumed != (i > 0) || rec.Resumed != c.ConnectionState().DidResume {
			t.Errorf("connection %d: resumed %v", i, rec.Resumed)
		}
	}
}

// Thousands of connections that end in every way leave no descriptor, no goroutine,
// no coroutine and no counter behind.
func TestNothingIsLeft(t *testing.T) {
	const conns = 5000
	freePort(t) // the runtime's own poller is there before the count
	goroutines, descriptors := runtime.NumGoroutine(), looptest.Descriptors(t)
	t.Run("connections", func(t *testing.T) {
		r := newRig(t, func(o *Options) {
			o.Handshake, o.PolicyHold, o.Connect = 20*time.Second, 50*time.Millisecond, 20*time.Second
		})
		port := backend(t, "127.0.0.1:0", func(c net.Conn) {
			// Not as two TCP connections, for which package net would pool pipes.
			_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		})
		r.instance("i1", testApp, "127.0.0.1", open)
		dead := strings.Repeat("d", 40)
		r.instance("i2", dead, "127.0.0.2", open)
		name := func(app, suffix string) string { return fmt.Sprintf("%s-%d%s.%s", app, port, suffix, testBase) }
		hellos := map[string][]byte{}
		for _, n := range []string{name(testApp, "s"), name(testApp, ""), name(dead, "s"), "www.shop.example", "gateway." + testBase} {
			hellos[n] = recordHello(t, n, nil)
		}
		cache := tls.NewLRUClientSessionCache(64)
		one := func(i int) {
			raw, err := net.Dial("tcp", r.addr)
			if err != nil {
				t.Error(err)
				return
			}
			c := raw.(*net.TCPConn)
			defer c.Close()
			say := func(n string) { _, _ = c.Write(hellos[n]) }
			switch i % 10 {
			case 0: // a whole exchange
				say(name(testApp, "s"))
				_ = c.CloseWrite()
				if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, hellos[name(testApp, "s")]) {
					t.Errorf("echo of %d bytes, %v", len(b), err)
				}
			case 1: // cut while relaying
				say(name(testApp, "s"))
				_, _ = io.ReadFull(c, make([]byte, 10))
				reset(c)
			case 2: // nothing at all
			case 3: // half a hello, reset
				_, _ = c.Write(hellos[name(testApp, "")][:100])
				reset(c)
			case 4: // no TLS
				_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
				_, _ = io.Copy(io.Discard, c)
			case 5: // the app is down
				say(name(dead, "s"))
				_, _ = io.Copy(io.Discard, c)
			case 6: // no such domain
				say("www.shop.example")
				_, _ = io.Copy(io.Discard, c)
			case 7: // gone in the TLS handshake
				say(name(testApp, ""))
				if i%20 < 10 {
					_, _ = io.ReadFull(c, make([]byte, 10))
				}
				reset(c)
			case 8:
				if i%50 < 10 { // served by the gateway itself, cut
					say("gateway." + testBase)
					_, _ = io.ReadFull(c, make([]byte, 10))
				}
				reset(c)
			case 9: // TLS, resumed as a rule
				k := tls.Client(c, &tls.Config{ServerName: name(testApp, ""), RootCAs: r.pool, ClientSessionCache: cache})
				if _, err := k.Write([]byte("hi")); err != nil {
					t.Error(err)
					return
				}
				_ = k.CloseWrite()
				if b, err := io.ReadAll(k); err != nil || string(b) != "hi" {
					t.Errorf("echo %q, %v", b, err)
				}
			}
		}
		next := make(chan int)
		var wg sync.WaitGroup
		for range 40 {
			wg.Go(func() {
				for i := range next {
					one(i)
				}
			})
		}
		for i := range conns {
			next <- i
		}
		close(next)
		wg.Wait()
		r.quiet()
		r.hooks.mu.Lock()
		accepted := 0
		for _, w := range r.workers {
			accepted += int(w.stats.accepted.Load())
		}
		if n := len(r.hooks.records); n != accepted || n < conns*9/10 { // TCP_DEFER_ACCEPT hides some
			t.Errorf("%d records of %d connections, %d accepted", n, conns, accepted)
		}
		why := map[Reason]int{}
		for _, rec := range r.hooks.records {
			why[rec.Reason]++
		}
		r.hooks.mu.Unlock()
		if why[ReasonInternal]+why[ReasonTimeout]+why[ReasonOverload]+why[ReasonIdle] > 0 {
			t.Errorf("reasons %v", why)
		}
	})
	looptest.Wait(t, "goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
	if n := looptest.Descriptors(t); n > descriptors {
		t.Errorf("%d descriptors before, %d after", descriptors, n)
	}
}
