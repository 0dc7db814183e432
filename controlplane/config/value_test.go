package config

import (
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestDuration(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Duration
		text string
	}{
		{"0s", 0, "0d"},
		{"0d", 0, "0d"},
		{"1s", Second, "1s"},
		{"59s", 59 * Second, "59s"},
		{"60s", Minute, "1m"},
		{"300s", 5 * Minute, "5m"},
		{"90s", 90 * Second, "90s"},
		{"5m", 5 * Minute, "5m"},
		{"60m", Hour, "1h"},
		{"10h", 10 * Hour, "10h"},
		{"24h", Day, "1d"},
		{"36h", 36 * Hour, "36h"},
		{"30d", 30 * Day, "30d"},
		{"007s", 7 * Second, "7s"},
		{"never", Never, "never"},
		{"18446744073709551614s", math.MaxUint64 - 1, "18446744073709551614s"},
		{"213503982334601d", 213503982334601 * Day, "213503982334601d"},
	} {
		got, err := ParseDuration(tt.in)
		if text, _ := got.MarshalText(); err != nil || got != tt.want || string(text) != tt.text {
			t.Errorf("ParseDuration(%q) = %d (%s), %v; want %d (%s)", tt.in, uint64(got), got, err, uint64(tt.want), tt.text)
		}
		var back Duration
		if err := back.UnmarshalText([]byte(tt.text)); err != nil || back != tt.want {
			t.Errorf("%q reads back as %v, %v", tt.text, back, err)
		}
	}
	for _, in := range []string{
		"", "s", "5", "5 s", " 5s", "5s ", "5ms", "1.5h", "1h30m", "-5s", "+5s", "5S", "5w", "Never", "NEVER", "0x5s", "5_0s", "٣s",
		"18446744073709551616s", "213503982334602d", "307445734561825861m", "5124095576030432h",
	} {
		if got, err := ParseDuration(in); err == nil {
			t.Errorf("ParseDuration(%q) = %s, want an error", in, got)
		}
	}
	for d, want := range map[Duration]time.Duration{
		0: 0, 5 * Minute: 5 * time.Minute, Never: math.MaxInt64,
		9223372036: 9223372036 * time.Second, 9223372037: math.MaxInt64,
	} {
		if got := d.Std(); got != want {
			t.Errorf("%s is %v, want %v", d, got, want)
		}
	}
}

func TestAddress(t *testing.T) {
	for _, tt := range []struct {
		in, text, network, listen string
		local                     bool
	}{
		{"127.0.0.1", "127.0.0.1", "tcp", "127.0.0.1:8000", true},
		{"127.0.0.1:8010", "127.0.0.1:8010", "tcp", "127.0.0.1:8010", true},
		{"0.0.0.0:0", "0.0.0.0:0", "tcp", "0.0.0.0:0", false},
		{"tcp:192.0.2.1", "192.0.2.1", "tcp", "192.0.2.1:8000", false},
		{"tcp:192.0.2.1:80", "192.0.2.1:80", "tcp", "192.0.2.1:80", false},
		{"::1", "::1", "tcp", "[::1]:8000", true},
		{"[::1]:80", "[::1]:80", "tcp", "[::1]:80", true},
		{"::ffff:127.0.0.1", "::ffff:127.0.0.1", "tcp", "[::ffff:127.0.0.1]:8000", true},
		{"unix:/run/gw.sock", "unix:/run/gw.sock", "unix", "/run/gw.sock", true},
		{"unix:gw.sock", "unix:gw.sock", "unix", "gw.sock", true},
	} {
		a, err := ParseAddress(tt.in)
		if err != nil {
			t.Errorf("ParseAddress(%q): %v", tt.in, err)
			continue
		}
		network, listen := a.Listen()
		if a.String() != tt.text || network != tt.network || listen != tt.listen || a.Local() != tt.local || a.IsZero() {
			t.Errorf("ParseAddress(%q) = %s, listens on %s %s, local %v", tt.in, a, network, listen, a.Local())
		}
	}
	for _, in := range []string{"", "localhost", "localhost:80", "tcp:", "unix:", "unix:\x00", "127.0.0.1:65536", "127.0.0.1:", ":80", "[::1]", "1.2.3", "http://127.0.0.1"} {
		if a, err := ParseAddress(in); err == nil {
			t.Errorf("ParseAddress(%q) = %s, want an error", in, a)
		}
	}
	unix, _ := ParseAddress("unix:/a")
	if unix.withPort(1) != unix {
		t.Error("a port changed a unix socket")
	}
}

func TestPortSpec(t *testing.T) {
	for in, want := range map[string]PortSpec{
		"443": {443, 443}, "443-543": {443, 543}, " 443 - 543 ": {443, 543}, "0": {0, 0}, "1-65535": {1, 65535}, "80-80": {80, 80}, "0443": {443, 443},
	} {
		got, err := ParsePortSpec(in)
		if err != nil || got != want {
			t.Errorf("ParsePortSpec(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "-", "443-", "-443", "543-443", "65536", "1-65536", "a", "+443", "443:445", "1-2-3", "4 43", "0x1"} {
		if got, err := ParsePortSpec(in); err == nil || !strings.HasPrefix(err.Error(), "invalid port range: ") {
			t.Errorf("ParsePortSpec(%q) = %v, %v", in, got, err)
		}
	}
	p := PortSpec{65533, 65535}
	if got := slices.Collect(p.All()); !slices.Equal(got, []uint16{65533, 65534, 65535}) || p.Len() != 3 {
		t.Errorf("the ports of %s are %v", p, got)
	}
	for range p.All() {
		break // stopping early must not panic
	}
	if !p.Contains(65533) || !p.Contains(65535) || p.Contains(65532) || p.String() != "65533-65535" {
		t.Errorf("%s: wrong ends", p)
	}
}

func TestSize(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want Size
		text string
	}{
		{"0", 0, "0"}, {"512", 512, "512"}, {"10MiB", 10 << 20, "10MiB"}, {"64 kib", 64 << 10, "64KiB"}, {" 1GB ", 1e9, "1000000000"},
		{"2kB", 2000, "2000"}, {"1024KB", 1024000, "1000KiB"}, {"3TiB", 3 << 40, "3TiB"}, {"7B", 7, "7"}, {"1MB", 1e6, "1000000"},
		{"18446744073709551615", math.MaxUint64, "18446744073709551615"}, {"2048KiB", 2 << 20, "2MiB"},
	} {
		got, err := ParseSize(tt.in)
		if err != nil || got != tt.want || got.String() != tt.text {
			t.Errorf("ParseSize(%q) = %d (%s), %v; want %d (%s)", tt.in, uint64(got), got, err, uint64(tt.want), tt.text)
		}
	}
	for _, in := range []string{"", "MiB", "-1", "+1", "1.5MiB", "10 Mi B", "10XB", "18446744073709551616", "16777217TiB", "1 2"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", in, uint64(got))
		}
	}
	if got := Size(math.MaxUint64).Int64(); got != math.MaxInt64 {
		t.Errorf("the largest size is %d as int64", got)
	}
}

func TestPrefixKeepsHostBitsOnlyOfInterfaceAddresses(t *testing.T) {
	var c Config
	for _, s := range table(&c) {
		for _, k := range s.keys {
			to, ok := k.to.(*netip.Prefix)
			if !ok {
				continue
			}
			if _, err := k.set(&node{value: "10.8.128.1/16"}); err != nil {
				t.Fatalf("%s: %v", k.name, err)
			}
			want := "10.8.0.0/16"
			if k.name == "ip" {
				want = "10.8.128.1/16"
			}
			if to.String() != want {
				t.Errorf("%s.%s = %s, want %s", s.path, k.name, to, want)
			}
			for _, bad := range []string{"10.8.0.1", "10.8.0.1/33", "2001:db8::/32", "a/8", ""} {
				if _, err := k.set(&node{value: bad}); err == nil {
					t.Errorf("%s.%s takes %q", s.path, k.name, bad)
				}
			}
		}
	}
}

// TestSetKnowsEveryType sends values of all kinds into every key: none may panic, and what is taken is shown.
func TestSetKnowsEveryType(t *testing.T) {
	values := []any{"text", int64(-1), int64(7), uint64(math.MaxUint64), 1.5, true, false, []any{}, []any{"x"}, []any{int64(1)}, map[string]any{}, time.Time{}}
	var c Config
	taken := 0
	for _, s := range table(&c) {
		for _, k := range s.keys {
			if k.typeName() == "" {
				t.Errorf("%s.%s has no type", s.path, k.name)
			}
			for _, v := range values {
				if set, err := k.set(&node{value: v}); err == nil && set {
					taken++
					if literal(k.value()) == "" {
						t.Errorf("%s.%s: nothing shown for %v", s.path, k.name, v)
					}
				}
			}
			if set, err := k.set(&node{}); set || err != nil {
				t.Errorf("%s.%s: null is %v, %v; want unset", s.path, k.name, set, err)
			}
		}
	}
	if taken == 0 {
		t.Error("no key took any value")
	}
}

// TestLiteralIsTOML: what literal writes, a TOML reader reads as the same.
func TestLiteralIsTOML(t *testing.T) {
	for in, want := range map[string]string{
		"plain": "plain", `quote " and \ back`: `quote " and \ back`, "line\nfeed\ttab\x00\x7f": "line\nfeed\ttab\x00\x7f", "é\u2028": "é\u2028", "\xff": "\uFFFD",
	} {
		root, err := parseTOML("x.toml", []byte("v = "+literal(in)+"\nm = "+literal(map[string]any{in: []any{in, true, 7}})))
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if got := root.find("v").value; got != want {
			t.Errorf("%q reads back as %q", in, got)
		}
		if inner := root.find("m").table[want]; inner == nil || len(inner.value.([]any)) != 3 {
			t.Errorf("%q as a key: %v", in, root.find("m").table)
		}
	}
	if got := tomlComment("a\nb = 1"); got != "a?b = 1" {
		t.Errorf("a file name leaves its comment: %q", got)
	}
}
