package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func FuzzDuration(f *testing.F) {
	for _, s := range []string{"5s", "0d", "never", "18446744073709551615s", "1h30m", "+5s", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDuration(s)
		if err != nil {
			return
		}
		if back, err := ParseDuration(d.String()); err != nil || back != d {
			t.Errorf("%q is %s, which reads back as %s, %v", s, d, back, err)
		}
		if d.Std() < 0 {
			t.Errorf("%q is negative", s)
		}
	})
}

func FuzzPortSpec(f *testing.F) {
	for _, s := range []string{"443", "443-543", " 1 - 65535 ", "543-443", "-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePortSpec(s)
		if err != nil {
			return
		}
		if back, err := ParsePortSpec(p.String()); err != nil || back != p || p.First > p.Last || p.Len() < 1 {
			t.Errorf("%q is %s, which reads back as %s, %v", s, p, back, err)
		}
	})
}

func FuzzAddress(f *testing.F) {
	for _, s := range []string{"127.0.0.1", "[::1]:80", "tcp:1.2.3.4:5", "unix:/run/x", "fe80::1%eth0", "[fe80::1%a]:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseAddress(s)
		if err != nil {
			return
		}
		if back, err := ParseAddress(a.String()); err != nil || back != a {
			t.Errorf("%q is %s, which reads back as %s, %v", s, a, back, err)
		}
	})
}

func FuzzSize(f *testing.F) {
	for _, s := range []string{"10MiB", "64 kib", "0", "18446744073709551615"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			return
		}
		if back, err := ParseSize(n.String()); err != nil || back != n {
			t.Errorf("%q is %s, which reads back as %s, %v", s, n, back, err)
		}
	})
}

func FuzzLogFilter(f *testing.F) {
	for _, s := range []string{"info,certs=debug", "off", "a=b=c", "x/[", "dstack_gateway::a=trace"} {
		f.Add(s, "certs")
	}
	f.Fuzz(func(t *testing.T, s, target string) {
		filter, _ := ParseLogFilter(s)
		if level := filter.Level(target); level < LevelTrace || level > LevelOff {
			t.Errorf("%q: level %d", s, level)
		}
	})
}

// FuzzLoad: no file makes Load panic, and what loads is printed as something that loads.
func FuzzLoad(f *testing.F) {
	files, err := filepath.Glob("testdata/*.*")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		if ext := filepath.Ext(file); ext != ".golden" {
			f.Add(data, ext == ".toml")
		}
	}
	noEnv := func(string) string { return "" }
	f.Fuzz(func(t *testing.T, data []byte, isTOML bool) {
		name := "f.json"
		if isTOML {
			name = "f.toml"
		}
		layer, err := parseFile(name, data)
		if err != nil {
			return
		}
		c, warnings, err := build([]*node{layer}, noEnv)
		var report, text strings.Builder
		if ok, _ := WriteCheck(&report, warnings, err); ok && err != nil {
			t.Error("the check passes what does not load")
		}
		if err != nil {
			return
		}
		if err := Print(&text, c); err != nil {
			t.Fatal(err)
		}
		shown := strings.ReplaceAll(text.String(), "\""+redacted+"\"", "\"0123456789abcdef\"")
		again, err := parseFile("again.toml", []byte(shown))
		if err != nil {
			t.Fatalf("%v in\n%s", err, shown)
		}
		if _, _, err := build([]*node{again}, noEnv); err != nil {
			t.Errorf("does not load again: %v\n%s", err, shown)
		}
	})
}
