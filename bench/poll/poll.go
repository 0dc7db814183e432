package poll

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Events of a socket, as Wait reports them.
const (
	Readable = unix.EPOLLIN
	Writable = unix.EPOLLOUT
)

// Event says what happened to the socket that was added with ID.
type Event struct {
	ID   int
	What uint32
}

// Poller waits for events of many sockets. It is for one goroutine.
type Poller struct {
	fd  int
	raw [512]unix.EpollEvent
	out []Event
}

// New returns an empty poller.
func New() (*Poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	return &Poller{fd: fd}, nil
}

// Close releases the poller, not the sockets.
func (p *Poller) Close() error { return unix.Close(p.fd) }

// Add watches fd for what; events carry id. With edge each change is reported once, without it as long as it lasts.
// Closing fd removes it.
func (p *Poller) Add(fd, id int, what uint32, edge bool) error {
	if edge {
		what |= unix.EPOLLET
	}
	ev := unix.EpollEvent{Events: what, Fd: int32(id)}
	if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("epoll_ctl add: %w", err)
	}
	return nil
}

// Wait returns what has happened, after at most d; the slice is valid until the next call.
func (p *Poller) Wait(d time.Duration) ([]Event, error) {
	n, err := unix.EpollWait(p.fd, p.raw[:], int(d.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return nil, fmt.Errorf("epoll_wait: %w", err)
	}
	p.out = p.out[:0]
	for _, e := range p.raw[:max(n, 0)] {
		p.out = append(p.out, Event{ID: int(e.Fd), What: e.Events})
	}
	return p.out, nil
}

func sockaddr(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func socket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("opening a socket: %w", err)
	}
	return fd, nil
}

// Connect starts connecting to an IPv4 address. The socket becomes Writable when that has ended; Err tells how.
func Connect(to netip.AddrPort) (int, error) {
	fd, err := socket()
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("setting TCP_NODELAY: %w", err)
	}
	if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return -1, fmt.Errorf("connecting to %s: %w", to, err)
	}
	return fd, nil
}

// Listen returns a listening socket on an IPv4 address and the address it got.
func Listen(on netip.AddrPort) (int, netip.AddrPort, error) {
	fail := func(fd int, what string, err error) (int, netip.AddrPort, error) {
		unix.Close(fd)
		return -1, netip.AddrPort{}, fmt.Errorf("%s %s: %w", what, on, err)
	}
	fd, err := socket()
	if err != nil {
		return -1, netip.AddrPort{}, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fail(fd, "setting SO_REUSEADDR for", err)
	}
	if err := unix.Bind(fd, sockaddr(on)); err != nil {
		return fail(fd, "binding to", err)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return fail(fd, "listening on", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return fail(fd, "asking for the address of", err)
	}
	in4 := sa.(*unix.SockaddrInet4)
	return fd, netip.AddrPortFrom(netip.AddrFrom4(in4.Addr), uint16(in4.Port)), nil
}

// Accept takes a connection from a listening socket, with TCP_NODELAY; -1 without error if there is none.
func Accept(fd int) (int, error) {
	c, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EINTR):
		return -1, nil
	case err != nil:
		return -1, fmt.Errorf("accept: %w", err)
	}
	if err := unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		unix.Close(c)
		return -1, fmt.Errorf("setting TCP_NODELAY: %w", err)
	}
	return c, nil
}

// Err returns and clears the pending error of a socket.
func Err(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return fmt.Errorf("asking for a socket's error: %w", err)
	}
	if n != 0 {
		return unix.Errno(n)
	}
	return nil
}

// Read returns the bytes read; eof is true at the end of the stream; 0, false, nil means nothing is there yet.
func Read(fd int, b []byte) (n int, eof bool, err error) {
	n, err = unix.Read(fd, b)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return 0, false, nil
	case err != nil:
		return 0, false, err
	}
	return n, n == 0, nil
}

// WriteAll writes b, which must fit the socket's send buffer: the bench's messages are small and have few in flight.
func WriteAll(fd int, b []byte) error {
	n, err := unix.Write(fd, b)
	if err == nil && n < len(b) {
		err = unix.EAGAIN
	}
	if errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("%d of %d bytes written: send buffer full, the other end does not read: %w", max(n, 0), len(b), err)
	}
	return err
}

// Close closes a socket.
func Close(fd int) error { return unix.Close(fd) }
