package loop

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, log io.Writer) *Loop {
	t.Helper()
	l, err := New(slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	t.Cleanup(l.Stop)
	return l
}

func (l *Loop) do(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	if err := l.Post(func() { defer close(done); f() }); err != nil {
		t.Fatal(err)
	}
	<-done
}

type handler struct {
	f       func(Event)
	aborted error
}

func (h *handler) Ready(ev Event)  { h.f(ev) }
func (h *handler) Abort(err error) { h.aborted = err }

type timerFunc func()

func (f timerFunc) Expired(*Timer) { f() }

func TestPostFromManyGoroutines(t *testing.T) {
	l := start(t, io.Discard)
	n := 0
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 200 {
				if err := l.Post(func() { n++ }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	l.do(t, func() {
		if n != 50*200 {
			t.Errorf("%d of %d ran", n, 50*200)
		}
	})
}

func TestPostAfterStop(t *testing.T) {
	l, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	go l.Run()
	l.Stop()
	if err := l.Post(func() {}); err != ErrClosed {
		t.Errorf("got %v", err)
	}
	l.Stop() // twice is fine
}

// A Post that meets a loop whose sleep just timed out must not see the time at
// which that sleep began: its deadlines would be over before they started.
func TestMailSeesTheTimeAfterASleep(t *testing.T) {
	l, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const sleep = 200 * time.Millisecond
	l.Arm(&Timer{H: timerFunc(func() {})}, sleep)
	l.iterate() // sleeps until the timer is due
	slept := int64(time.Since(l.base))
	if slept < int64(sleep) {
		t.Fatalf("slept %s only", time.Duration(slept))
	}
	var seen int64
	if err := l.Post(func() { seen = l.Now(); l.stop = true }); err != nil {
		t.Fatal(err)
	}
	l.iterate()
	if seen < slept-int64(20*time.Millisecond) {
		t.Errorf("mail ran with a clock %s behind", time.Duration(slept-seen))
	}
}

// What was posted before the loop ended runs, even beside Stop: somebody waits for it.
func TestPostedBesideStopRuns(t *testing.T) {
	for range 200 {
		l, err := New(slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		go l.Run()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 20 {
					ran := make(chan struct{})
					if l.Post(func() { close(ran) }) != nil {
						return
					}
					select {
					case <-ran:
					case <-time.After(5 * time.Second):
						t.Error("a posted function was lost")
						return
					}
				}
			})
		}
		l.Stop()
		wg.Wait()
		if t.Failed() {
			return
		}
	}
}

func TestCloseOfALoopThatNeverRan(t *testing.T) {
	before := descriptors(t)
	for range 10 {
		l, err := New(slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		l.Close()
		if err := l.Post(func() {}); err != ErrClosed {
			t.Errorf("post: %v", err)
		}
		l.Stop()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestTimerWakesSleepingLoop(t *testing.T) {
	l := start(t, io.Discard)
	fired := make(chan time.Time, 1)
	begin := time.Now()
	tm := &Timer{H: timerFunc(func() { fired <- time.Now() })}
	l.do(t, func() { l.Arm(tm, 100*time.Millisecond) })
	at := <-fired
	if d := at.Sub(begin); d < 100*time.Millisecond || d > 2*time.Second {
		t.Errorf("fired after %s", d)
	}
}

// A panic of one handler ends its connection and nothing else.
func TestPanicIsContained(t *testing.T) {
	var log bytes.Buffer
	l := start(t, &log)
	a, b := socketPair(t)
	h := &handler{f: func(Event) { panic("boom") }}
	s := Sock{FD: a}
	l.do(t, func() {
		if err := s.Watch(l, h); err != nil {
			t.Error(err)
		}
	})
	deadline := time.Now().Add(5 * time.Second)
	for l.Panics() == 0 && time.Now().Before(deadline) {
		_, _ = unix.Write(b, []byte{1})
		time.Sleep(time.Millisecond)
	}
	l.do(t, func() {
		if h.aborted == nil {
			t.Error("the handler was not aborted")
		}
		s.Close(l)
	})
	if !bytes.Contains(log.Bytes(), []byte("boom")) {
		t.Error("the panic was not logged")
	}
}

// A socket closed by one handler of a batch must not deliver its own pending event,
// not even when its slot was given to another socket at once.
func TestStaleEventIsDropped(t *testing.T) {
	l, err := New(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	a, b := socketPair(t)
	c, d := socketPair(t)
	_, _ = unix.Write(b, []byte{1})
	_, _ = unix.Write(d, []byte{1})
	s1, s2, s3 := Sock{FD: a}, Sock{FD: c}, Sock{FD: -1}
	calls := map[string]int{}
	h3 := &handler{f: func(Event) { calls["third"]++ }}
	closeOther := func(name string, other *Sock) func(Event) {
		return func(Event) {
			calls[name]++
			if other.FD >= 0 {
				tok := other.tok
				other.Close(l)
				e, f := socketPair(t)
				_ = f
				s3 = Sock{FD: e}
				if err := s3.Watch(l, h3); err != nil || s3.tok.idx != tok.idx || s3.tok.gen == tok.gen {
					t.Errorf("slot %v reused as %v: %v", tok, s3.tok, err)
				}
			}
		}
	}
	if err := s1.Watch(l, &handler{f: closeOther("first", &s2)}); err != nil {
		t.Fatal(err)
	}
	if err := s2.Watch(l, &handler{f: closeOther("second", &s1)}); err != nil {
		t.Fatal(err)
	}
	l.iterate()
	if calls["first"]+calls["second"] != 1 || calls["third"] != 0 {
		t.Errorf("calls %v", calls)
	}
	s1.Close(l)
	s2.Close(l)
	s3.Close(l)
	go l.Run()
	l.Stop()
}

func socketPair(t *testing.T) (int, int) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[1]) })
	return p[0], p[1]
}

// Out of descriptors: waiting connections are closed at once, the loop pauses
// instead of spinning, and it serves again when descriptors are back.
func TestAcceptorSurvivesDescriptorShortage(t *testing.T) {
	l := start(t, io.Discard)
	fd, err := Listen(netip.MustParseAddrPort("127.0.0.1:0"), ListenOptions{Backlog: 128})
	if err != nil {
		t.Fatal(err)
	}
	sa, _ := unix.Getsockname(fd)
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(sa.(*unix.SockaddrInet4).Port))
	var mu sync.Mutex
	accepted, shed := 0, 0
	a := &Acceptor{
		Accepted: func(fd int, peer netip.AddrPort) {
			mu.Lock()
			accepted++
			mu.Unlock()
			if !peer.Addr().IsLoopback() {
				t.Errorf("peer %s", peer)
			}
			unix.Close(fd)
		},
		Shed: func(error) { mu.Lock(); shed++; mu.Unlock() },
	}
	l.do(t, func() {
		if err := a.Serve(l, fd); err != nil {
			t.Error(err)
		}
	})

	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	conns := make([]net.Conn, 3)
	for i := range conns { // the clients' own descriptors come first
		if conns[i], err = net.Dial("tcp", addr); err != nil {
			t.Fatal(err)
		}
	}
	wait := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); ; {
			mu.Lock()
			done := ok()
			mu.Unlock()
			if done {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: accepted %d, shed %d", what, accepted, shed)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	wait("before", func() bool { return accepted == 3 })
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(client)
	// Fill every number below the highest one in use, then forbid more.
	var fill []*os.File
	for {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		fill = append(fill, f)
		if int(f.Fd()) > client+20 {
			break
		}
	}
	top := fill[len(fill)-1].Fd()
	low := old
	low.Cur = uint64(top) + 1
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	_ = unix.Connect(client, sa)
	wait("short of descriptors", func() bool { return shed > 0 })
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	for _, f := range fill {
		f.Close()
	}
	mu.Lock()
	before := accepted
	if shed > 50 {
		t.Errorf("shed %d times: the loop spins", shed)
	}
	mu.Unlock()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	conns = append(conns, c)
	wait("after", func() bool { return accepted > before })
	l.do(t, a.Close)
	for _, c := range conns {
		c.Close()
	}
}
