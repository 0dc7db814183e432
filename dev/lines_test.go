package dev

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

// A shell takes the printed words apart as they were.
func TestShell(t *testing.T) {
	words := []string{"printf", `%s|`, "plain", "with space", "it's", "$HOME", "a*b", "", "x;y", "--resolve", "a.test:8443:127.0.0.1"}
	out, err := exec.Command("sh", "-c", Line{Command: words}.Shell()).Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Join(words[2:], "|") + "|"; string(out) != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func TestLines(t *testing.T) {
	o := Defaults()
	o.Self = "/opt/dstack"
	apps, err := plan()
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, l := range lines(&o, apps) {
		if len(l.Want) == 0 {
			t.Errorf("%s: any answer would do", l.Title)
		}
		text = append(text, l.Shell())
	}
	all := strings.Join(text, "\n")
	id := apps[0].id
	for _, want := range []string{
		"curl --cacert /var/lib/dstack-dev/web-ca.crt --connect-to ::127.0.0.1:8443 https://" + id + "-8080.apps.dstack.test/\n",
		"https://" + id + ".apps.dstack.test/\n",
		"https://" + id + "-443s.apps.dstack.test/\n",
		"https://" + id + "-50051g.apps.dstack.test/\n",
		"/opt/dstack dev grpc " + id + "-50051g\n",
		"https://www.shop.test/\n",
		"https://" + apps[0].instances[1].id + "-8080.apps.dstack.test/\n",
		"https://" + apps[1].id + "-8080.apps.dstack.test/",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("no line %q in\n%s", want, all)
		}
	}
}

func TestLineRun(t *testing.T) {
	for _, tt := range []struct {
		line Line
		want string // in the error
	}{
		{Line{Command: []string{"echo", "web-2 here"}, Want: []string{"web-1 ", "web-2 "}}, ""},
		{Line{Command: []string{"echo", "something"}, Want: []string{"web-1 "}}, `the answer is "something"`},
		{Line{Command: []string{"sh", "-c", "echo reason >&2; exit 3"}, Want: []string{"x"}}, "reason"},
		{Line{Command: []string{"/nonexistent/program"}, Want: []string{"x"}}, "no such file"},
	} {
		_, err := tt.line.run(t.Context())
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%v: got %v, want %q", tt.line.Command, err, tt.want)
		}
	}
}

func TestShare(t *testing.T) {
	a := app{name: "web", instances: []instance{{name: "web-1"}, {name: "web-2"}}}
	one := Line{Command: []string{"echo", "web-1 x"}, Want: []string{"web-1 "}}
	if _, err := share(t.Context(), one, a, 3, 0); err == nil || !strings.Contains(err.Error(), "none of them reached web-2") {
		t.Errorf("got %v", err)
	}
	dir := t.TempDir()
	both := Line{Command: []string{"sh", "-c", "cd " + dir + " && if rm turn 2>/dev/null; then echo web-1 x; else touch turn; echo web-2 x; fi"}, Want: []string{"web-"}}
	counts, err := share(t.Context(), both, a, 4, time.Minute)
	if err != nil || counts["web-1"] != 2 || counts["web-2"] != 2 {
		t.Errorf("got %v, %v", counts, err)
	}
}
