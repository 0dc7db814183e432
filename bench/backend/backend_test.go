package backend

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-gw/dstack-gw/bench/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T) *Server {
	t.Helper()
	any := netip.MustParseAddrPort("127.0.0.1:0")
	s, err := Start(Addrs{any, any, any, any})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func dial(t *testing.T, to netip.AddrPort) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp4", to.String())
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

// A hello cut anywhere, and several requests in one segment, split in the middle of one.
func TestFragments(t *testing.T) {
	s := start(t)
	hello, err := wire.Hello("app.test", true)
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, s.Addrs().RequestPassthrough)
	send := func(b []byte) {
		t.Helper()
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	var three [3 * wire.Size]byte
	for i := range 3 {
		wire.Message{Kind: wire.Request, Conn: 1, Seq: uint64(i)}.Put(three[i*wire.Size:])
	}
	send(hello[:3])
	send(hello[3:100])
	send(append(append([]byte{}, hello[100:]...), three[:wire.Size+10]...))
	send(three[wire.Size+10:])
	buf := make([]byte, 4*wire.Size)
	if _, err := io.ReadFull(c, buf); err != nil {
		t.Fatal(err)
	}
	if err := wire.Expect(buf, wire.Message{Kind: wire.HelloAck, A: wire.Checksum(hello), B: uint64(len(hello))}); err != nil {
		t.Error(err)
	}
	for i := range 3 {
		if err := wire.Expect(buf[(i+1)*wire.Size:], wire.Message{Kind: wire.Reply, Conn: 1, Seq: uint64(i)}); err != nil {
			t.Errorf("request %d: %v", i, err)
		}
	}
	if err := s.Errors(); err != nil {
		t.Error(err)
	}
}

func TestRefusesGarbage(t *testing.T) {
	var open [wire.Size]byte
	wire.Message{Kind: wire.BulkOpen}.Put(open[:])
	damaged := open
	damaged[20] ^= 1
	for name, c := range map[string]struct {
		port  func(Addrs) netip.AddrPort
		bytes []byte
		want  error
	}{
		"no hello":            {func(a Addrs) netip.AddrPort { return a.RequestPassthrough }, []byte("GET / HTTP/1.1\r\n"), wire.ErrNotHello},
		"no hello, bulk":      {func(a Addrs) netip.AddrPort { return a.BulkPassthrough }, []byte("GET / HTTP/1.1\r\n"), wire.ErrNotHello},
		"hello where plain":   {func(a Addrs) netip.AddrPort { return a.RequestPlain }, make([]byte, wire.Size), wire.ErrCorrupt},
		"damaged request":     {func(a Addrs) netip.AddrPort { return a.RequestPlain }, damaged[:], wire.ErrCorrupt},
		"bulk where requests": {func(a Addrs) netip.AddrPort { return a.RequestPlain }, open[:], wire.ErrCorrupt},
		"half a request":      {func(a Addrs) netip.AddrPort { return a.RequestPlain }, open[:10], wire.ErrCorrupt},
		"request where bulk":  {func(a Addrs) netip.AddrPort { return a.BulkPlain }, make([]byte, wire.Size), wire.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			conn := dial(t, c.port(s.Addrs()))
			if _, err := conn.Write(c.bytes); err != nil {
				t.Fatal(err)
			}
			conn.(*net.TCPConn).CloseWrite()
			if n, err := io.Copy(io.Discard, conn); n != 0 {
				t.Errorf("answered %d bytes, %v", n, err)
			}
			for end := time.Now().Add(5 * time.Second); s.Errors() == nil && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			if err := s.Errors(); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestManyFailures(t *testing.T) {
	s := start(t)
	for range 20 {
		s.fail(wire.ErrCorrupt)
	}
	if err := s.Errors(); err == nil || !strings.Contains(err.Error(), "20 connections") || strings.Count(err.Error(), "\n") >= maxErrors {
		t.Errorf("got %v", err)
	}
}

func TestAddressTaken(t *testing.T) {
	s := start(t)
	if other, err := Start(s.Addrs()); err == nil {
		other.Close()
		t.Error("two backends on the same ports")
	}
}
