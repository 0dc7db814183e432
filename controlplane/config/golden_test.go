package config

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestGolden loads every file of testdata and compares what `config check` says and which keys the file set.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.*")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, file := range files {
		if filepath.Ext(file) == ".golden" {
			continue
		}
		seen++
		t.Run(filepath.Base(file), func(t *testing.T) {
			wd, err := os.Getwd()
			if err != nil {
				t.Fatal(err)
			}
			got := []byte(strings.ReplaceAll(describe(t, file), wd, "$PWD"))
			golden := file + ".golden"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("differs from %s (go test -update writes it anew):\n%s", golden, got)
			}
			for _, secret := range []string{"hunter2", "do not show", "AQIDBAUG", "B0Xn3r8t", "cf-secret", "12345678", "an-old-name"} {
				if bytes.Contains(got, []byte(secret)) {
					t.Errorf("the output shows the secret %q", secret)
				}
			}
		})
	}
	if seen < 15 {
		t.Errorf("only %d files found", seen)
	}
}

func describe(t *testing.T, file string) string {
	t.Helper()
	var out bytes.Buffer
	c, warnings, loadErr := Load(LoadOptions{Path: file, EtcDir: t.TempDir()})
	ok, err := WriteCheck(&out, warnings, loadErr)
	if err != nil {
		t.Fatal(err)
	}
	if loadErr != nil {
		if c != nil || ok {
			t.Errorf("a configuration that does not load was returned or passes the check")
		}
		return out.String()
	}
	var full bytes.Buffer
	if err := Print(&full, c); err != nil {
		t.Fatal(err)
	}
	out.WriteString("\n")
	if strings.Contains(file, "minimal") {
		out.Write(full.Bytes())
		return out.String()
	}
	// The keys that a file set carry a place; a table header is kept when one of its keys is.
	header := ""
	for line := range strings.Lines(full.String()) {
		switch {
		case strings.HasPrefix(line, "[") && !strings.Contains(line, " # "):
			header = line
		case strings.Contains(line, " # "):
			out.WriteString(header + line)
			header = ""
		}
	}
	return out.String()
}
