package agent

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

	"github.com/dstack-gw/dstack-gw/bench/backend"
	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// Commands an agent is started with, after the program's name and "agent".
const (
	ClientCommand  = "client"
	BackendCommand = "backend"
)

// line is what an agent writes.
type line struct {
	Ready  bool         `json:"ready,omitempty"`  // backend: listening
	Window *string      `json:"window,omitempty"` // client: about to open this window; it waits for a line
	Result *load.Result `json:"result,omitempty"`
	Error  string       `json:"error,omitempty"`
	Bye    bool         `json:"bye,omitempty"` // the last line
}

// Main runs an agent in this process: the command, then JSON lines on in and out.
func Main(ctx context.Context, command string, in io.Reader, out io.Writer) error {
	enc := json.NewEncoder(out)
	switch command {
	case BackendCommand:
		// On every address: those of instances registered later lead here too.
		srv, err := backend.Start(backend.On(netip.IPv4Unspecified()))
		if err != nil {
			return errors.Join(err, enc.Encode(line{Error: err.Error(), Bye: true}))
		}
		if err := enc.Encode(line{Ready: true}); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, in); err != nil {
			return err
		}
		srv.Close()
		last := line{Bye: true}
		if err := srv.Errors(); err != nil {
			last.Error = err.Error()
		}
		return enc.Encode(last)
	case ClientCommand:
		r := bufio.NewReader(in)
		var spec load.Spec
		text, err := r.ReadBytes('\n')
		if err == nil {
			err = json.Unmarshal(text, &spec)
		}
		if err != nil {
			return fmt.Errorf("reading the case: %w", err)
		}
		spec.Groups.Client = os.Getpid()
		res, err := load.Run(ctx, spec, func(window string) error {
			if err := enc.Encode(line{Window: &window}); err != nil {
				return err
			}
			_, err := r.ReadString('\n')
			return err
		})
		if err != nil {
			return enc.Encode(line{Error: err.Error(), Bye: true})
		}
		return enc.Encode(line{Result: &res, Bye: true})
	}
	return fmt.Errorf("unknown agent %q", command)
}

// agent is the harness's end of one.
type agent struct {
	proc  *rig.Process
	in    *os.File // write end of its standard input
	lines chan line
	err   error // why lines ended, valid after that
}

func start(r *rig.Rig, side rig.Side, exe, command string) (*agent, error) {
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
	p, err := r.Start(side, []string{exe, "agent", command}, rig.Options{Stdin: inR, Stdout: outW})
	if err != nil {
		inW.Close()
		outR.Close()
		return fail(err)
	}
	a := &agent{proc: p, in: inW, lines: make(chan line, 1)}
	go func() {
		defer outR.Close()
		defer close(a.lines)
		for dec := json.NewDecoder(outR); ; {
			var l line
			if err := dec.Decode(&l); err != nil {
				a.err = err
				return
			}
			a.lines <- l
		}
	}()
	return a, nil
}

// next waits for the agent's next line.
func (a *agent) next(ctx context.Context) (line, error) {
	select {
	case l, ok := <-a.lines:
		if !ok {
			return line{}, a.proc.Failed(fmt.Sprintf("stopped answering (%v)", a.err))
		}
		return l, nil
	case <-ctx.Done():
		return line{}, fmt.Errorf("%w; %w", context.Cause(ctx), a.proc.Failed("no answer"))
	}
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

// Backend is a running backend process.
type Backend struct{ a *agent }

// StartBackend starts the backend in its namespace and waits until it listens. See rig.Start for the calling thread.
func StartBackend(ctx context.Context, r *rig.Rig, exe string) (*Backend, error) {
	a, err := start(r, rig.Backend, exe, BackendCommand)
	if err != nil {
		return nil, err
	}
	l, err := a.next(ctx)
	if err == nil && !l.Ready {
		err = errors.New(l.Error)
	}
	if err != nil {
		a.close()
		return nil, err
	}
	return &Backend{a}, nil
}

// PID of the backend process.
func (b *Backend) PID() int { return b.a.proc.PID() }

// Stop ends the backend and returns what it found wrong with its connections.
func (b *Backend) Stop(ctx context.Context) error {
	defer b.a.close()
	b.a.in.Close()
	l, err := b.a.next(ctx)
	if err != nil {
		return err
	}
	if l.Error != "" {
		return errors.New(l.Error)
	}
	return nil
}

// Load runs one case from the client's namespace. between is that of load.Run.
func Load(ctx context.Context, r *rig.Rig, exe string, s load.Spec, between func(string) error) (load.Result, error) {
	a, err := start(r, rig.Client, exe, ClientCommand)
	if err != nil {
		return load.Result{}, err
	}
	defer a.close()
	if err := json.NewEncoder(a.in).Encode(s); err != nil {
		return load.Result{}, fmt.Errorf("sending the case: %w", err)
	}
	for {
		l, err := a.next(ctx)
		switch {
		case err != nil:
			return load.Result{}, err
		case l.Window != nil:
			if between != nil {
				if err := between(*l.Window); err != nil {
					return load.Result{}, err
				}
			}
			if _, err := io.WriteString(a.in, "\n"); err != nil {
				return load.Result{}, fmt.Errorf("answering the client: %w", err)
			}
		case l.Result != nil:
			return *l.Result, nil
		default:
			return load.Result{}, errors.New(l.Error)
		}
	}
}
