package dev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/dev/cvm"
)

// Line is a command to paste, and what its output must show.
type Line struct {
	Title   string   `json:"title"`
	Command []string `json:"command"`
	// Want are texts of which at least one is in the output: one for every CVM
	// that may answer.
	Want []string `json:"want"`
}

// Shell is the command as a shell takes it.
func (l Line) Shell() string {
	words := make([]string, len(l.Command))
	for i, w := range l.Command {
		words[i] = shellQuote(w)
	}
	return strings.Join(words, " ")
}

func shellQuote(w string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:=@%+,", r)
	}
	if w != "" && strings.IndexFunc(w, func(r rune) bool { return !plain(r) }) < 0 {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}

// lines are all commands that must work when the environment is up.
func lines(o *Options, apps []app) []Line {
	web, api := apps[0], apps[1]
	curl := func(host string) []string {
		return []string{
			"curl", "--cacert", state{o.StateDir}.webCA(),
			// Whatever the name and port, go to the proxy: nothing has to know the names.
			"--connect-to", "::" + o.reach().String(),
			"https://" + host + "/",
		}
	}
	platform := func(label string) []string { return curl(label + "." + o.BaseDomain) }
	pages := func(a app, port int, end string) []string {
		var all []string
		for _, i := range a.instances {
			all = append(all, fmt.Sprintf("%s instance %s port %d %s", i.name, i.id, port, end))
		}
		return all
	}
	grpc := []string{o.Self, "dev", "grpc"}
	if o.StateDir != DefaultStateDir {
		grpc = append(grpc, "--state", o.StateDir)
	}
	var serving []string
	for _, i := range web.instances {
		serving = append(serving, "SERVING "+i.name)
	}
	second := web.instances[1]
	return []Line{
		{"app web, port 80", platform(web.id), pages(web, cvm.PortHTTP, "at ")},
		{"app web, port 8080", platform(web.id + "-8080"), pages(web, cvm.PortAlt, "at ")},
		{"app web, TLS ends in the app", platform(web.id + "-443s"), pages(web, cvm.PortTLS, "TLS ends here")},
		{"app web, HTTP/2 to a gRPC server", platform(web.id + "-50051g"), pages(web, cvm.PortGRPC, "HTTP/2.0")},
		{"app web, a gRPC call", append(grpc, web.id+"-50051g"), serving},
		{"app web by its own domain (TXT record)", curl(o.CustomDomain), pages(web, cvm.PortTLS, "TLS ends here")},
		{"instance " + second.name + " alone", platform(second.id + "-8080"), pages(app{instances: []instance{second}}, cvm.PortAlt, "at ")},
		{"app web, told the client by PROXY protocol", platform(web.id + "-8081"), pages(web, cvm.PortProxy, "client "+o.client())},
		{"app api, whose guest does not report its ports", platform(api.id + "-8080"), pages(api, cvm.PortAlt, "at ")},
	}
}

// reach is where programs on this machine reach the proxy.
func (o *Options) reach() netip.AddrPort {
	if o.Proxy.Addr().IsUnspecified() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), o.Proxy.Port())
	}
	return o.Proxy
}

// client is the address from which curl on this machine reaches the proxy, as far
// as that is certain.
func (o *Options) client() string {
	if o.reach().Addr().IsLoopback() {
		return "127.0.0.1"
	}
	return ""
}

const lineTimeout = 15 * time.Second

// run runs the command. The error says what came instead of what was wanted.
func (l Line) run(ctx context.Context) (output string, err error) {
	ctx, cancel := context.WithTimeout(ctx, lineTimeout)
	defer cancel()
	args := l.Command[1:]
	if l.Command[0] == "curl" {
		// As pasted, but without the progress meter; an HTTP error is one here.
		args = append([]string{"-sS", "--fail", "--max-time", "10", "--noproxy", "*"}, args...)
	}
	cmd := exec.CommandContext(ctx, l.Command[0], args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(stderr.String())
		if text == "" {
			text = err.Error()
		}
		if ctx.Err() != nil {
			text += " (timed out)"
		}
		return "", errors.New(text)
	}
	output = strings.TrimSpace(stdout.String())
	for _, w := range l.Want {
		if strings.Contains(output, w) {
			return output, nil
		}
	}
	return "", fmt.Errorf("the answer is %q, want it to contain %q", output, strings.Join(l.Want, `" or "`))
}

// check runs all lines until each has worked or the time is over. A line may
// need a moment: the gateway looks for new tunnels in intervals.
func check(ctx context.Context, all []Line, patience time.Duration) (outputs []string, err error) {
	deadline := time.Now().Add(patience)
	outputs = make([]string, len(all))
	var failed []error
	for i, l := range all {
		for {
			if outputs[i], err = l.run(ctx); err == nil || ctx.Err() != nil || time.Now().After(deadline) {
				break
			}
			time.Sleep(200 * time.Millisecond)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w\n    %s", l.Title, err, l.Shell()))
		}
	}
	return outputs, errors.Join(failed...)
}

// share asks n times and counts the answers by CVM. It goes on until every CVM
// of the app has answered, at most for the time given: one that has just come
// back is avoided for a while.
func share(ctx context.Context, l Line, a app, n int, patience time.Duration) (map[string]int, error) {
	counts := make(map[string]int)
	deadline := time.Now().Add(patience)
	for asked := 0; ; asked++ {
		missing := ""
		for _, i := range a.instances {
			if counts[i.name] == 0 {
				missing = i.name
			}
		}
		if asked >= n {
			if missing == "" {
				return counts, nil
			}
			if time.Now().After(deadline) {
				return counts, fmt.Errorf("%d requests to app %s, none of them reached %s", asked, a.name, missing)
			}
			time.Sleep(100 * time.Millisecond)
		}
		out, err := l.run(ctx)
		if err != nil {
			return counts, err
		}
		name, _, _ := strings.Cut(out, " ")
		counts[name]++
	}
}
