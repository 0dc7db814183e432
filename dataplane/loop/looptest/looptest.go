package looptest

import (
	"log/slog"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
)

// Loop is a running event loop.
type Loop struct {
	*loop.Loop
	t testing.TB
}

// Start runs a loop until the end of the test.
func Start(t testing.TB) Loop {
	t.Helper()
	l, err := loop.New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	t.Cleanup(l.Stop)
	return Loop{l, t}
}

// Do runs f on the loop's goroutine and waits for it. f must not end the test.
func (l Loop) Do(f func()) {
	l.t.Helper()
	done := make(chan struct{})
	if err := l.Post(func() { defer close(done); f() }); err != nil {
		l.t.Fatal(err)
	}
	<-done
}

// smallest is what the kernel makes of any smaller socket buffer, roughly.
const smallest = 4096

// TCP returns a connection over loopback: the end of a peer, and ours, not watched
// yet and owned by the caller. small shrinks the socket buffers of both ends.
func TCP(t testing.TB, small bool) (*net.TCPConn, loop.Sock) {
	t.Helper()
	lc := net.ListenConfig{}
	if small {
		lc.Control = func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) {
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, smallest)
				_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, smallest)
			})
		}
	}
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	peer, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	ours, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	f, err := ours.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := peer.(*net.TCPConn)
	if small {
		_ = c.SetReadBuffer(smallest)
		_ = c.SetWriteBuffer(smallest)
	}
	return c, loop.Sock{FD: fd, Writable: true, Readable: true}
}

// Descriptors counts the open descriptors of the process.
func Descriptors(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// Wait polls until ok, and fails the test with what after a while.
func Wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
