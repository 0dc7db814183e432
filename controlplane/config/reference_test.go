package config

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

func TestReferenceIsFresh(t *testing.T) {
	var page bytes.Buffer
	if err := GenerateReference(&page); err != nil {
		t.Fatal(err)
	}
	onDisk, err := os.ReadFile("../../docs/reference/config.md")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(page.Bytes(), onDisk) {
		t.Error("docs/reference/config.md is stale; run: go run ./controlplane/config/gendoc")
	}
}

// TestTable: every key stands once, says what it means, fits into a Markdown table, and has a place of its own.
func TestTable(t *testing.T) {
	paths, places := map[string]bool{}, map[any]string{}
	for _, s := range table(new(Config)) {
		if s.doc == "" {
			t.Errorf("[%s] has no description", s.path)
		}
		for _, k := range s.keys {
			path := join(s.path, k.name)
			if paths[path] {
				t.Errorf("%s stands twice", path)
			}
			paths[path] = true
			if other := places[k.to]; other != "" {
				t.Errorf("%s and %s write to the same place", path, other)
			}
			places[k.to] = path
			if k.doc == "" || strings.ContainsAny(k.doc+k.typeName()+k.defaultText(), "|\n") {
				t.Errorf("%s: bad description %q", path, k.doc)
			}
		}
	}
	for _, r := range retiredKeys() {
		if paths[r.path] {
			t.Errorf("%s is current and retired", r.path)
		}
		if r.to != "" && !paths[r.to] {
			t.Errorf("%s moves to %s, which does not exist", r.path, r.to)
		}
	}
}
