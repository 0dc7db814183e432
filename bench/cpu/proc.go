package cpu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of /proc's CPU times; USER_HZ is 100 on every Linux architecture Go runs on.
const tick = 10 * time.Millisecond

// ErrFormat says that a file of /proc does not look as proc(5) describes it.
var ErrFormat = errors.New("unexpected format")

// Machine is what the first line of /proc/stat says.
type Machine struct {
	Idle  time.Duration // idle and iowait, all processors together
	Steal time.Duration // taken by the hypervisor
	CPUs  int
}

// ParseMachine reads the text of /proc/stat (proc(5)).
func ParseMachine(b []byte) (Machine, error) {
	var m Machine
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, "cpu") {
			break
		}
		f := strings.Fields(line)
		if f[0] != "cpu" {
			m.CPUs++
			continue
		}
		if len(f) < 9 {
			return Machine{}, fmt.Errorf("/proc/stat: first line has %d columns, at least 9 expected: %w", len(f), ErrFormat)
		}
		for _, c := range []struct {
			col int
			to  *time.Duration
		}{{4, &m.Idle}, {5, &m.Idle}, {8, &m.Steal}} {
			n, err := strconv.ParseUint(f[c.col], 10, 62)
			if err != nil {
				return Machine{}, fmt.Errorf("/proc/stat: column %d %q: %w", c.col, f[c.col], ErrFormat)
			}
			*c.to += time.Duration(n) * tick
		}
	}
	if m.CPUs == 0 {
		return Machine{}, fmt.Errorf("/proc/stat: no cpu lines: %w", ErrFormat)
	}
	return m, nil
}

// Process is what /proc/PID/stat says about one process.
type Process struct {
	PID, Parent  int
	User, System time.Duration // its own threads
	Reaped       time.Duration // user and system time of children that have ended and were waited for
	Start        uint64        // start time in ticks since boot; with PID it names a process uniquely
}

// ParseProcess reads the text of /proc/PID/stat (proc(5)). The command name may contain anything, so columns are
// counted from the last closing parenthesis.
func ParseProcess(b []byte) (Process, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 1 || end < open {
		return Process{}, fmt.Errorf("process line %q: no command in parentheses: %w", b, ErrFormat)
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 20 {
		return Process{}, fmt.Errorf("process line %q: %d columns after the command, at least 20 expected: %w", b, len(f), ErrFormat)
	}
	var n [7]uint64
	text := [7]string{strings.TrimSpace(string(b[:open])), f[1], f[11], f[12], f[13], f[14], f[19]}
	for i, s := range text {
		v, err := strconv.ParseUint(s, 10, 62)
		if err != nil {
			return Process{}, fmt.Errorf("process line %q: %q is not a number: %w", b, s, ErrFormat)
		}
		n[i] = v
	}
	return Process{
		PID: int(n[0]), Parent: int(n[1]),
		User: time.Duration(n[2]) * tick, System: time.Duration(n[3]) * tick,
		Reaped: time.Duration(n[4]+n[5]) * tick,
		Start:  n[6],
	}, nil
}

// ReadProcess reads one process of the proc file system mounted at root. Errors wrap fs.ErrNotExist for a process
// that has ended.
func ReadProcess(root string, pid int) (Process, error) {
	b, err := os.ReadFile(filepath.Join(root, strconv.Itoa(pid), "stat"))
	if err != nil {
		return Process{}, fmt.Errorf("reading CPU time of process %d: %w", pid, err)
	}
	return ParseProcess(b)
}

// ReadProcesses reads all processes. One that ends meanwhile is left out.
func ReadProcesses(root string) (map[int]Process, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	all := make(map[int]Process, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		p, err := ReadProcess(root, pid)
		switch {
		case errors.Is(err, ErrFormat):
			return nil, err
		case err == nil:
			all[pid] = p
		}
	}
	return all, nil
}
