package dev

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/ratls"
)

// environmentMark is in the environment of every process of an environment, with
// the state directory as its value: it finds processes whose record is lost.
const environmentMark = "DSTACK_DEV_STATE"

// process is a program to keep running.
type process struct {
	name string // of log and record
	argv []string
	// namespace is where it runs; empty for that of this machine.
	namespace string
	// inputs are files whose change makes a restart necessary.
	inputs []string
}

// record is what is remembered of a running process.
type record struct {
	PID int `json:"pid"`
	// Boot and Start tell a process from a later one with the same number.
	Boot  string `json:"boot"`
	Start uint64 `json:"start"`
	// Fingerprint changes with program, arguments and inputs.
	Fingerprint string    `json:"fingerprint"`
	Argv        []string  `json:"argv"`
	Started     time.Time `json:"started"`
}

// alive says whether the very process is there and not a zombie.
func (r *record) alive() bool {
	boot, err := bootID()
	if err != nil || boot != r.Boot {
		return false
	}
	start, running, err := procStart(r.PID)
	return err == nil && running && start == r.Start
}

func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

// procStart reads the start time in ticks since boot, and whether the process
// still runs.
func procStart(pid int) (start uint64, running bool, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false, err
	}
	return parseStat(text)
}

// parseStat reads fields 3 and 22 of proc_pid_stat(5). The name before them may
// hold anything, also parentheses and spaces.
func parseStat(text []byte) (start uint64, running bool, err error) {
	end := bytes.LastIndexByte(text, ')')
	if end < 0 {
		return 0, false, errors.New("/proc/pid/stat: no process name")
	}
	fields := bytes.Fields(text[end+1:])
	if len(fields) < 20 {
		return 0, false, fmt.Errorf("/proc/pid/stat: %d fields after the name", len(fields))
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return start, fields[0][0] != 'Z' && fields[0][0] != 'X', err
}

// readRecord is nil without an error if there is none.
func (s state) readRecord(name string) (*record, error) {
	text, err := os.ReadFile(s.record(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the record of process %s: %w", name, err)
	}
	r := new(record)
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("read the record of process %s: %w", name, err)
	}
	return r, nil
}

// fingerprint covers the program (by size and time, it is large), the arguments,
// and the inputs' content.
func (p *process) fingerprint() (string, error) {
	h := sha256.New()
	info, err := os.Stat(p.argv[0])
	if err != nil {
		return "", fmt.Errorf("process %s: %w", p.name, err)
	}
	fmt.Fprintf(h, "%d %d %q %q\n", info.Size(), info.ModTime().UnixNano(), p.argv, p.namespace)
	for _, path := range p.inputs {
		text, err := os.ReadFile(path)
		if err != nil {
			return "", fmt.Errorf("process %s: %w", p.name, err)
		}
		fmt.Fprintf(h, "%s %d\n", path, len(text))
		h.Write(text)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// running is a process that was found or started.
type running struct {
	record
	// fresh says that it was started just now.
	fresh bool
	// died is closed when it ends; exit is valid then. A process that was found
	// is watched by its number.
	died chan struct{}
	exit error
}

// ensure starts the process unless the same is running already. One with another
// program, configuration or certificate is stopped first.
func (s state) ensure(p process) (*running, error) {
	print, err := p.fingerprint()
	if err != nil {
		return nil, err
	}
	old, err := s.readRecord(p.name)
	if err != nil {
		return nil, err
	}
	if old != nil && old.alive() {
		if old.Fingerprint == print {
			r := &running{record: *old, died: make(chan struct{})}
			go func() {
				for r.alive() {
					time.Sleep(100 * time.Millisecond)
				}
				r.exit = errors.New("it ended")
				close(r.died)
			}()
			return r, nil
		}
		if err := old.stop(stopGrace); err != nil {
			return nil, fmt.Errorf("stop %s: %w", p.name, err)
		}
	}
	return s.start(p, print)
}

func (s state) start(p process, fingerprint string) (*running, error) {
	path := s.log(p.name)
	if err := os.Rename(path, path+".1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("put the old log of %s aside: %w", p.name, err)
	}
	log, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", p.name, err)
	}
	defer log.Close()
	cmd := exec.Command(p.argv[0], p.argv[1:]...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(inherited(), environmentMark+"="+s.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := inNamespace(p.namespace, cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	r := &running{fresh: true, died: make(chan struct{})}
	go func() {
		if r.exit = cmd.Wait(); r.exit == nil {
			r.exit = errors.New("it ended with status 0")
		}
		close(r.died)
	}()
	boot, err := bootID()
	if err == nil {
		r.Start, _, err = procStart(cmd.Process.Pid)
	}
	if err != nil {
		// It has ended already, or /proc is not there: either way it cannot be
		// found again.
		err = errors.Join(err, cmd.Process.Kill())
		<-r.died
		return nil, fmt.Errorf("start %s: %w: %w\n%s", p.name, r.exit, err, s.tail(p.name, 15))
	}
	r.PID, r.Boot, r.Fingerprint, r.Argv, r.Started = cmd.Process.Pid, boot, fingerprint, p.argv, time.Now()
	text, err := json.MarshalIndent(&r.record, "", "  ")
	if err != nil {
		return nil, err
	}
	return r, ratls.WriteFile(s.record(p.name), text)
}

// inherited is what processes get of this environment.
func inherited() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"}
	for _, name := range []string{"RUST_LOG", "GOCOVERDIR", "GOTRACEBACK"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

const stopGrace = 10 * time.Second

// stop ends the process: it is asked, then killed with all of its session.
func (r *record) stop(grace time.Duration) error {
	if !r.alive() {
		return nil
	}
	if err := unix.Kill(r.PID, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for deadline := time.Now().Add(grace); r.alive() && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if !r.alive() {
		return nil
	}
	if err := unix.Kill(-r.PID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return awaitEnd([]int{r.PID})
}

// tail is the end of a process's log.
func (s state) tail(name string, lines int) string {
	text, err := os.ReadFile(s.log(name))
	if err != nil {
		return fmt.Sprintf("(its log cannot be read: %v)", err)
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return fmt.Sprintf("(its log %s is empty)", s.log(name))
	}
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return fmt.Sprintf("last lines of %s:\n    %s", s.log(name), strings.Join(all, "\n    "))
}

// strays finds all processes of the environment: those that carry its mark, and
// everything in the namespaces of its CVMs.
func (s state) strays(namespaces []string) ([]int, error) {
	found, err := processes(s.marked)
	for _, ns := range namespaces {
		if err != nil {
			break
		}
		var inside []int
		inside, err = inNamespaceOf(ns)
		found = append(found, inside...)
	}
	return found, err
}

// inNamespaceOf lists the processes in a named network namespace, none if there
// is no such namespace.
func inNamespaceOf(name string) ([]int, error) {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(namespaceDir, name), &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, nil
		}
		return nil, fmt.Errorf("look up network namespace %s: %w", name, err)
	}
	want := fmt.Sprintf("net:[%d]", st.Ino)
	return processes(func(pid int) bool {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		return err == nil && ns == want
	})
}

// processes lists those that match, but for zombies and this one.
func processes(match func(pid int) bool) ([]int, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if _, running, err := procStart(pid); err == nil && running && match(pid) {
			found = append(found, pid)
		}
	}
	return found, nil
}

// marked says whether the process was started for this environment.
func (s state) marked(pid int) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return false
	}
	defer f.Close()
	r := bufio.NewReader(io.LimitReader(f, 1<<20))
	for {
		v, err := r.ReadString(0)
		if strings.TrimSuffix(v, "\x00") == environmentMark+"="+s.dir {
			return true
		}
		if err != nil {
			return false
		}
	}
}

// awaitEnd waits until none of the processes runs.
func awaitEnd(pids []int) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		pids = slices.DeleteFunc(pids, func(pid int) bool {
			_, running, err := procStart(pid)
			return err != nil || !running
		})
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end, not even when killed", pids)
		}
	}
}

// killAll kills the processes at once.
func killAll(pids []int) error {
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", pid, err)
		}
	}
	return awaitEnd(pids)
}
