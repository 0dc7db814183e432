package finding

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

// Report is what a tool answers with.
type Report interface {
	// Write renders the report as text.
	Write(w io.Writer, s Style) error
}

// Respond answers r with the report, as JSON or, if r asks for text/plain, as text.
func Respond(w http.ResponseWriter, r *http.Request, report Report) {
	var body bytes.Buffer
	kind, err := "text/plain; charset=utf-8", error(nil)
	if wantsText(r.Header.Get("Accept")) {
		err = report.Write(&body, Style{})
	} else {
		kind = "application/json"
		err = json.NewEncoder(&body).Encode(report)
	}
	if err != nil { // a bug: nothing in a report can fail to be rendered
		http.Error(w, "render the report: "+err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Vary", "Accept")
	_, _ = w.Write(body.Bytes()) // the client left
}

// OnlyGet refuses methods other than GET and HEAD and reports whether r may go on.
func OnlyGet(w http.ResponseWriter, r *http.Request) bool {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return true
	}
	w.Header().Set("Allow", "GET, HEAD")
	http.Error(w, "only GET", http.StatusMethodNotAllowed)
	return false
}

// wantsText takes the first of the two types in the header: clients that know only
// one do not weigh.
func wantsText(accept string) bool {
	for part := range strings.SplitSeq(accept, ",") {
		kind, _, _ := strings.Cut(part, ";")
		switch strings.ToLower(strings.TrimSpace(kind)) {
		case "text/plain":
			return true
		case "application/json":
			return false
		}
	}
	return false
}

// ErrNotRunning: nobody listens at the control socket.
var ErrNotRunning = errors.New("no gateway answers")

// maxAnswer bounds what is read from the gateway.
const maxAnswer = 16 << 20

// Get asks the gateway behind the control socket for path (with its query) and
// decodes the JSON answer into v. The error wraps ErrNotRunning when nobody
// listens there, fs.ErrPermission when the caller may not ask.
func Get(ctx context.Context, socket, path string, v any) error {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		DisableKeepAlives:     true,
		ResponseHeaderTimeout: 30 * time.Second,
	}
	defer tr.CloseIdleConnections()
	// The host is not looked at: the transport has one place to go.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://gateway"+path, nil)
	if err != nil {
		return fmt.Errorf("ask the gateway at %s: %w", socket, err)
	}
	req.Header.Set("Accept", "application/json")
	resp, err := tr.RoundTrip(req)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the gateway's control socket %s is not for this user (run as root): %w", socket, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s (is dstack-gw running, with this data_dir?): %w", ErrNotRunning, socket, err)
	case err != nil:
		return fmt.Errorf("ask the gateway at %s: %w", socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("read the answer of the gateway at %s: %w", socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the gateway at %s answered %s: %s", socket, resp.Status, strings.TrimSpace(Clean(string(body[:min(len(body), 500)]))))
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("the answer of the gateway at %s is not understood (is it of this version?): %w", socket, err)
	}
	return nil
}
