package explain

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// Path is where Handler is mounted.
const Path = "/explain"

// maxInput is the longest question, in bytes.
const maxInput = 2048

// Handler answers GET /explain?name=<host name, URL or id> with the report as JSON,
// or as text for "Accept: text/plain". The status is 200 whatever the outcome, 400
// without a name. It must be behind the authentication of the admin listener or on
// the control socket.
func (e *Explainer) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !finding.OnlyGet(w, r) {
			return
		}
		name := r.URL.Query().Get("name")
		if name == "" || len(name) > maxInput {
			http.Error(w, fmt.Sprintf("give a name of at most %d bytes: %s?name=<host name, URL, app or instance id>", maxInput, Path), http.StatusBadRequest)
			return
		}
		finding.Respond(w, r, e.Explain(r.Context(), name))
	})
}

// CLI is one run of "dstack-gw explain".
type CLI struct {
	// Socket is the control socket of the gateway, <data_dir>/control.sock.
	Socket string
	// Input is what to explain.
	Input string
	Out   io.Writer
	// JSON writes the report as JSON, otherwise Style applies.
	JSON  bool
	Style finding.Style
}

// RunCLI asks the running gateway and writes its report. It returns the exit code:
// 0 the connection is served, 1 with warnings or not known, 2 refused, broken, or no
// gateway to ask.
func RunCLI(ctx context.Context, c CLI) int {
	var r Report
	err := finding.Get(ctx, c.Socket, Path+"?name="+url.QueryEscape(c.Input), &r)
	if err != nil {
		fail(c, err)
		return finding.Fail.ExitCode()
	}
	if c.JSON {
		enc := json.NewEncoder(c.Out)
		enc.SetIndent("", "  ")
		err = enc.Encode(&r)
	} else {
		err = r.Write(c.Out, c.Style)
	}
	if err != nil {
		return finding.Fail.ExitCode() // nobody reads
	}
	return r.Status().ExitCode()
}

func fail(c CLI, err error) {
	if c.JSON {
		_ = json.NewEncoder(c.Out).Encode(map[string]string{"error": err.Error()})
		return
	}
	fmt.Fprintf(c.Out, "cannot explain %s: %s\n", finding.Clean(c.Input), finding.Clean(err.Error()))
	fmt.Fprintln(c.Out, "-> dstack-gw doctor checks this machine without a running gateway")
}
