package soak

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// A client and an app of this package talk to each other without a gateway, through f for damage.
func pairUp(t *testing.T, f func(net.Conn) net.Conn) (*client, *app) {
	t.Helper()
	c, err := newClient(Spec{Pass: "x.bench.test", Seed: 4, Ramp: 1000})
	if err != nil {
		t.Fatal(err)
	}
	c.tiny = 256 << 10
	c.until = time.Now().Add(20 * time.Second)
	a := &app{book: newBook("app"), tiny: 256 << 10, release: make(chan struct{})}
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	a.listeners = append(a.listeners, l)
	a.wg.Go(func() { a.accept(l, true) })
	t.Cleanup(a.close)
	to := l.Addr().(*net.TCPAddr).AddrPort()
	if f == nil {
		c.spec.Addr = to
		return c, a
	}
	// A relay in between, which passes on what f makes of the client's side.
	r, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	go func() {
		for {
			in, err := r.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp4", to.String())
				if err != nil {
					return
				}
				defer out.Close()
				go func() {
					io.Copy(out, f(in))
					out.(*net.TCPConn).CloseWrite()
				}()
				io.Copy(in, out)
				in.(*net.TCPConn).CloseWrite()
				time.Sleep(50 * time.Millisecond)
			}()
		}
	}()
	c.spec.Addr = netip.MustParseAddrPort(r.Addr().String())
	return c, a
}

func settled(t *testing.T, a *app) Side {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); a.book.open() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the app still has connections")
		}
	}
	return a.book.side()
}

// Every kind comes to its end, quickly when told to, and both books agree.
func TestEveryKind(t *testing.T) {
	c, a := pairUp(t, nil)
	for k := range kindCount {
		for seq := range uint32(3) {
			go func() {
				c.live(int(k), seq, k, func() {})
			}()
		}
	}
	time.Sleep(700 * time.Millisecond)
	close(c.stop)
	close(a.release)
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		s := c.book.side()
		done := uint64(0)
		for _, k := range s.Kinds {
			done += k.Orderly + k.Cut
		}
		if done == uint64(kindCount)*3 {
			break
		}
		if s.Failed > 0 || time.Now().After(end) {
			t.Fatalf("%d ended: %+v", done, s)
		}
	}
	client, app := c.book.side(), settled(t, a)
	if bad := sides(&client, &app, "x"); len(bad) > 0 {
		t.Errorf("%q", bad)
	}
}

type flipper struct {
	net.Conn
	at int
}

func (f *flipper) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	if f.at >= 0 && f.at < n {
		b[f.at] ^= 4
	}
	f.at -= n
	return n, err
}

// A relay that changes one bit, or forgets the end of a stream, is caught.
func TestBrokenRelay(t *testing.T) {
	hello, err := wire.Hello("x.bench.test", false)
	if err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		f       func(net.Conn) net.Conn
		corrupt bool
	}{
		"bit of the ClientHello": {func(c net.Conn) net.Conn { return &flipper{c, 60} }, true},
		"bit of the opening":     {func(c net.Conn) net.Conn { return &flipper{c, len(hello) + 10} }, true},
		"bit of the content":     {func(c net.Conn) net.Conn { return &flipper{c, 30_000} }, true},
		"lost tail":              {func(c net.Conn) net.Conn { return only{c, io.LimitReader(c, 30_000)} }, false},
	} {
		c, a := pairUp(t, x.f)
		close(c.stop)
		close(a.release)
		c.live(0, 0, SlowApp, func() {}) // id 0: the hello above
		app := settled(t, a)
		client := c.book.side()
		if app.Failed == 0 || (app.Corrupt > 0) != x.corrupt {
			t.Errorf("%s: %+v", name, app)
		}
		if bad := sides(&client, &app, "x"); len(bad) == 0 {
			t.Errorf("%s: not noticed", name)
		}
	}
}

type only struct {
	net.Conn
	r io.Reader
}

func (o only) Read(b []byte) (int, error) { return o.r.Read(b) }

func TestAgent(t *testing.T) {
	for _, x := range []struct{ command, in string }{{"spy", ""}, {clientCommand, "{"}, {clientCommand, ""}, {clientCommand, `{"cert":"AAAA"}` + "\n"}} {
		if err := Agent(x.command, bytes.NewBufferString(x.in), io.Discard); err == nil {
			t.Errorf("%+v accepted", x)
		}
	}
	var out bytes.Buffer
	if err := Agent(clientCommand, bytes.NewBufferString(`{"what":"dance"}`+"\n"), &out); err != nil {
		t.Fatal(err)
	}
	var l said
	if err := json.Unmarshal(out.Bytes(), &l); err != nil || l.Error != `unknown load "dance"` {
		t.Errorf("%s: %v", out.String(), err)
	}
}

// An exchange whose receiving side fails does not wait for its sender.
func TestExchangeGivesUp(t *testing.T) {
	c, a := pairUp(t, func(c net.Conn) net.Conn { return &flipper{c, 30_000} })
	close(c.stop)
	begin := time.Now()
	p := newPlan(Bulk, 0, c.spec.Seed)
	tcp, err := c.connect(false)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	e, _, err := c.begin(tcp, 0, &p)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.exchange([]step{{bytes: 8 << 20}}, false); err == nil || errors.Is(err, ErrCorrupt) {
		t.Errorf("the app hung up, the client saw %v", err)
	}
	if time.Since(begin) > 10*time.Second {
		t.Errorf("took %v", time.Since(begin))
	}
	if s := settled(t, a); s.Corrupt != 1 {
		t.Errorf("%+v", s)
	}
}
