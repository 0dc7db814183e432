package hostname_test

import (
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

func TestNormalizeDomain(t *testing.T) {
	const (
		errDomain = "domain must be a non-empty ASCII DNS name of at most 253 bytes"
		errLabel  = "domain contains an invalid DNS label"
	)
	label63 := strings.Repeat("a", 63)
	name253 := strings.Join([]string{label63, label63, label63, strings.Repeat("b", 61)}, ".")
	for _, tt := range []struct{ in, want, err string }{
		{in: "example.com", want: "example.com"},
		{in: "  Example.COM. ", want: "example.com"},
		{in: "example.com...", want: "example.com"},
		{in: "*.example.com", want: "example.com"},
		{in: " *.Example.com.\t", want: "example.com"},
		{in: "localhost", want: "localhost"},
		{in: "0-1.x", want: "0-1.x"},
		{in: label63 + ".x", want: label63 + ".x"},
		{in: name253, want: name253},
		{in: "*." + name253 + ".", want: name253},

		{in: "", err: errDomain},
		{in: " ", err: errDomain},
		{in: "...", err: errDomain},
		{in: "bücher.example", err: errDomain},
		{in: name253 + "b", err: errDomain},

		{in: "*.", err: errLabel},
		{in: "*.*.example.com", err: errLabel},
		{in: "a.*.example.com", err: errLabel},
		{in: ".example.com", err: errLabel},
		{in: "a..b", err: errLabel},
		{in: "*..b", err: errLabel},
		{in: "-a.b", err: errLabel},
		{in: "a-.b", err: errLabel},
		{in: "a_b.c", err: errLabel},
		{in: "a b.c", err: errLabel},
		{in: "a\x00.c", err: errLabel},
		{in: label63 + "a.x", err: errLabel},
	} {
		got, err := hostname.NormalizeDomain(tt.in)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if got != tt.want || text != tt.err {
			t.Errorf("NormalizeDomain(%q) = %q, %q; want %q, %q", tt.in, got, text, tt.want, tt.err)
		}
	}
}

// FuzzNormalizeDomain checks that the normal form is one: short, lower case and
// its own normal form.
func FuzzNormalizeDomain(f *testing.F) {
	for _, s := range []string{"example.com", " *.Example.COM.. ", "*.*.x", "bücher.example", "a..b", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := hostname.NormalizeDomain(s)
		if err != nil {
			return
		}
		if d == "" || len(d) > 253 || strings.ContainsAny(d, " *_ABCDEFGHIJKLMNOPQRSTUVWXYZ") || strings.HasSuffix(d, ".") {
			t.Fatalf("NormalizeDomain(%q) = %q", s, d)
		}
		if again, err := hostname.NormalizeDomain(d); err != nil || again != d {
			t.Fatalf("NormalizeDomain(%q) = %q, whose normal form is %q, %v", s, d, again, err)
		}
	})
}
