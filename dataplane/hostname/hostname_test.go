package hostname_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

const (
	errEmpty  = "app id is empty"
	errSuffix = "invalid sni format: `gs` is not allowed"
	errPort   = "invalid port"
	errFormat = "invalid sni format"
)

// labels is the table of gateway spec 4.3 and its neighbourhood.
var labels = []struct {
	label string
	id    string
	port  uint16
	mode  hostname.Mode
	err   string
}{
	{label: "myapp", id: "myapp", port: 80},
	{label: "myapps", id: "myapps", port: 80},
	{label: "myappg", id: "myappg", port: 80},
	{label: "myapp-", id: "myapp", port: 80},
	{label: "myapp-8080", id: "myapp", port: 8080},
	{label: "myapp-8080g", id: "myapp", port: 8080, mode: hostname.TerminateH2},
	{label: "myapp-g", id: "myapp", port: 80, mode: hostname.TerminateH2},
	{label: "myapp-s", id: "myapp", port: 443, mode: hostname.Passthrough},
	{label: "myapp-443s", id: "myapp", port: 443, mode: hostname.Passthrough},
	{label: "myapp-8443s", id: "myapp", port: 8443, mode: hostname.Passthrough},
	{label: "myapp-8080sg", err: errSuffix},
	{label: "myapp-sg", err: errSuffix},
	{label: "myapp-8080gs", err: errPort},
	{label: "myapp-gs", err: errPort},
	{label: "myapp-0", err: errPort},
	{label: "myapp-+80", err: errPort},
	{label: "myapp--80", err: errFormat},
	{label: "myapp-0080", id: "myapp", port: 80},
	{label: "myapp-65535", id: "myapp", port: 65535},
	{label: "myapp-65536", err: errPort},
	{label: "myapp-abc", err: errPort},
	{label: "myapp-80-1", err: errFormat},
	{label: "myapp--", err: errFormat},
	{label: "myapp-abc-1", err: errPort},
	{label: "-80", err: errEmpty},

	{label: "", err: errEmpty},
	{label: "-", err: errEmpty},
	{label: "myapp-0s", err: errPort},
	{label: "myapp-00000", err: errPort},
	{label: "myapp-000000000000000000000000000443s", id: "myapp", port: 443, mode: hostname.Passthrough},
	{label: "myapp-18446744073709551617", err: errPort},
	{label: "myapp-ss", err: errPort},
	{label: "myapp-gg", err: errPort},
	{label: "myapp-8080G", err: errPort},
	{label: "myapp-80 ", err: errPort},
	{label: "myapp-٨٠", err: errPort},
	{label: "myapp-sg-1", err: errSuffix},
	{label: "myapp-s-", err: errFormat},
	{label: "my.app", err: errFormat},
	{label: "gateway", id: "gateway", port: 80},
	{label: "MyApp-80", id: "MyApp", port: 80},
	{label: "3f9c5be4c1a0a6d7f2e84b915d07c6aa1b2c3d4e-65535s", id: "3f9c5be4c1a0a6d7f2e84b915d07c6aa1b2c3d4e", port: 65535, mode: hostname.Passthrough},
}

func TestParseLabel(t *testing.T) {
	for _, tt := range labels {
		t.Run(tt.label, func(t *testing.T) {
			got, err := hostname.ParseLabel(tt.label)
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Fatalf("got %+v, error %v; want error %q", got, err, tt.err)
				}
				if got != (hostname.Target{}) {
					t.Errorf("a target came with the error: %+v", got)
				}
				return
			}
			want := hostname.Target{ID: tt.id, Port: tt.port, Mode: tt.mode}
			if err != nil || got != want {
				t.Fatalf("got %+v, error %v; want %+v", got, err, want)
			}
		})
	}
}

func TestSplit(t *testing.T) {
	for _, tt := range []struct {
		name, label, base string
		ok                bool
	}{
		{"myapp-80.example.com", "myapp-80", "example.com", true},
		{"a.b", "a", "b", true},
		{"a.b.c.d", "a", "b.c.d", true},
		{"localhost", "", "", false},
		{"", "", "", false},
		{".", "", "", false},
		{".example.com", "", "", false},
		{"example.", "", "", false},
	} {
		label, base, ok := hostname.Split(tt.name)
		if label != tt.label || base != tt.base || ok != tt.ok {
			t.Errorf("Split(%q) = %q, %q, %v; want %q, %q, %v", tt.name, label, base, ok, tt.label, tt.base, tt.ok)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	for _, tt := range labels {
		n := testing.AllocsPerRun(100, func() {
			label, _, _ := hostname.Split(tt.label)
			if _, err := hostname.ParseLabel(tt.label); (err != nil) != (tt.err != "") {
				t.Fatal(label, err)
			}
		})
		if n != 0 {
			t.Errorf("%q: %v allocations", tt.label, n)
		}
	}
}

func TestModeString(t *testing.T) {
	for mode, want := range map[hostname.Mode]string{
		hostname.Terminate:   "terminate",
		hostname.TerminateH2: "terminate-h2",
		hostname.Passthrough: "passthrough",
		hostname.Mode(9):     "mode(9)",
	} {
		if got := mode.String(); got != want {
			t.Errorf("Mode(%d).String() = %q, want %q", uint8(mode), got, want)
		}
	}
}

func BenchmarkParseLabel(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		label, _, _ := hostname.Split("3f9c5be4c1a0a6d7f2e84b915d07c6aa1b2c3d4e-8443s.example.com")
		if _, err := hostname.ParseLabel(label); err != nil {
			b.Fatal(err)
		}
	}
}

// FuzzParseLabel checks that what is accepted means what it is rendered back to.
func FuzzParseLabel(f *testing.F) {
	for _, tt := range labels {
		f.Add(tt.label)
	}
	f.Fuzz(func(t *testing.T, label string) {
		got, err := hostname.ParseLabel(label)
		if err != nil {
			for _, known := range []error{hostname.ErrEmptyID, hostname.ErrSuffix, hostname.ErrPort, hostname.ErrFormat} {
				if errors.Is(err, known) {
					return
				}
			}
			t.Fatalf("unknown error %v", err)
		}
		if got.ID == "" || strings.ContainsAny(got.ID, "-.") || !strings.HasPrefix(label, got.ID) || got.Port == 0 {
			t.Fatalf("ParseLabel(%q) = %+v", label, got)
		}
		suffix := map[hostname.Mode]string{hostname.TerminateH2: "g", hostname.Passthrough: "s"}[got.Mode]
		again, err := hostname.ParseLabel(fmt.Sprintf("%s-%d%s", got.ID, got.Port, suffix))
		if err != nil || again != got {
			t.Fatalf("ParseLabel(%q) = %+v, rendered and read again %+v, %v", label, got, again, err)
		}
	})
}
