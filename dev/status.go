package dev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/dev/cvm"
	"github.com/dstack-gw/dstack-gw/prpc"
)

// ErrNotUp is returned by ReportStatus if something is missing; what, it has
// printed.
var ErrNotUp = errors.New("not everything is up: \"dstack dev up\" repairs it")

// ReportStatus prints processes, tunnels and lines. It must run as root.
func ReportStatus(ctx context.Context, dir string, out io.Writer) error {
	s := state{dir}
	o, err := s.saved()
	if err != nil {
		return err
	}
	if o == nil {
		fmt.Fprintf(out, "Nothing is up in %s.\n", dir)
		return ErrNotUp
	}
	e, err := newEnvironment(o, out)
	if err != nil {
		return err
	}
	healthy := true
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PROCESS\tPID\tSTATE\tLOG")
	names := []string{"gateway", "dns"}
	for _, in := range e.instances() {
		names = append(names, in.name)
	}
	for _, name := range names {
		r, err := e.readRecord(name)
		if err != nil {
			return err
		}
		switch {
		case r == nil:
			healthy = false
			fmt.Fprintf(w, "%s\t-\tnot started\t\n", name)
		case !r.alive():
			healthy = false
			fmt.Fprintf(w, "%s\t%d\tgone\t%s\n", name, r.PID, e.log(name))
		default:
			fmt.Fprintf(w, "%s\t%d\truns since %s\t%s\n", name, r.PID, r.Started.Format(time.DateTime), e.log(name))
		}
	}

	seen, gatewayErr := e.askGateway(ctx)
	fmt.Fprintln(w, "\nCVM\tADDRESS\tWIREGUARD\tHANDSHAKE\tSEEN BY GATEWAY\tCONNECTIONS\tPROBLEM")
	for _, in := range e.instances() {
		row := struct{ address, mode, handshake, seen, connections, problem string }{"-", "-", "never", "no", "-", ""}
		st, err := cvm.ReadStatus(e.private("cvm", in.name, cvm.FileStatus))
		if r, rerr := e.readRecord(in.name); err == nil && rerr == nil && r != nil && r.alive() && st.PID == r.PID {
			row.address, row.mode, row.problem = st.ClientIP, st.Mode, st.Error
			if !st.Handshake.IsZero() {
				row.handshake = ago(e.now(), st.Handshake)
			}
			if row.problem == "" && st.Nginx != "" {
				row.problem = "nginx: " + st.Nginx
			}
		} else {
			row.problem = "does not run"
		}
		if h := seen[in.id]; h != nil {
			row.seen, row.connections = "never", fmt.Sprint(h.NumConnections)
			if h.LatestHandshake > 0 {
				row.seen = ago(e.now(), time.Unix(int64(h.LatestHandshake), 0))
			}
		}
		healthy = healthy && row.problem == "" && row.handshake != "never"
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", in.name, row.address, row.mode, row.handshake, row.seen, row.connections, row.problem)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if gatewayErr != nil {
		healthy = false
		fmt.Fprintf(out, "\nThe gateway does not answer: %v\n", gatewayErr)
	}
	fmt.Fprintln(out)
	for _, l := range lines(o, e.apps) {
		fmt.Fprintf(out, "# %s\n%s\n", l.Title, l.Shell())
	}
	if !healthy {
		return ErrNotUp
	}
	return nil
}

func ago(now, t time.Time) string {
	return fmt.Sprintf("%v ago", max(0, now.Sub(t)).Truncate(time.Second))
}

// askGateway is the gateway's view of the instances, by id.
func (e *environment) askGateway(ctx context.Context) (map[string]*gatewaypb.HostInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	token, err := e.secret(e.gateway(fileAdminToken))
	if err != nil {
		return nil, err
	}
	client, err := prpc.NewClient("http://"+e.opt.Admin.String()+"/prpc", &http.Client{
		Transport: bearer{token, &http.Transport{DisableKeepAlives: true}},
	})
	if err != nil {
		return nil, err
	}
	resp := new(gatewaypb.StatusResponse)
	if err := client.Call(ctx, "Status", &emptypb.Empty{}, resp); err != nil {
		return nil, err
	}
	seen := make(map[string]*gatewaypb.HostInfo)
	for _, h := range resp.Hosts {
		seen[h.InstanceId] = h
	}
	return seen, nil
}

// bearer adds the admin token to requests.
type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// PrintLines prints the lines of a running environment; no root is needed.
func PrintLines(dir string, out io.Writer) error {
	f, err := ReadFacts(dir)
	if err != nil {
		return err
	}
	for _, l := range f.Lines {
		if _, err := fmt.Fprintf(out, "# %s\n%s\n", l.Title, l.Shell()); err != nil {
			return err
		}
	}
	return nil
}

// ReadZone reads the zone that Up wrote for its DNS server.
func ReadZone(text []byte) (*Zone, error) {
	z := new(Zone)
	if err := json.Unmarshal(text, z); err != nil {
		return nil, fmt.Errorf("DNS zone: %w", err)
	}
	return z, nil
}
