package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"slices"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// Path is where Handler is mounted.
const Path = "/doctor"

// Handler answers GET /doctor with the report of the online checks as JSON, or as
// text for "Accept: text/plain". The status is 200 whatever was found. One report is
// made at a time; a request that comes meanwhile gets 503. It must be behind the
// authentication of the admin listener or on the control socket.
func Handler(g Gateway) http.Handler {
	checks := Online(g)
	busy := make(chan struct{}, 1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !finding.OnlyGet(w, r) {
			return
		}
		select {
		case busy <- struct{}{}:
			defer func() { <-busy }()
		case <-r.Context().Done():
			return
		default:
			w.Header().Set("Retry-After", "5")
			http.Error(w, "another report is being made", http.StatusServiceUnavailable)
			return
		}
		finding.Respond(w, r, Run(r.Context(), checks))
	})
}

// CLI is one run of "dstack-gw doctor".
type CLI struct {
	// Setup is what config.Load returned. Running is found out.
	Setup Setup
	// Socket is the control socket of the gateway, <data_dir>/control.sock; "" when
	// the configuration does not load.
	Socket string
	Host   *Host
	Out    io.Writer
	// JSON writes the report as JSON, otherwise Style applies.
	JSON  bool
	Style finding.Style
}

// RunCLI makes the offline checks, has a running gateway make the online ones, and
// writes both as one report. It returns the exit code: 0 all is well, 1 warnings,
// 2 failures.
func RunCLI(ctx context.Context, c CLI) int {
	var live Report
	var asked Entry
	if c.Socket == "" {
		asked = Entry{Name: "gateway", Group: GroupGateway, Finding: skip("not asked: without a configuration its control socket is not known")}
	} else {
		err := finding.Get(ctx, c.Socket, Path, &live)
		asked = Entry{Name: "gateway", Group: GroupGateway, Finding: answered(err, c.Socket)}
		c.Setup.Running = err == nil
	}
	// What the gateway looked at itself need not be looked at again.
	offline := slices.DeleteFunc(Offline(c.Setup, c.Host), func(k Check) bool {
		return slices.ContainsFunc(live.Checks, func(e Entry) bool { return e.Name == k.Name })
	})
	r := Run(ctx, offline)
	r.Checks = append(r.Checks, asked)
	r.Checks = append(r.Checks, live.Checks...)
	r.finish()
	var err error
	if c.JSON {
		enc := json.NewEncoder(c.Out)
		enc.SetIndent("", "  ")
		err = enc.Encode(r)
	} else {
		err = r.Write(c.Out, c.Style)
	}
	if err != nil {
		return finding.Fail.ExitCode() // nobody reads
	}
	return r.ExitCode()
}

// answered says how asking the gateway went. None that runs is no fault: doctor is
// for before the start, too.
func answered(err error, socket string) Result {
	switch {
	case err == nil:
		return ok("answers at %s", socket)
	case errors.Is(err, finding.ErrNotRunning):
		return skip("%v", err)
	}
	return warn("run dstack-gw doctor as root on the gateway's machine, with its configuration", "%v", err)
}
