package poll

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var loopback = netip.MustParseAddrPort("127.0.0.1:0")

// pair returns a connected pair of sockets, watched by a poller as 1 (client) and 2 (server).
func pair(t *testing.T) (p *Poller, client, server int) {
	t.Helper()
	l, addr, err := Listen(loopback)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(l)
	if client, err = Connect(addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Close(client) })
	if p, err = New(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if err := p.Add(l, 0, Readable, false); err != nil {
		t.Fatal(err)
	}
	wait(t, p, 0, Readable)
	if server, err = Accept(l); err != nil || server < 0 {
		t.Fatalf("accepted %d, %v", server, err)
	}
	t.Cleanup(func() { Close(server) })
	if none, err := Accept(l); none != -1 || err != nil {
		t.Fatalf("accepting when nobody comes: %d, %v", none, err)
	}
	if err := errors.Join(p.Add(client, 1, Readable|Writable, true), p.Add(server, 2, Readable, false)); err != nil {
		t.Fatal(err)
	}
	return p, client, server
}

// wait waits for an event of id that includes what.
func wait(t *testing.T, p *Poller, id int, what uint32) {
	t.Helper()
	for range 100 {
		events, err := p.Wait(50 * time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if e.ID == id && e.What&what == what {
				return
			}
		}
	}
	t.Fatalf("no event %#x of socket %d", what, id)
}

func TestSockets(t *testing.T) {
	p, client, server := pair(t)
	wait(t, p, 1, Writable)
	if err := Err(client); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if n, eof, err := Read(server, buf); n != 0 || eof || err != nil {
		t.Errorf("reading nothing: %d, %v, %v", n, eof, err)
	}
	if err := WriteAll(client, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	wait(t, p, 2, Readable)
	if n, eof, err := Read(server, buf); string(buf[:n]) != "hello" || eof || err != nil {
		t.Errorf("read %q, %v, %v", buf[:n], eof, err)
	}
	if err := unix.Shutdown(client, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	wait(t, p, 2, Readable)
	if n, eof, err := Read(server, buf); n != 0 || !eof || err != nil {
		t.Errorf("at the end: %d, %v, %v", n, eof, err)
	}
}

func TestWriteAllFull(t *testing.T) {
	_, client, _ := pair(t)
	if err := WriteAll(client, make([]byte, 64<<20)); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("64 MiB to somebody who does not read: %v", err)
	}
}

func TestConnectRefused(t *testing.T) {
	l, addr, err := Listen(loopback)
	if err != nil {
		t.Fatal(err)
	}
	Close(l)
	fd, err := Connect(addr)
	if err != nil {
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
		return // refused at once
	}
	defer Close(fd)
	p, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Add(fd, 7, Readable|Writable, true); err != nil {
		t.Fatal(err)
	}
	wait(t, p, 7, Writable)
	if err := Err(fd); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connecting to nobody: %v", err)
	}
}

func TestListenTaken(t *testing.T) {
	l, addr, err := Listen(loopback)
	if err != nil {
		t.Fatal(err)
	}
	defer Close(l)
	if _, _, err := Listen(addr); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("second listener: %v", err)
	}
}
