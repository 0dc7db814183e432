package dev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
)

// Down removes everything that Up made: processes, namespaces, interfaces and
// the state. With keep, keys, certificates and the gateway's data stay for the
// next Up. name is that of the environment, in case its state was lost.
func Down(ctx context.Context, dir, name string, keep bool, out io.Writer) error {
	s := state{dir}
	o, err := s.saved()
	if err != nil {
		return err
	}
	known := o != nil
	if !known {
		d := Defaults()
		d.StateDir, d.Name = dir, name
		if err := d.Check(); err != nil {
			return err
		}
		o = &d
	}
	e, err := newEnvironment(o, out)
	if err != nil {
		return err
	}
	if !known {
		// Without a state only what carries our mark is ours.
		strays, err := s.strays(nil)
		if err != nil {
			return err
		}
		bridge, err := linkByName(o.bridge())
		if err != nil {
			return err
		}
		if len(strays) == 0 && (bridge == nil || bridge.Attrs().Alias != o.owner()) {
			if !s.ours() {
				fmt.Fprintf(out, "Nothing is up in %s.\n", dir)
				return nil
			}
		} else if err := checkForeign(o, e.instances()); err != nil {
			return err
		}
	}
	if s.ours() {
		unlock, err := s.lock()
		if err != nil {
			return err
		}
		defer unlock()
	}
	if err := e.takeDown(ctx); err != nil {
		return err
	}
	if s.ours() {
		if err := e.forget(keep); err != nil {
			return err
		}
	}
	if left := leftovers(o, e.instances()); len(left) > 0 {
		return fmt.Errorf("these are still there: %s", strings.Join(left, ", "))
	}
	fmt.Fprintf(out, "Everything is removed: processes, namespaces, interfaces")
	if keep {
		fmt.Fprintf(out, "; keys and data stay in %s.\n", dir)
	} else {
		fmt.Fprintf(out, " and %s.\n", dir)
	}
	return nil
}

// takeDown stops the processes and removes the network.
func (e *environment) takeDown(ctx context.Context) error {
	names := []string{"gateway", "dns"}
	var namespaces []string
	for _, in := range e.instances() {
		names = append(names, in.name)
		namespaces = append(namespaces, e.opt.namespace(in.name))
	}
	failed := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			r, err := e.readRecord(name)
			if err == nil && r != nil {
				if err = r.stop(stopGrace); err == nil {
					err = os.Remove(e.record(name))
				}
			}
			if err != nil {
				failed[i] = fmt.Errorf("stop %s: %w", name, err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(failed...); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// What is left has lost its record or its parent.
	strays, err := e.strays(namespaces)
	if err != nil {
		return err
	}
	if err := killAll(strays); err != nil {
		return err
	}
	return removeNetwork(e.opt, e.instances())
}

// forget removes the state, or with keep only what says that something is up.
// Files of others in the directory stay.
func (e *environment) forget(keep bool) error {
	paths := []string{e.facts(), e.private("options.json"), e.private("run")}
	if !keep {
		paths = []string{e.facts(), e.webCA(), e.private()}
	}
	for _, p := range paths {
		if err := os.RemoveAll(p); err != nil {
			return fmt.Errorf("remove the state: %w", err)
		}
	}
	if keep {
		return nil
	}
	if rest, err := os.ReadDir(e.dir); err == nil && len(rest) == 0 {
		if err := os.Remove(e.dir); err != nil {
			return fmt.Errorf("remove the state: %w", err)
		}
	}
	return nil
}

// Kill takes a CVM from the network without a word, as a power failure does: its
// cable is pulled, then its processes are killed. Up brings it back.
func Kill(dir, name string, out io.Writer) error {
	s := state{dir}
	o, err := s.saved()
	if err != nil {
		return err
	}
	if o == nil {
		return fmt.Errorf("nothing is up in %s", dir)
	}
	e, err := newEnvironment(o, out)
	if err != nil {
		return err
	}
	var names []string
	for _, in := range e.instances() {
		if in.name != name {
			names = append(names, in.name)
			continue
		}
		l, err := netlink.LinkByName(o.veth(in.index))
		if err == nil {
			err = netlink.LinkSetDown(l)
		}
		if err != nil {
			return fmt.Errorf("pull the cable of %s: %w", name, err)
		}
		path := filepath.Join(namespaceDir, o.namespace(name))
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("CVM %s: %w", name, err)
		}
		pids, err := inNamespaceOf(o.namespace(name))
		if err != nil {
			return err
		}
		if err := killAll(pids); err != nil {
			return fmt.Errorf("CVM %s: %w", name, err)
		}
		fmt.Fprintf(out, "CVM %s is dead: %d processes killed, %s down. \"dstack dev up\" brings it back.\n", name, len(pids), o.veth(in.index))
		return nil
	}
	return fmt.Errorf("there is no CVM %q, but %s", name, strings.Join(names, ", "))
}
