package rig

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long a program may take to end after SIGTERM.
const grace = 3 * time.Second

// Process is a program inside the rig. Its output goes to a file, the end of which is part of every error about it.
type Process struct {
	name string
	cmd  *exec.Cmd
	out  string // file
	done chan struct{}
	err  error // valid after done
	stop sync.Once
}

// Options of a program.
type Options struct {
	Env    []string  // added to the environment
	Stdin  io.Reader // nil: empty
	Stdout io.Writer // nil: the output file, where standard error goes too
}

// Start runs argv on one side. It must be called from a goroutine locked to a thread that lives as long as the
// harness: the kernel sends the program SIGTERM when the thread that started it ends.
func (r *Rig) Start(s Side, argv []string, o Options) (*Process, error) {
	name := filepath.Base(argv[0])
	out, err := os.CreateTemp(r.Dir, name+"-*.log")
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	defer out.Close()
	cmd := exec.Command("ip", append([]string{"netns", "exec", r.netns(s)}, argv...)...)
	cmd.Env = append(os.Environ(), o.Env...)
	cmd.Dir = r.Dir
	cmd.Stdin = o.Stdin
	cmd.Stderr = out
	cmd.Stdout = out
	if o.Stdout != nil {
		cmd.Stdout = o.Stdout
	}
	// A group of its own: an interrupt from the terminal must reach the harness only, which cleans up in order.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &Process{name: name, cmd: cmd, out: out.Name(), done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	r.procs = append(r.procs, p)
	return p, nil
}

// PID of the program: ip(8) replaces itself by it.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stop asks the program to end, insists after a grace period, and waits.
func (p *Process) Stop() {
	p.stop.Do(func() {
		unix.Kill(-p.PID(), unix.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(grace):
		}
		unix.Kill(-p.PID(), unix.SIGKILL) // also what it left in its group
		<-p.done
	})
}

// Output returns the end of what the program wrote.
func (p *Process) Output() string {
	b, err := os.ReadFile(p.out)
	if err != nil {
		return err.Error()
	}
	const most = 2000
	if len(b) > most {
		b = append([]byte("... "), b[len(b)-most:]...)
	}
	return string(bytes.TrimSpace(b))
}

// Failed describes an unexpected end or a failure to become ready.
func (p *Process) Failed(what string) error {
	state := "is running"
	select {
	case <-p.done:
		state = "ended"
		if p.err != nil {
			state = "ended: " + p.err.Error()
		}
	default:
	}
	text := p.Output()
	if text == "" {
		text = "(nothing)"
	}
	return fmt.Errorf("%s: %s (%s); it wrote: %s", p.name, what, state, strings.ReplaceAll(text, "\n", " | "))
}

// ErrNotReady says that a program did not start to listen in time.
var ErrNotReady = errors.New("not listening")

// WaitListening returns when something listens on all ports of one side, or p has ended, or d has passed.
func (r *Rig) WaitListening(s Side, p *Process, d time.Duration, ports ...uint16) error {
	for end := time.Now().Add(d); ; time.Sleep(5 * time.Millisecond) {
		missing := 0
		for _, port := range ports {
			ok, err := r.Listening(s, port)
			if err != nil {
				return err
			}
			if !ok {
				missing = int(port)
			}
		}
		if missing == 0 {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%w: %w on port %d", p.Failed("did not start"), ErrNotReady, missing)
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("%w: %w on port %d after %v", p.Failed("did not start"), ErrNotReady, missing, d)
		}
	}
}
