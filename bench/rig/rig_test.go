package rig

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/cpu"
)

func newRig(t *testing.T) *Rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	runtime.LockOSThread() // see Start
	t.Cleanup(runtime.UnlockOSThread)
	h := &Host{Log: slog.New(slog.DiscardHandler)}
	r, err := h.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		for _, s := range []Side{Client, Gateway, Backend} {
			if _, err := os.Lstat(filepath.Join(netnsDir, r.netns(s))); err == nil {
				t.Errorf("namespace of the %s survives", s)
			}
		}
		if _, err := os.Lstat(r.Dir); err == nil {
			t.Error("directory survives")
		}
	})
	return r
}

func TestRoutes(t *testing.T) {
	r := newRig(t)
	var l net.Listener
	err := r.In(Backend, func() (err error) {
		l, err = net.Listen("tcp4", ":443")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	// The backend's own address, and two of later instances.
	for _, ip := range []string{BackendAddr.Addr().String(), "10.99.0.3", "10.99.0.77", "10.99.1.1", "10.99.200.9"} {
		c, err := r.Dial(Client, ip+":443")
		if err != nil {
			t.Errorf("client to %s: %v", ip, err)
			continue
		}
		if got := c.LocalAddr().(*net.TCPAddr).IP.String(); got != ClientAddr.Addr().String() {
			t.Errorf("client's address is %s", got)
		}
		c.Close()
		if c, err = r.Dial(Gateway, ip+":443"); err != nil {
			t.Errorf("gateway to %s: %v", ip, err)
		} else {
			c.Close()
		}
	}
	for side, want := range map[Side]bool{Backend: true, Gateway: false} {
		if got, err := r.Listening(side, 443); got != want || err != nil {
			t.Errorf("Listening(%s) = %v, %v", side, got, err)
		}
	}
	for _, s := range Sysctls {
		if got, err := r.Sysctl(Client, s.Name); got != s.Value && !s.Wish || err != nil {
			t.Errorf("%s = %q, %v", s.Name, got, err)
		}
	}
	if n, err := r.Tracked(Gateway); n != 0 || err != nil {
		t.Errorf("%d connections tracked without a rule that asks for it, %v", n, err)
	}
}

func TestProcess(t *testing.T) {
	r := newRig(t)
	p, err := r.Start(Gateway, []string{"sh", "-c", "echo started; trap '' TERM; sleep 60 & wait"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); p.Output() == "" && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	// The process is the program itself, a child of this one.
	own, err := cpu.ReadProcess("/proc", p.PID())
	if err != nil || own.Parent != os.Getpid() {
		t.Errorf("process %+v, %v", own, err)
	}
	err = r.WaitListening(Gateway, p, 20*time.Millisecond, 443)
	if err == nil || !strings.Contains(err.Error(), "started") || !strings.Contains(err.Error(), "is running") {
		t.Errorf("a program that does not listen: %v", err)
	}
	begun := time.Now()
	p.Stop()
	if took := time.Since(begun); took < grace || took > grace+3*time.Second {
		t.Errorf("a program that ignores SIGTERM was stopped after %v", took)
	}
	p, err = r.Start(Gateway, []string{"sh", "-c", "echo oh no; exit 3"}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	err = r.WaitListening(Gateway, p, 5*time.Second, 443)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "oh no") {
		t.Errorf("a program that ends: %v", err)
	}
}

func TestSweep(t *testing.T) {
	r := newRig(t)
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	// A rig whose harness had this process's id but started at another time, and one of this very process.
	dead, alive := fmt.Sprintf("%s%d-1-1", prefix, os.Getpid()), filepath.Base(r.Dir)
	for _, dir := range []string{dead, alive, "else"} {
		if err := os.Mkdir(filepath.Join(tmp, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := ip("", "netns", "add", dead+"-gateway"); err != nil {
		t.Fatal(err)
	}
	left, err := os.StartProcess("/bin/sleep", []string{"sleep", "60"}, &os.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	left.Kill()
	left.Wait()
	log := new(strings.Builder)
	h := &Host{Log: slog.New(slog.NewTextHandler(log, nil))}
	if err := h.Sweep(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		filepath.Join(tmp, dead):                  false,
		filepath.Join(tmp, alive):                 true,
		filepath.Join(tmp, "else"):                true,
		filepath.Join(netnsDir, dead+"-gateway"):  false,
		filepath.Join(netnsDir, r.netns(Gateway)): true,
	} {
		if _, err := os.Lstat(path); (err == nil) != want {
			t.Errorf("%s exists: %v", path, err == nil)
		}
	}
	if !strings.Contains(log.String(), dead) {
		t.Errorf("nothing said about %s: %s", dead, log)
	}
}

// Programs of a dead rig end with it.
func TestSweepEndsPrograms(t *testing.T) {
	r := newRig(t)
	dead := fmt.Sprintf("%s%d-1-2", prefix, os.Getpid())
	if err := ip("", "netns", "add", dead+"-client"); err != nil {
		t.Fatal(err)
	}
	old := r.name
	r.name = dead
	p, err := r.Start(Client, []string{"sleep", "60"}, Options{})
	r.name = old
	if err != nil {
		t.Fatal(err)
	}
	// ip(8) enters the namespace a moment after it was started.
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PID())); string(b) == "sleep\n" {
			break
		}
	}
	if err := (&Host{Log: slog.New(slog.DiscardHandler)}).Sweep(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(5 * time.Second):
		t.Error("the program survives")
	}
}

func TestAbandoned(t *testing.T) {
	own, err := owner()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		own + "-1-client": false,
		fmt.Sprintf("%s%d-1-1-client", prefix, os.Getpid()): true,
		prefix + "999999999-5-1-client":                     true,
		prefix + "x-5-1-client":                             false,
		prefix + "999999999-5":                              false,
		"blue":                                              false,
	} {
		if got := abandoned(name); got != want {
			t.Errorf("abandoned(%q) = %v", name, got)
		}
	}
}

func TestListens(t *testing.T) {
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F4B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 10
   1: 0201620A:01BB 0202620A:C350 01 00000000:00000000 00:00000000 00000000     0        0 11
`
	for port, want := range map[uint16]bool{8011: true, 443: false, 50000: false} {
		if got := listens(text, port); got != want {
			t.Errorf("port %d: %v", port, got)
		}
	}
}
