package doctor

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// Result is what a check found.
type Result = finding.Finding

// Check looks at one thing.
type Check struct {
	// Name identifies the thing: the gateway's own result for a name replaces that of
	// the command line.
	Name string
	// Group is the heading under which it is shown.
	Group string
	// Run must end soon after ctx does.
	Run func(ctx context.Context) Result
}

// The groups, in the order of a report.
const (
	GroupConfig  = "Configuration"
	GroupMachine = "Machine"
	GroupNetwork = "Network"
	GroupGateway = "Gateway"
)

// Entry is the result of one check.
type Entry struct {
	Name  string `json:"name"`
	Group string `json:"group"`
	finding.Finding
	TookMS int64 `json:"took_ms"`
}

// Report is the result of all checks, in their order.
type Report struct {
	Host   string         `json:"host"`
	At     time.Time      `json:"at"`
	Status finding.Status `json:"status"`
	Checks []Entry        `json:"checks"`
}

const (
	// checkTimeout is for one check.
	checkTimeout = 5 * time.Second
	// parallel is how many checks run at a time.
	parallel = 8
	// grace is how long a check may take to notice the end of its time.
	grace = 500 * time.Millisecond
)

// Run makes the checks, several at a time, each for at most five seconds.
func Run(ctx context.Context, checks []Check) *Report { return run(ctx, checks, checkTimeout) }

func run(ctx context.Context, checks []Check, timeout time.Duration) *Report {
	host, err := os.Hostname()
	if err != nil {
		host = "this machine"
	}
	r := &Report{Host: host, At: time.Now().UTC().Truncate(time.Second), Checks: make([]Entry, len(checks))}
	slots := make(chan struct{}, parallel)
	var wg sync.WaitGroup
	for i := range checks {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			began := time.Now()
			r.Checks[i] = Entry{Name: checks[i].Name, Group: checks[i].Group, Finding: bounded(ctx, &checks[i], timeout)}
			r.Checks[i].TookMS = time.Since(began).Milliseconds()
		})
	}
	wg.Wait()
	r.finish()
	return r
}

// bounded runs a check that may hang or panic.
func bounded(ctx context.Context, c *Check, timeout time.Duration) Result {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	done := make(chan Result, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- Result{Status: finding.Fail, Text: fmt.Sprintf("the check itself failed: %v", p), Hints: []string{"this is a bug: please report it with these details"},
					Details: map[string]string{"stack": string(debug.Stack())}}
			}
		}()
		done <- c.Run(ctx)
	}()
	select {
	case r := <-done:
		return r
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r
	case <-time.After(grace):
		return Result{Status: finding.Fail, Text: fmt.Sprintf("no result within %s: something underneath hangs (a file system, a device, a name server)", timeout),
			Hints: []string{"look for processes in state D and for mounts that do not answer"}}
	}
}

// finish brings the groups together and sums the statuses up.
func (r *Report) finish() {
	order := []string{GroupConfig, GroupMachine, GroupNetwork, GroupGateway}
	rank := func(group string) int {
		if i := slices.Index(order, group); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortStableFunc(r.Checks, func(a, b Entry) int { return rank(a.Group) - rank(b.Group) })
	r.Status = finding.OK
	for i := range r.Checks {
		r.Status = finding.Worst(r.Status, r.Checks[i].Status)
	}
}

// ExitCode is 0 when all is well, 1 with warnings, 2 with failures.
func (r *Report) ExitCode() int { return r.Status.ExitCode() }

// WriteText renders the report without colours.
func (r *Report) WriteText(w io.Writer) error { return r.Write(w, finding.Style{}) }

// Write renders the report as text.
func (r *Report) Write(w io.Writer, s finding.Style) error {
	var names []string
	for i := range r.Checks {
		names = append(names, r.Checks[i].Name)
	}
	p := finding.NewPrinter(s, names)
	p.Line(fmt.Sprintf("dstack-gw doctor on %s at %s", r.Host, r.At.Format(time.RFC3339)))
	group := ""
	count := map[finding.Status]int{}
	for i := range r.Checks {
		c := &r.Checks[i]
		if c.Group != group {
			group = c.Group
			p.Line("")
			p.Line(group)
		}
		p.Finding(c.Name, c.Finding)
		count[c.Status]++
	}
	p.Line("")
	switch {
	case r.Status == finding.Fail:
		p.Status(r.Status, fmt.Sprintf("Failed: %d of %d checks, %d more with warnings.", count[finding.Fail], len(r.Checks), count[finding.Warn]))
	case r.Status == finding.Warn:
		p.Status(r.Status, fmt.Sprintf("Warnings: %d of %d checks, none failed.", count[finding.Warn], len(r.Checks)))
	default:
		p.Status(r.Status, fmt.Sprintf("Fine: %d checks.", len(r.Checks)))
	}
	_, err := p.WriteTo(w)
	return err
}

// ---- writing results ----

func ok(format string, args ...any) Result { return result(finding.OK, format, args...) }

func skip(format string, args ...any) Result { return result(finding.Skip, format, args...) }

func result(s finding.Status, format string, args ...any) Result {
	return Result{Status: s, Text: fmt.Sprintf(format, args...)}
}

// warn and fail take the remedy first: a result without one is of no use at 3 a.m.
func warn(hint, format string, args ...any) Result {
	r := result(finding.Warn, format, args...)
	r.Hints = []string{hint}
	return r
}

func fail(hint, format string, args ...any) Result {
	r := result(finding.Fail, format, args...)
	r.Hints = []string{hint}
	return r
}
