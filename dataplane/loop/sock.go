package loop

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Sock is a non-blocking stream socket with remembered readiness. The flags are
// hints in one direction only: false means that the next call would say EAGAIN
// (an edge will follow), true means that it is worth trying.
type Sock struct {
	FD       int // -1 when closed
	Readable bool
	Writable bool
	// Hup says that the end of the stream or an error is on its way, so a short
	// read does not mean that nothing is left to read.
	Hup bool
	tok Token
}

// Watch registers the socket, edge-triggered in both directions.
func (s *Sock) Watch(l *Loop, h Handler) error {
	t, err := l.add(s.FD, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP|unix.EPOLLET&0xffffffff, h)
	if err != nil {
		return err
	}
	s.tok = t
	return nil
}

// Watched reports whether the socket is registered.
func (s *Sock) Watched() bool { return s.tok.idx != 0 }

// Note records the bits of one event.
func (s *Sock) Note(ev Event) {
	if ev&(In|Hup) != 0 {
		s.Readable = true
	}
	if ev&(Out|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		s.Writable = true
	}
	if ev&Hup != 0 {
		s.Hup = true
	}
}

// ErrWouldBlock says that the operation must be repeated after the next edge.
var ErrWouldBlock error = wouldBlock{}

type wouldBlock struct{}

func (wouldBlock) Error() string   { return "operation would block" }
func (wouldBlock) Timeout() bool   { return true }
func (wouldBlock) Temporary() bool { return true }

// Recv reads once. io.EOF is the peer's FIN; ErrWouldBlock clears Readable.
func (s *Sock) Recv(p []byte) (int, error) {
	if !s.Readable {
		return 0, ErrWouldBlock
	}
	n, e := rawRecv(s.FD, p)
	switch {
	case e == unix.EAGAIN:
		s.Readable = false
		return 0, ErrWouldBlock
	case e != 0:
		return 0, os.NewSyscallError("recv", e)
	case n == 0:
		return 0, io.EOF
	}
	if n < len(p) && !s.Hup {
		// epoll(7): a short read of a stream socket drained it; data that comes later brings a new edge.
		s.Readable = false
	}
	return n, nil
}

// Send writes once; fewer bytes than len(p) means that Writable was cleared.
func (s *Sock) Send(p []byte) (int, error) {
	if !s.Writable {
		return 0, nil
	}
	n, e := rawSend(s.FD, p, 0)
	if e == unix.EAGAIN {
		s.Writable = false
		return 0, nil
	}
	if e != 0 {
		return 0, os.NewSyscallError("send", e)
	}
	if n < len(p) {
		s.Writable = false
	}
	return n, nil
}

// TrySend is Send on a socket whose connect may still be under way: it reports
// started=false without an error in that case.
func (s *Sock) TrySend(p []byte) (n int, started bool, err error) {
	n, e := rawSend(s.FD, p, 0)
	switch e {
	case 0:
		s.Writable = n == len(p)
		return n, true, nil
	case unix.EAGAIN, unix.ENOTCONN, unix.EINPROGRESS, unix.EALREADY:
		return 0, false, nil
	}
	return 0, false, os.NewSyscallError("connect", e)
}

// SpliceTo moves up to n bytes from the socket into pipe. io.EOF is the peer's FIN.
func (s *Sock) SpliceTo(pipe, n int) (int, error) {
	m, e := rawSplice(s.FD, pipe, n)
	switch {
	case e == unix.EAGAIN:
		s.Readable = false
		return 0, ErrWouldBlock
	case e != 0:
		return 0, os.NewSyscallError("splice", e)
	case m == 0:
		return 0, io.EOF
	}
	return m, nil
}

// SpliceFrom moves up to n bytes from pipe into the socket; 0 without an error
// means that Writable was cleared.
func (s *Sock) SpliceFrom(pipe, n int) (int, error) {
	m, e := rawSplice(pipe, s.FD, n)
	if e == unix.EAGAIN {
		s.Writable = false
		return 0, nil
	}
	if e != 0 {
		return 0, os.NewSyscallError("splice", e)
	}
	return m, nil
}

// CloseWrite sends FIN.
func (s *Sock) CloseWrite() { rawShutdown(s.FD, unix.SHUT_WR) }

// Close closes the socket. Unsent data is still delivered by the kernel.
func (s *Sock) Close(l *Loop) {
	if s.FD < 0 {
		return
	}
	l.forget(s.tok)
	rawClose(s.FD)
	s.FD, s.tok, s.Readable, s.Writable = -1, Token{}, false, false
}

// Unsent counts the bytes that were written to the socket and have not left yet.
func (s *Sock) Unsent() int {
	q, err := unix.IoctlGetInt(s.FD, unix.SIOCOUTQNSD)
	if err != nil {
		return 0
	}
	return q
}

// Reset closes the socket so that the peer sees a reset instead of a clean end. Bytes
// that are on their way arrive before it, those that are Unsent are lost.
func (s *Sock) Reset(l *Loop) {
	if s.FD < 0 {
		return
	}
	_ = unix.SetsockoptLinger(s.FD, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0})
	s.Close(l)
}

// Unacked counts the bytes that were written to the socket and that the peer's
// kernel has not confirmed.
func (s *Sock) Unacked() int {
	q, err := unix.IoctlGetInt(s.FD, unix.SIOCOUTQ)
	if err != nil {
		return 0
	}
	return q
}

// Detach takes the socket out of the loop and returns its descriptor, which the caller owns.
func (s *Sock) Detach(l *Loop) int {
	fd := s.FD
	if s.Watched() {
		ev := unix.EpollEvent{}
		_ = rawEpollCtl(l.epfd, unix.EPOLL_CTL_DEL, fd, &ev)
		l.forget(s.tok)
	}
	s.FD, s.tok = -1, Token{}
	return fd
}

// Err returns the pending socket error (SO_ERROR).
func (s *Sock) Err() error {
	v, err := unix.GetsockoptInt(s.FD, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if v != 0 {
		return os.NewSyscallError("connect", syscall.Errno(v))
	}
	return nil
}

// Local returns the socket's own address.
func (s *Sock) Local() (netip.AddrPort, error) {
	sa, err := unix.Getsockname(s.FD)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("getsockname: unexpected address family")
}

// Dial starts a non-blocking TCP connect. The result arrives as an Out edge; ask Err then.
func Dial(to netip.AddrPort) (Sock, error) {
	fam := unix.AF_INET
	if to.Addr().Is6() {
		fam = unix.AF_INET6
	}
	r, _, e := unix.RawSyscall(unix.SYS_SOCKET, uintptr(fam), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if e != 0 {
		return Sock{FD: -1}, os.NewSyscallError("socket", e)
	}
	fd := int(r)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		rawClose(fd)
		return Sock{FD: -1}, os.NewSyscallError("setsockopt", err)
	}
	var sa unix.Sockaddr
	if fam == unix.AF_INET {
		sa = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	} else {
		sa = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	if err := unix.Connect(fd, sa); err != nil && err != unix.EINPROGRESS {
		rawClose(fd)
		return Sock{FD: -1}, os.NewSyscallError("connect", err)
	}
	return Sock{FD: fd}, nil
}
