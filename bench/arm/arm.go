package arm

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/backend"
	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// Mode of a connection.
type Mode string

// Modes.
const (
	Passthrough Mode = "passthrough" // the ClientHello's name routes, the bytes are forwarded as they are
	Terminate   Mode = "terminate"   // the gateway ends TLS and forwards plaintext
)

// Service of the backend.
type Service string

// Services.
const (
	Requests Service = "requests"
	Bulk     Service = "bulk"
)

// Base is the base domain of all names, Instance the instance behind them.
const (
	Base     = "bench.test"
	Instance = "b0a7000000000000000000000000000000000001"
	App      = "a990000000000000000000000000000000000001"
)

// Host returns the name a client asks for: the gateway spec's grammar, which the peers route by as well.
func Host(m Mode, s Service) string { return HostOf(Instance, m, s) }

// HostOf returns the name of another instance's service.
func HostOf(instance string, m Mode, s Service) string {
	suffix := ""
	if m == Passthrough {
		suffix = "s"
	}
	return fmt.Sprintf("%s-%d%s.%s", instance, port(m, s), suffix, Base)
}

// port returns the backend's port.
func port(m Mode, s Service) uint16 {
	switch {
	case m == Passthrough && s == Requests:
		return backend.RequestPassthrough
	case m == Passthrough:
		return backend.BulkPassthrough
	case s == Requests:
		return backend.RequestPlain
	}
	return backend.BulkPlain
}

// Running is a started arm.
type Running struct {
	// Entry returns where a client connects.
	Entry func(Mode, Service) netip.AddrPort
	// PID is the root of the gateway's process tree, 0 if there is none.
	PID int
	// Facts, if not nil, asks the gateway for counters after the load.
	Facts func(context.Context) (map[string]string, error)
	// Control, if not nil, reaches the registration and admin interfaces.
	Control *Control
	// Process, if not nil, is the gateway itself.
	Process *rig.Process
}

// Arm is a contestant.
type Arm interface {
	// Name of the arm in tables and on the command line.
	Name() string
	// Check says why the arm cannot run on this machine, with the Debian package to install; nil if it can.
	Check() error
	// Version of the program, one line.
	Version(context.Context) (string, error)
	// Lacks says why the arm cannot do something, "" if it can.
	Lacks(Need) string
	// Config returns the effective configuration, for the report.
	Config() string
	// Start runs the arm in r. The rig ends its processes.
	Start(ctx context.Context, r *rig.Rig, c Certificate) (Running, error)
}

// Need is what a case asks of an arm.
type Need struct {
	Mode        Mode
	PostQuantum bool // terminating with X25519MLKEM768
	HalfClose   bool // one direction ends while the other goes on
	Control     bool // registrations
}

// packaged checks that a program of a Debian package is there.
func packaged(program, pkg string) error {
	if _, err := exec.LookPath(program); err != nil {
		return fmt.Errorf("program %s not found: install the Debian package %s", program, pkg)
	}
	return nil
}

// firstLine runs a program and returns the first line it prints.
func firstLine(ctx context.Context, argv ...string) (string, error) {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(out)))
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line, nil
}
