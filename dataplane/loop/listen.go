package loop

import (
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ListenOptions are set once on the listener and inherited by accepted sockets,
// which saves a system call a connection for each.
type ListenOptions struct {
	Backlog   int
	ReusePort bool
	// DeferAccept leaves a connection in the kernel until its first bytes came,
	// for at most about this long (whole seconds; TCP_DEFER_ACCEPT).
	DeferAccept time.Duration
	// KeepAlive is the idle time before the first probe; 0 leaves keep-alive off.
	KeepAlive time.Duration
}

// Listen opens a non-blocking TCP listener.
func Listen(at netip.AddrPort, o ListenOptions) (int, error) {
	fam := unix.AF_INET
	if at.Addr().Is6() {
		fam = unix.AF_INET6
	}
	fd, err := unix.Socket(fam, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, fmt.Errorf("listen on %s: %w", at, os.NewSyscallError("socket", err))
	}
	set := func(level, opt, v int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, opt, v)
		}
	}
	set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if o.ReusePort {
		set(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}
	if fam == unix.AF_INET6 {
		set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	set(unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if o.DeferAccept > 0 {
		set(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, int((o.DeferAccept+time.Second-1)/time.Second))
	}
	if o.KeepAlive > 0 {
		set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(o.KeepAlive/time.Second))
	}
	if err == nil {
		var sa unix.Sockaddr
		if fam == unix.AF_INET {
			sa = &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
		} else {
			sa = &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
		}
		if err = unix.Bind(fd, sa); err == nil {
			err = unix.Listen(fd, o.Backlog)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", at, err)
	}
	return fd, nil
}

// Acceptor hands accepted sockets to Accepted, on the loop's goroutine. It keeps
// one reserve descriptor: when the process or the system is out of descriptors it
// uses it to close the waiting connection cleanly, and then pauses instead of spinning.
type Acceptor struct {
	Accepted func(fd int, peer netip.AddrPort)
	// Shed is told about a connection refused for want of descriptors.
	Shed func(err error)

	l       *Loop
	fd      int
	tok     Token
	reserve int
	pause   time.Duration
	timer   Timer
	rsa     unix.RawSockaddrAny
}

const acceptBatch = 64

// Serve registers the acceptor for listener fd, which it owns from now on.
func (a *Acceptor) Serve(l *Loop, fd int) error {
	a.l, a.fd, a.timer.H = l, fd, a
	a.saveReserve()
	return a.watch()
}

func (a *Acceptor) saveReserve() {
	a.reserve, _ = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0) // -1 when it fails
}

func (a *Acceptor) watch() (err error) {
	a.tok, err = a.l.add(a.fd, unix.EPOLLIN, a)
	return err
}

// Close stops accepting.
func (a *Acceptor) Close() {
	if a.fd < 0 {
		return
	}
	a.l.Disarm(&a.timer)
	a.l.forget(a.tok)
	unix.Close(a.fd)
	if a.reserve >= 0 {
		unix.Close(a.reserve)
	}
	a.fd, a.reserve = -1, -1
}

// Ready implements Handler.
func (a *Acceptor) Ready(Event) {
	for range acceptBatch {
		if a.fd < 0 {
			return
		}
		fd, e := rawAccept(a.fd, &a.rsa)
		switch e {
		case 0:
			a.pause = 0
			a.Accepted(fd, peerOf(&a.rsa))
		case unix.EAGAIN:
			return
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			a.shed(e)
			return
		default:
			// accept(2) passes on network errors of the new socket; the next one may be fine.
			if a.Shed != nil {
				a.Shed(os.NewSyscallError("accept4", e))
			}
		}
	}
}

func (a *Acceptor) shed(e syscall.Errno) {
	// Turn away what waits: a client that is told at once can go elsewhere, one that
	// hangs in the backlog cannot.
	for range acceptBatch {
		if a.reserve < 0 {
			break
		}
		unix.Close(a.reserve)
		fd, e2 := rawAccept(a.fd, &a.rsa)
		if e2 == 0 {
			rawClose(fd)
		}
		a.reserve, _ = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if a.Shed != nil {
			a.Shed(os.NewSyscallError("accept4", e))
		}
		if e2 != 0 {
			break
		}
	}
	a.pause = min(max(5*time.Millisecond, a.pause*2), 100*time.Millisecond)
	ev := unix.EpollEvent{}
	_ = rawEpollCtl(a.l.epfd, unix.EPOLL_CTL_DEL, a.fd, &ev)
	a.l.forget(a.tok)
	a.l.Arm(&a.timer, a.pause)
}

// Expired implements TimerHandler: the pause after a shortage is over.
func (a *Acceptor) Expired(*Timer) {
	if a.fd >= 0 {
		if err := a.watch(); err != nil {
			a.l.Arm(&a.timer, 100*time.Millisecond)
		}
	}
}

func peerOf(rsa *unix.RawSockaddrAny) netip.AddrPort {
	switch rsa.Addr.Family {
	case unix.AF_INET:
		p := (*unix.RawSockaddrInet4)(unsafe.Pointer(rsa))
		return netip.AddrPortFrom(netip.AddrFrom4(p.Addr), swap16(p.Port))
	case unix.AF_INET6:
		p := (*unix.RawSockaddrInet6)(unsafe.Pointer(rsa))
		return netip.AddrPortFrom(netip.AddrFrom16(p.Addr).Unmap(), swap16(p.Port))
	}
	return netip.AddrPort{}
}

func swap16(v uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&v))
	return uint16(b[0])<<8 | uint16(b[1])
}
