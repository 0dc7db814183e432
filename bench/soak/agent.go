package soak

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// Commands of the agents, after the program's name and "soak-agent".
const (
	clientCommand = "client"
	appCommand    = "app"
)

// said is one line of an agent.
type said struct {
	Step    string   `json:"step,omitempty"` // where the client or app is
	Side    *Side    `json:"side,omitempty"` // the app's book
	Outcome *Outcome `json:"outcome,omitempty"`
	Error   string   `json:"error,omitempty"`
}

// Agent runs one in this process: lines on in and out.
func Agent(command string, in io.Reader, out io.Writer) error {
	lines := bufio.NewReader(in)
	enc := json.NewEncoder(out)
	switch command {
	case appCommand:
		a, err := startApp(netip.IPv4Unspecified())
		if err != nil {
			return errors.Join(err, enc.Encode(said{Error: err.Error()}))
		}
		defer a.close()
		if err := enc.Encode(said{Step: "listening"}); err != nil {
			return err
		}
		for released := false; ; {
			line, err := lines.ReadString('\n')
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			switch line {
			case "release\n":
				if !released {
					close(a.release)
				}
				released = true
				err = enc.Encode(said{Step: "released"})
			case "report\n":
				s := a.book.side()
				err = enc.Encode(said{Side: &s})
			default:
				err = fmt.Errorf("unknown command %q", line)
			}
			if err != nil {
				return err
			}
		}
	case clientCommand:
		var s Spec
		text, err := lines.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(text, &s)
		}
		if err != nil {
			return fmt.Errorf("reading what to do: %w", err)
		}
		c, err := newClient(s)
		if err != nil {
			return errors.Join(err, enc.Encode(said{Error: err.Error()}))
		}
		step := func(name string) error {
			if err := enc.Encode(said{Step: name}); err != nil {
				return err
			}
			_, err := lines.ReadString('\n')
			return err
		}
		var o Outcome
		switch s.What {
		case "mix":
			o, err = c.mix(func() error { return step("up") })
		case "idle":
			o, err = c.idle(step)
		case "pressure":
			o, err = c.pressure(step)
		default:
			err = fmt.Errorf("unknown load %q", s.What)
		}
		last := said{Outcome: &o}
		if err != nil {
			last.Error = err.Error()
		}
		return enc.Encode(last)
	}
	return fmt.Errorf("unknown agent %q", command)
}

// agent is the harness's end of one.
type agent struct {
	proc  *rig.Process
	in    *os.File
	lines chan said
}

func startAgent(r *rig.Rig, side rig.Side, exe, command string) (*agent, error) {
	fail := func(err error) (*agent, error) { return nil, fmt.Errorf("starting the %s: %w", command, err) }
	inR, inW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer inR.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		inW.Close()
		return fail(err)
	}
	defer outW.Close()
	p, err := r.Start(side, []string{exe, "soak-agent", command}, rig.Options{Stdin: inR, Stdout: outW})
	if err != nil {
		inW.Close()
		outR.Close()
		return fail(err)
	}
	a := &agent{proc: p, in: inW, lines: make(chan said, 4)}
	go func() {
		defer outR.Close()
		defer close(a.lines)
		for dec := json.NewDecoder(outR); ; {
			var l said
			if dec.Decode(&l) != nil {
				return
			}
			a.lines <- l
		}
	}()
	return a, nil
}

// say sends a line.
func (a *agent) say(line string) error {
	if _, err := io.WriteString(a.in, line+"\n"); err != nil {
		return fmt.Errorf("%w: %w", a.proc.Failed("does not listen"), err)
	}
	return nil
}

// next waits for a line of the agent. Its error is in the line if there is an Outcome, too.
func (a *agent) next(ctx context.Context) (said, error) {
	select {
	case l, ok := <-a.lines:
		if !ok {
			return said{}, a.proc.Failed("stopped answering")
		}
		if l.Error != "" && l.Outcome == nil {
			return l, errors.New(l.Error)
		}
		return l, nil
	case <-ctx.Done():
		return said{}, fmt.Errorf("%w; %w", context.Cause(ctx), a.proc.Failed("no answer"))
	}
}

// until waits for a step.
func (a *agent) until(ctx context.Context, step string) error {
	l, err := a.next(ctx)
	if err == nil && l.Step != step {
		err = fmt.Errorf("waiting for %q, got %q", step, l.Step)
		if l.Outcome != nil {
			err = fmt.Errorf("%w: it gave up: %s %q", err, l.Error, l.Outcome.Errors)
		}
	}
	return err
}

// close ends the agent.
func (a *agent) close() {
	a.in.Close()
	go func() {
		for range a.lines { // so that its last words do not block it
		}
	}()
	select {
	case <-a.proc.Done():
	case <-time.After(time.Second):
		a.proc.Stop()
	}
}
