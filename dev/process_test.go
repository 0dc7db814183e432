package dev

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	rest := " 1 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 8 9"
	for _, tt := range []struct {
		text    string
		start   uint64
		running bool
		bad     bool
	}{
		{"42 (dstack-gw) S" + rest, 987654, true, false},
		{"42 (a) R (b) Z" + rest, 987654, false, false},
		{"42 (odd) name)) R" + rest, 987654, true, false},
		{"42 (x) S 1 1", 0, false, true},
		{"", 0, false, true},
	} {
		start, running, err := parseStat([]byte(tt.text))
		if start != tt.start || err == nil && running != tt.running || (err != nil) != tt.bad {
			t.Errorf("%q: got %d, %v, %v", tt.text, start, running, err)
		}
	}
}

func testState(t *testing.T) state {
	t.Helper()
	s := state{filepath.Join(t.TempDir(), "state")}
	if err := s.create(); err != nil {
		t.Fatal(err)
	}
	return s
}

func sleeper(t *testing.T, inputs ...string) process {
	t.Helper()
	path, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	return process{name: "sleeper", argv: []string{path, "1000"}, inputs: inputs}
}

func TestProcessLife(t *testing.T) {
	s := testState(t)
	input := filepath.Join(s.dir, "input")
	write := func(text string) {
		if err := os.WriteFile(input, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	ensure := func() *running {
		t.Helper()
		r, err := s.ensure(sleeper(t, input))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := r.stop(time.Second); err != nil {
				t.Error(err)
			}
			<-r.died
		})
		return r
	}
	first := ensure()
	if !first.fresh || !first.alive() {
		t.Fatal("it does not run")
	}
	if again := ensure(); again.fresh || again.PID != first.PID {
		t.Error("a process that runs is started again")
	}
	if found, err := s.strays(nil); err != nil || !slices.Contains(found, first.PID) {
		t.Errorf("the process is not found by its mark: %v, %v", found, err)
	}
	if found, err := (state{s.dir + "-other"}).strays(nil); err != nil || len(found) != 0 {
		t.Errorf("another environment claims processes %v, %v", found, err)
	}
	write("two")
	second := ensure()
	if !second.fresh || second.PID == first.PID || first.alive() {
		t.Error("a changed input does not restart the process")
	}
	// A number that somebody else has now is not ours.
	other := second.record
	other.Start++
	if other.alive() {
		t.Error("a later process with the same number counts as ours")
	}
	if err := other.stop(0); err != nil || !second.alive() {
		t.Errorf("a stranger was stopped (%v)", err)
	}
	if err := killAll([]int{second.PID}); err != nil {
		t.Error(err)
	}
	<-second.died
	if third := ensure(); !third.fresh {
		t.Error("a dead process counts as running")
	}
}

// A process that ignores the request to end is killed with what it started.
func TestStopKills(t *testing.T) {
	s := testState(t)
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	ready := filepath.Join(s.dir, "ready")
	p := process{name: "stubborn", argv: []string{sh, "-c", fmt.Sprintf("trap '' TERM; sleep 1000 & echo $! > %s; wait; wait", ready)}}
	r, err := s.ensure(p)
	if err != nil {
		t.Fatal(err)
	}
	var child int
	for deadline := time.Now().Add(5 * time.Second); child == 0; time.Sleep(10 * time.Millisecond) {
		if text, err := os.ReadFile(ready); err == nil {
			fmt.Sscan(string(text), &child)
		}
		if time.Now().After(deadline) {
			t.Fatal("the process did not start")
		}
	}
	if err := r.stop(100 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if err := awaitEnd([]int{child}); err != nil {
		t.Error(err)
	}
	<-r.died
}

func TestStartTellsWhy(t *testing.T) {
	s := testState(t)
	if _, err := s.ensure(process{name: "none", argv: []string{"/nonexistent/program"}}); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("got %v", err)
	}
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.ensure(process{name: "short", argv: []string{sh, "-c", "echo the reason; exec sleep 0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	<-r.died
	if got := s.tail("short", 3); !strings.Contains(got, "the reason") {
		t.Errorf("the log's end is %q", got)
	}
}

// The state directory is refused when it is somebody's, and leaves files of
// others alone.
func TestStateDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "private"), 0o700); err != nil {
		t.Fatal(err)
	}
	treasure := filepath.Join(dir, "private", "treasure")
	if err := os.WriteFile(treasure, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (state{dir}).create(); err == nil {
		t.Error("a directory with files of others is taken over")
	}
	var out strings.Builder
	if err := Down(t.Context(), dir, "dstest", false, &out); err != nil || !strings.Contains(out.String(), "Nothing is up") {
		t.Errorf("got %q, %v", out.String(), err)
	}
	if _, err := os.Stat(treasure); err != nil {
		t.Error("down removed a file of others")
	}

	s := testState(t)
	unlock, err := s.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.lock(); err == nil {
		t.Error("two commands get the lock")
	}
	unlock()
	if unlock, err = s.lock(); err != nil {
		t.Fatal(err)
	}
	unlock()
	if err := s.create(); err != nil {
		t.Errorf("the own directory is refused: %v", err)
	}
	if info, err := os.Stat(s.private()); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("private has mode %v, %v", info.Mode(), err)
	}
}

func TestSudo(t *testing.T) {
	if argv, err := Sudo(0, []string{"dstack", "dev", "up"}); argv != nil || err != nil {
		t.Errorf("root gets %v, %v", argv, err)
	}
	dir := t.TempDir()
	sudo := filepath.Join(dir, "sudo")
	if err := os.WriteFile(sudo, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	argv, err := Sudo(1000, []string{"/x/dstack", "dev", "up"})
	if want := []string{sudo, "--", "/x/dstack", "dev", "up"}; err != nil || !slices.Equal(argv, want) {
		t.Errorf("got %v, %v, want %v", argv, err, want)
	}
}
