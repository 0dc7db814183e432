package cpu

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

const stat = `cpu  14776 3 6093 416855 1144 7 350 44 0 0
cpu0 6268 0 2373 210751 58 0 144 23 0 0
cpu1 8508 0 3720 206104 1086 0 205 21 0 0
intr 1 2 3
ctxt 99
`

func TestParseMachine(t *testing.T) {
	got, err := ParseMachine([]byte(stat))
	want := Machine{Idle: (416855 + 1144) * tick, Steal: 44 * tick, CPUs: 2}
	if err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, s := range []string{"", "cpu 1 2 3\ncpu0 1 2 3\n", "cpu 1 2 3 x 5 6 7 8 9\ncpu0\n", "intr 4\n", "cpu  1 2 3 4 5 6 7 8 9\n"} {
		if _, err := ParseMachine([]byte(s)); !errors.Is(err, ErrFormat) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestParseProcess(t *testing.T) {
	line := "42 (evil) S (x) S 7 42 42 0 -1 4194560 900 800 0 0 123 45 6 1 20 0 3 0 987654 1000000 250 18446744073709551615 1 1 0"
	got, err := ParseProcess([]byte(line))
	want := Process{PID: 42, Parent: 7, User: 1230 * time.Millisecond, System: 450 * time.Millisecond, Reaped: 70 * time.Millisecond, Start: 987654}
	if err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, s := range []string{"", "42", "42 (x", ") 42 (", "42 (x) S 7 42", "42 (x) S z 42 42 0 -1 4194560 900 800 0 0 123 45 6 1 20 0 3 0 987654 1"} {
		if _, err := ParseProcess([]byte(s)); !errors.Is(err, ErrFormat) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestReadOwnProcess(t *testing.T) {
	p, err := ReadProcess("/proc", os.Getpid())
	if err != nil || p.PID != os.Getpid() || p.Parent != os.Getppid() || p.Start == 0 {
		t.Errorf("got %+v, %v", p, err)
	}
	if _, err := ReadProcess(t.TempDir(), 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing process: %v", err)
	}
}

// A machine with a harness (10) that has a client (11), a backend (12) and a gateway (13) with a worker (14), next to
// a shell (20) whose compiler (21) ends in the window and a browser (30) that starts in it.
func TestBetween(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	p := func(pid, parent, user, system, reaped int) Process {
		return Process{PID: pid, Parent: parent, User: ms(user), System: ms(system), Reaped: ms(reaped), Start: uint64(pid)}
	}
	index := func(ps ...Process) map[int]Process {
		m := map[int]Process{}
		for _, p := range ps {
			m[p.PID] = p
		}
		return m
	}
	t0 := time.Unix(1000, 0)
	a := Sample{At: t0, Machine: Machine{Idle: 50 * time.Second, Steal: time.Second, CPUs: 2}, procs: index(
		p(1, 0, 900, 0, 100), p(2, 0, 0, 0, 0), p(3, 2, 0, 700, 0), p(10, 1, 10, 10, 0),
		p(11, 10, 100, 100, 0), p(12, 10, 200, 0, 0), p(13, 10, 50, 0, 0), p(14, 13, 1000, 500, 0),
		p(20, 1, 10, 0, 0), p(21, 20, 300, 0, 0))}
	b := Sample{At: t0.Add(2 * time.Second), Machine: Machine{Idle: 51 * time.Second, Steal: 1200 * time.Millisecond, CPUs: 2}, procs: index(
		p(1, 0, 900, 0, 100), p(2, 0, 0, 0, 0), p(3, 2, 0, 900, 0), p(10, 1, 15, 10, 0),
		p(11, 10, 300, 200, 0), p(12, 10, 200, 400, 0), p(13, 10, 50, 0, 0), p(14, 13, 1600, 900, 0),
		p(20, 1, 10, 0, 450), p(30, 1, 20, 30, 0))}
	got := Between(a, b, Groups{Bench: 10, Gateway: 13, Client: 11, Backend: 12})
	want := Usage{
		Wall: 2, Machine: 2*2 - 1 - 0.2, Steal: 0.2, CPUs: 2,
		Foreign:     0.15 + 0.05, // compiler's rest, which its parent inherited, and the browser
		GatewayUser: 0.6, GatewaySystem: 0.4, Client: 0.3, Backend: 0.4,
	}
	for _, f := range []struct {
		name      string
		got, want float64
	}{
		{"wall", got.Wall, want.Wall}, {"machine", got.Machine, want.Machine}, {"steal", got.Steal, want.Steal},
		{"foreign", got.Foreign, want.Foreign}, {"gateway user", got.GatewayUser, want.GatewayUser},
		{"gateway system", got.GatewaySystem, want.GatewaySystem}, {"client", got.Client, want.Client},
		{"backend", got.Backend, want.Backend}, {"gateway", got.Gateway(), 1}, {"bench", got.Bench(), 2.6},
		{"foreign share", got.ForeignShare(), 0.1},
	} {
		if d := f.got - f.want; d > 1e-9 || d < -1e-9 {
			t.Errorf("%s: got %v, want %v", f.name, f.got, f.want)
		}
	}
}

// A window in which this process does nothing but work must be charged to it.
func TestWindowOfThisMachine(t *testing.T) {
	a, err := Begin("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 150*time.Millisecond; {
	}
	b, err := End("/proc")
	if err != nil {
		t.Fatal(err)
	}
	u := Between(a, b, Groups{Bench: os.Getpid(), Client: os.Getpid()})
	if u.Wall < 0.15 || u.CPUs < 1 || u.Machine > u.Wall*float64(u.CPUs)+0.02 {
		t.Errorf("implausible: %+v", u)
	}
	if u.Client == 0 || u.Client > u.Wall*float64(u.CPUs)+0.02 {
		t.Errorf("busy process not charged: %+v", u)
	}
}

func TestMemory(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("meminfo", "MemTotal:       1000 kB\nMemFree:         300 kB\nMemAvailable:    500 kB\nBuffers:          10 kB\nCached:           90 kB\nSwapCached:        5 kB\nSlab:             77 kB\n")
	for _, p := range []struct{ pid, parent, pss int }{{5, 1, 100}, {6, 5, 40}, {7, 1, 9}, {8, 4, 3}, {4, 1, 2}} {
		d := strconv.Itoa(p.pid)
		write(d+"/stat", d+" (x) S "+strconv.Itoa(p.parent)+" 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 0 0")
		write(d+"/smaps_rollup", "00400000-7fff ---p 00000000 00:00 0 [rollup]\nRss: 500 kB\nPss:  "+strconv.Itoa(p.pss)+" kB\nPss_Dirty: 1 kB\n")
	}
	got, err := ReadMemory(root, Groups{Bench: 4, Gateway: 5})
	want := Memory{Used: 600, Slab: 77, RSS: 140, Foreign: 9}
	if err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, s := range []string{"", "MemTotal: 5 kB\n", "MemTotal: x kB\nMemFree: 1 kB\nBuffers: 1 kB\nCached: 1 kB\nSlab: 1 kB\n"} {
		if _, err := ParseMeminfo([]byte(s)); !errors.Is(err, ErrFormat) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if _, err := ParsePss([]byte("Rss: 5 kB\n")); !errors.Is(err, ErrFormat) {
		t.Errorf("rollup without Pss: %v", err)
	}
}
