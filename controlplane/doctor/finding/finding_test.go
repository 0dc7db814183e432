package finding

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestStatus(t *testing.T) {
	order := []Status{Skip, OK, Warn, Fail}
	for i, a := range order {
		for j, b := range order {
			if got, want := Worst(a, b), order[max(i, j)]; got != want {
				t.Errorf("Worst(%s, %s) = %s", a, b, got)
			}
		}
	}
	for s, want := range map[Status]int{Skip: 0, OK: 0, Warn: 1, Fail: 2, "later": 2} {
		if got := s.ExitCode(); got != want {
			t.Errorf("exit code of %s is %d, want %d", s, got, want)
		}
	}
}

type report struct {
	Findings map[string]Finding `json:"findings"`
}

func (r report) Write(w io.Writer, s Style) error {
	p := NewPrinter(s, []string{"a", "longest name"})
	p.Line("A report")
	p.Line("")
	p.Finding("a", r.Findings["a"])
	p.Finding("longest name", r.Findings["b"])
	p.Status(Fail, "Refused: because "+strings.Repeat("of words ", 20))
	_, err := p.WriteTo(w)
	return err
}

var sample = report{map[string]Finding{
	"a": {Status: OK, Text: "fine"},
	"b": {Status: Fail,
		Text:    "this text is long enough to be wrapped because nobody wants to read lines that go on and on without an end \x1b[31m\u202e",
		Hints:   []string{"do this, which is a long hint too and has to be wrapped somewhere behind the hundredth column of the line", "or that"},
		Details: map[string]string{"k": "v", "another": "value\nwith a line break"},
		Table:   &Table{Columns: []string{"instance", "rx"}, Rows: [][]string{{"0123456789", "1"}, {"a", ""}}},
	},
}}

func TestText(t *testing.T) {
	for _, s := range []struct {
		file  string
		style Style
	}{{"plain.txt", Style{}}, {"narrow.txt", Style{Width: 40}}, {"color.txt", Style{Color: true}}} {
		var b bytes.Buffer
		if err := sample.Write(&b, s.style); err != nil {
			t.Fatal(err)
		}
		golden(t, s.file, b.Bytes())
		for line := range strings.Lines(b.String()) {
			if strings.TrimRight(line, " \n") != strings.TrimSuffix(line, "\n") {
				t.Errorf("%s: white space at the end of %q", s.file, line)
			}
		}
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", "bücher": "bücher", "a\nb\tc": "a b c", "\x1b[2J": `\u001b[2J`,
		"\u202eabc": `\u202eabc`, "a\xffb": `a\xffb`, "\x00": `\u0000`,
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}

// FuzzClean: nothing that reaches a terminal can steer it.
func FuzzClean(f *testing.F) {
	for _, s := range []string{"a", "\x1b]0;x\a", "\u009b31m", "\u2066", "\xc3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range Clean(s) {
			if r < 0x20 || 0x7f <= r && r < 0xa0 || 0x202a <= r && r <= 0x202e || 0x2066 <= r && r <= 0x2069 {
				t.Fatalf("Clean(%q) has %U", s, r)
			}
		}
	})
}

func TestRespond(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if OnlyGet(w, r) {
			Respond(w, r, sample)
		}
	})
	for _, tt := range []struct {
		method, accept, kind string
		code                 int
	}{
		{"GET", "", "application/json", 200},
		{"GET", "*/*", "application/json", 200},
		{"GET", "application/json, text/plain", "application/json", 200},
		{"GET", "text/html, Text/Plain;q=0.5", "text/plain; charset=utf-8", 200},
		{"HEAD", "text/plain", "text/plain; charset=utf-8", 200},
		{"POST", "", "", 405},
	} {
		r := httptest.NewRequest(tt.method, "/", nil)
		r.Header.Set("Accept", tt.accept)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.code || tt.kind != "" && w.Header().Get("Content-Type") != tt.kind {
			t.Errorf("%s %q: %d %q", tt.method, tt.accept, w.Code, w.Header().Get("Content-Type"))
		}
		if tt.code == 405 && w.Header().Get("Allow") != "GET, HEAD" {
			t.Error("405 without Allow")
		}
	}
}

func TestGet(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", func(w http.ResponseWriter, r *http.Request) { Respond(w, r, sample) })
	mux.HandleFunc("/html", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") })
	mux.HandleFunc("/refused", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "not today\x1b", 403) })
	srv := &http.Server{Handler: mux}
	go srv.Serve(ln)
	defer srv.Close()

	var got report
	if err := Get(t.Context(), socket, "/ok", &got); err != nil {
		t.Fatal(err)
	}
	want, _ := json.Marshal(sample)
	var same report
	_ = json.Unmarshal(want, &same)
	if !reflect.DeepEqual(got, same) {
		t.Errorf("got %+v", got)
	}
	for path, text := range map[string]string{"/html": "is not understood", "/refused": `403 Forbidden: not today\u001b`} {
		if err := Get(t.Context(), socket, path, &got); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", path, err)
		}
	}

	if err := Get(t.Context(), filepath.Join(dir, "none"), "/ok", &got); !errors.Is(err, ErrNotRunning) || !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := Get(t.Context(), dead, "/ok", &got); !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Get(ctx, socket, "/ok", &got); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
