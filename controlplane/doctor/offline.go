package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// Setup is a configuration as config.Load returned it. Config is nil if Err is set.
type Setup struct {
	Config   *config.Config
	Warnings []config.Warning
	Err      error
	// Running: a gateway with this configuration's data directory answered.
	Running bool
}

// Offline are the checks that need no running gateway. Without a configuration only
// those of the machine that depend on none are made.
func Offline(s Setup, h *Host) []Check {
	checks := []Check{{Name: "configuration", Group: GroupConfig, Run: func(context.Context) Result { return checkSetup(s) }}}
	if s.Config == nil {
		return append(checks, machine(config.Default(), h, false)...)
	}
	checks = append(checks, files(s.Config, h)...)
	checks = append(checks, Check{"ports", GroupNetwork, func(ctx context.Context) Result { return h.checkPorts(s.Config, s.Running) }})
	return append(checks, machine(s.Config, h, true)...)
}

// machine are the checks of what the process finds around it. They are made by the
// gateway too, whose privileges and namespaces are what counts. known is false when
// cfg stands for a configuration that did not load.
func machine(cfg *config.Config, h *Host, known bool) []Check {
	c := &cfg.Core
	list := []Check{
		{"clock", GroupMachine, func(context.Context) Result { return h.checkClock() }},
		{"open files", GroupMachine, func(context.Context) Result { return h.checkFileLimit(cfg) }},
		{"accept queue", GroupMachine, func(context.Context) Result { return h.checkBacklog() }},
		{"conntrack", GroupMachine, func(context.Context) Result { return h.checkConntrack() }},
		{"pipes", GroupMachine, func(context.Context) Result { return h.checkPipes(cfg) }},
		{"kernel TLS", GroupMachine, func(context.Context) Result { return h.checkTLSULP(cfg) }},
		{"ipv6", GroupMachine, func(context.Context) Result { return h.checkIPv6(cfg) }},
	}
	if !known {
		return list
	}
	list = append(list,
		Check{"capabilities", GroupMachine, func(context.Context) Result { return h.checkCapabilities(cfg) }},
		Check{"data directory", GroupMachine, func(context.Context) Result { return h.checkDataDir(c.Sync.DataDir) }},
		Check{"wireguard backend", GroupMachine, func(context.Context) Result { return h.checkWireGuard(cfg) }},
		Check{"resolvers", GroupNetwork, func(ctx context.Context) Result { return h.checkResolvers(ctx, cfg) }},
		Check{"guest agent", GroupNetwork, func(ctx context.Context) Result { return h.checkAgent(ctx, cfg) }},
	)
	if c.Auth.Enabled {
		list = append(list, Check{"auth webhook", GroupNetwork, func(ctx context.Context) Result { return h.checkWebhook(ctx, c.Auth.URL) }})
	}
	if c.Store.Mode == config.StoreExternal {
		list = append(list, Check{"etcd endpoints", GroupNetwork, func(ctx context.Context) Result { return h.checkEtcd(ctx, c.Store.Endpoints) }})
	}
	return list
}

// checkSetup repeats what the loader said.
func checkSetup(s Setup) Result {
	if s.Err != nil {
		problems := unjoin(s.Err)
		r := fail("correct it; dstack-gw config check repeats this test, docs/reference/config.md explains every key", "does not load: %s", problems[0])
		if len(problems) > 1 {
			r.Text = fmt.Sprintf("does not load, for %d reasons", len(problems))
			r.Table = &finding.Table{Columns: []string{"reason"}}
			for _, p := range problems {
				r.Table.Add(p.Error())
			}
		}
		return r
	}
	if len(s.Warnings) == 0 {
		return ok("loads without a warning")
	}
	r := ok("loads, with %s", plural(len(s.Warnings), "remark"))
	r.Table = &finding.Table{Columns: []string{"kind", "remark"}}
	for _, w := range s.Warnings {
		r.Table.Add(string(w.Kind), w.String())
		if w.Kind != config.Legacy { // old files are meant to keep working
			r.Status = finding.Warn
		}
	}
	if r.Status == finding.Warn {
		r.Hints = []string{"dstack-gw config print shows what is in effect and where it comes from"}
	}
	return r
}

// unjoin lists the errors that errors.Join put together.
func unjoin(err error) []error {
	joined, ok := errors.AsType[interface {
		error
		Unwrap() []error
	}](err)
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, unjoin(e)...)
	}
	return all
}

func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// list joins a few of many.
func list(all []string, most int) string {
	if len(all) <= most {
		return strings.Join(all, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
}
