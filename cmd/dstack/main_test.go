package main

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	empty := t.TempDir()
	for _, tt := range []struct {
		args string
		out  string // contained in the output
		err  string // contained in the error or in what is printed beside it
		is   error
	}{
		{"version", "dstack v0.", "", nil},
		{"--help", "dev up", "", nil},
		{"", "", "Usage: dstack dev", errUsage},
		{"dev", "", "Usage: dstack dev", errUsage},
		{"dev nonsense", "", "Usage: dstack dev", errUsage},
		{"dev up -h", "", "-wireguard-port port", flag.ErrHelp},
		{"dev up now", "", "got 1 operands, want 0", errUsage},
		{"dev up --proxy 8443", "", "-proxy", errUsage},
		{"dev up --rpc-port 65536", "", "want a number from 1 to 65535", errUsage},
		// Refused before anybody is asked for a password.
		{"dev up --name Dev", "", "small letters", nil},
		{"dev up --overlay 10.0.0.0/8", "", "overlap", nil},
		{"dev kill", "", "got 0 operands, want 1", errUsage},
		{"dev lines --state " + empty, "", "nothing is up in " + empty, nil},
		{"dev grpc --state " + empty + " x-50051g", "", "nothing is up in " + empty, nil},
		{"dev cvm " + empty + "/cvm.json", "", "read the CVM's configuration", nil},
		{"dev dns here zone.json", "", "address of the DNS server", nil},
	} {
		var out, errOut bytes.Buffer
		err := run(t.Context(), strings.Fields(tt.args), &out, &errOut)
		if tt.is != nil && !errors.Is(err, tt.is) || (err != nil) != (tt.err != "") {
			t.Errorf("dstack %s: error %v", tt.args, err)
		}
		said := errOut.String()
		if err != nil {
			said += err.Error()
		}
		if !strings.Contains(out.String(), tt.out) || !strings.Contains(said, tt.err) {
			t.Errorf("dstack %s: printed %q and %q", tt.args, out.String(), said)
		}
	}
}

func TestGatewayIsFoundBeside(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", t.TempDir())
	self := filepath.Join(dir, "dstack")
	if _, err := gateway("", self); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("got %v", err)
	}
	beside := filepath.Join(dir, "dstack-gw")
	if err := os.WriteFile(beside, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := gateway("", self); err != nil || got != beside {
		t.Errorf("got %s, %v", got, err)
	}
	if got, err := gateway("/opt/dstack-gw", self); err != nil || got != "/opt/dstack-gw" {
		t.Errorf("got %s, %v", got, err)
	}
}
