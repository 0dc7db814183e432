package loop

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Event is a set of epoll bits.
type Event uint32

const (
	In  Event = unix.EPOLLIN
	Out Event = unix.EPOLLOUT
	// Hup is set when the peer closed its sending side or the socket failed.
	Hup Event = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
)

// Handler receives readiness. Ready(0) is a turn asked for with Requeue.
type Handler interface{ Ready(ev Event) }

// Aborter is implemented by handlers that can be torn down after a panic in one of their callbacks.
type Aborter interface{ Abort(reason error) }

type slot struct {
	h   Handler
	gen uint32
}

// Loop runs handlers on one goroutine. Create it with New, start Run in a goroutine.
type Loop struct {
	log    *slog.Logger
	epfd   int
	wakefd int
	slots  []slot
	free   []uint32
	base   time.Time
	now    int64
	wheel  wheel
	again  []Handler
	spare  []Handler
	events []unix.EpollEvent

	mu       sync.Mutex // guards mail and closed
	mail     []func()
	closed   bool
	sleeping atomic.Bool
	stop     bool
	done     chan struct{}
	panics   atomic.Uint64
}

// New returns a loop that is not running yet. It owns two descriptors until the end
// of Run, or until Close if it never runs.
func New(log *slog.Logger) (*Loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll instance: %w", err)
	}
	wfd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(ep)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	l := &Loop{log: log, epfd: ep, wakefd: wfd, base: time.Now(), events: make([]unix.EpollEvent, 512), done: make(chan struct{})}
	l.slots = make([]slot, 1, 1024) // slot 0 is the wake descriptor
	l.wheel.tick = 1
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: 0, Pad: 0}
	if e := rawEpollCtl(ep, unix.EPOLL_CTL_ADD, wfd, &ev); e != 0 {
		unix.Close(ep)
		unix.Close(wfd)
		return nil, os.NewSyscallError("epoll_ctl", e)
	}
	return l, nil
}

// Now is the loop's clock in nanoseconds, read once an iteration.
func (l *Loop) Now() int64 { return l.now }

// Time converts a loop clock reading to wall time.
func (l *Loop) Time(ns int64) time.Time { return l.base.Add(time.Duration(ns)) }

// Panics counts handler panics that were contained.
func (l *Loop) Panics() uint64 { return l.panics.Load() }

// Token names a registration; the zero Token is none.
type Token struct{ idx, gen uint32 }

func (l *Loop) register(h Handler) Token {
	if n := len(l.free); n > 0 {
		i := l.free[n-1]
		l.free = l.free[:n-1]
		l.slots[i].h = h
		return Token{i, l.slots[i].gen}
	}
	l.slots = append(l.slots, slot{h: h, gen: 1})
	return Token{uint32(len(l.slots) - 1), 1}
}

func (l *Loop) forget(t Token) {
	if t.idx == 0 || l.slots[t.idx].gen != t.gen {
		return
	}
	l.slots[t.idx] = slot{gen: t.gen + 1}
	l.free = append(l.free, t.idx)
}

// add registers fd with the given epoll mask. Loop goroutine only (or before Run).
func (l *Loop) add(fd int, mask uint32, h Handler) (Token, error) {
	t := l.register(h)
	ev := unix.EpollEvent{Events: mask, Fd: int32(t.idx), Pad: int32(t.gen)}
	if e := rawEpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, &ev); e != 0 {
		l.forget(t)
		return Token{}, os.NewSyscallError("epoll_ctl", e)
	}
	return t, nil
}

// Arm (re)starts t to fire d from now. Loop goroutine only.
func (l *Loop) Arm(t *Timer, d time.Duration) {
	l.wheel.remove(t)
	if d > 1<<61 {
		d = 1 << 61
	}
	t.when = l.now + max(1, int64(d)) // never due in the turn that armed it
	l.wheel.add(t, l.now)
}

// Disarm stops t. Loop goroutine only.
func (l *Loop) Disarm(t *Timer) { l.wheel.remove(t) }

// Requeue gives h another turn after the sockets that are ready now had theirs.
func (l *Loop) Requeue(h Handler) { l.again = append(l.again, h) }

// ErrClosed is returned by Post after the loop ended.
var ErrClosed = errors.New("event loop is closed")

// Post runs fn on the loop's goroutine. Safe from any goroutine.
func (l *Loop) Post(fn func()) error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	l.mail = append(l.mail, fn)
	// Under the lock, because shut takes it before it closes the eventfd: a write
	// after that could hit whatever got the number next.
	if l.sleeping.Swap(false) {
		one := uint64(1)
		_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(l.wakefd), uintptr(unsafe.Pointer(&one)), 8)
	}
	l.mu.Unlock()
	return nil
}

// Stop ends Run after the current iteration and waits for it.
func (l *Loop) Stop() {
	if l.Post(func() { l.stop = true }) == nil {
		<-l.done
	}
}

// Run serves until Stop. It releases the loop's own descriptors at its end, after
// all that was posted ran; handlers that are still registered are the owner's to
// close before.
func (l *Loop) Run() {
	defer l.shut()
	for !l.stop {
		l.iterate()
	}
}

// Close releases a loop on which Run was never called, and will not be. After a
// Run it does nothing: that released the loop itself.
func (l *Loop) Close() {
	l.mu.Lock()
	closed := l.closed
	l.mu.Unlock()
	if !closed {
		l.shut()
	}
}

func (l *Loop) shut() {
	for {
		l.mu.Lock()
		mail := l.mail
		l.mail = nil
		l.closed = len(mail) == 0
		l.mu.Unlock()
		if len(mail) == 0 {
			break
		}
		l.deliver(mail)
	}
	unix.Close(l.epfd)
	unix.Close(l.wakefd)
	close(l.done)
}

func (l *Loop) deliver(mail []func()) {
	for _, fn := range mail {
		l.letter(fn)
	}
}

func (l *Loop) letter(fn func()) {
	defer l.Contain(nil)
	fn()
}

func (l *Loop) iterate() {
	l.mu.Lock()
	mail := l.mail
	l.mail = nil
	l.mu.Unlock()
	l.deliver(mail)
	if len(l.again) > 0 {
		turn := l.again
		l.again = l.spare[:0]
		for i, h := range turn {
			l.dispatch(h, 0)
			turn[i] = nil
		}
		l.spare = turn[:0]
	}

	l.now = int64(time.Since(l.base))
	l.wheel.advance(l.now, l.fire)

	timeout := 0
	if len(l.again) == 0 && !l.stop {
		timeout = -1
		if d := l.wheel.wait(l.now); d >= 0 {
			timeout = int((d + time.Millisecond - 1) / time.Millisecond)
		}
		// Announce the sleep before the last look at the mailbox: a Post that comes
		// after that look sees the flag and writes the eventfd.
		l.sleeping.Store(true)
		l.mu.Lock()
		if len(l.mail) > 0 {
			timeout = 0
		}
		l.mu.Unlock()
	}
	n := l.wait(timeout)
	l.sleeping.Store(false)
	// Also when only the time ran out: mail is delivered before the next reading.
	l.now = int64(time.Since(l.base))
	for i := range n {
		ev := &l.events[i]
		if ev.Fd == 0 {
			var b [8]byte
			_, _, _ = unix.RawSyscall(unix.SYS_READ, uintptr(l.wakefd), uintptr(unsafe.Pointer(&b)), 8)
			continue
		}
		s := &l.slots[ev.Fd]
		if s.h == nil || s.gen != uint32(ev.Pad) {
			continue // closed by an earlier handler of this batch
		}
		l.dispatch(s.h, Event(ev.Events))
	}
}

func (l *Loop) wait(timeout int) int {
	var r uintptr
	var e syscall.Errno
	if timeout == 0 {
		r, _, e = unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epfd), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), 0, 0, 0)
	} else {
		r, _, e = unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epfd), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), uintptr(timeout), 0, 0)
	}
	if e != 0 {
		return 0 // EINTR; anything else would be a broken loop and shows as a spin in the profile
	}
	return int(r)
}

func (l *Loop) fire(t *Timer) {
	defer l.Contain(t.H)
	t.H.Expired(t)
}

func (l *Loop) dispatch(h Handler, ev Event) {
	defer l.Contain(h)
	h.Ready(ev)
}

// Contain, deferred, turns a panic into the end of the connection h, if h is an
// Aborter. The loop does this for every callback of a Handler or TimerHandler; code
// that reaches a connection by Post does it itself.
func (l *Loop) Contain(h any) {
	p := recover()
	if p == nil {
		return
	}
	l.panics.Add(1)
	l.log.Error("data plane handler panicked; its connection is closed", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	if a, ok := h.(Aborter); ok {
		defer func() { _ = recover() }()
		a.Abort(fmt.Errorf("internal error: %v", p))
	}
}
