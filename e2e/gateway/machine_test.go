package gateway

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The machine: this test binary once more, alone in its network, its mounts and its processes. Whatever happens to it
// ends with it.
const (
	machineEnv = "DSTACK_GW_E2E_MACHINE" // directory with the binary, set inside
	// raceEnv, if set, has the race detector built into the binary for the whole suite: two minutes instead of one.
	// Everything but bounds on memory and time must hold there too.
	raceEnv = "DSTACK_GW_E2E_RACE"
)

// overlay is the whole WireGuard network of the tests. All of it is local to the machine, so a server on the machine is
// reached through the address of any instance, without a tunnel.
var overlay = netip.MustParsePrefix("10.8.0.0/16")

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	if os.Geteuid() != 0 {
		return m.Run() // every test skips itself and says why
	}
	if dir := os.Getenv(machineEnv); dir != "" {
		if err := boot(dir); err != nil {
			fmt.Fprintln(os.Stderr, "boot the machine:", err)
			return 1
		}
		// Most tests wait most of the time: for timeouts, penalties, starts.
		if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
			if err := f.Value.Set("4"); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "dstack-gw-e2e-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build dstack-gw:", err)
		return 1
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), machineEnv+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState == nil {
			fmt.Fprintln(os.Stderr, "start the machine:", err)
		}
		return 1
	}
	return 0
}

// build makes the binary under test.
func build(dir string) error { return buildAs(dir, raced()) }

func buildAs(out string, race bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	// Root is asked to build in a checkout of somebody else: git would refuse.
	args := []string{"build", "-buildvcs=false", "-ldflags", "-X main.version=" + version + " -X main.revision=" + revision, "-o", out}
	env := append(os.Environ(), "CGO_ENABLED=0")
	// As make build and make test-race do it, so that their caches serve.
	if race {
		args, env = append(args, "-race"), append(os.Environ(), "CGO_ENABLED=1")
	} else {
		args = append(args, "-trimpath")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "github.com/dstack-gw/dstack-gw/cmd/dstack-gw")...)
	cmd.Env = env
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, text)
	}
	return nil
}

// boot gives the machine its own /proc, /run and temporary files, and makes the overlay local.
func boot(dir string) error {
	tmp := filepath.Join(dir, "tmp")
	for _, step := range []func() error{
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount("proc", "/proc", "proc", 0, "") },
		func() error { return unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755") },
		func() error { return os.MkdirAll("/run/wireguard", 0o755) },
		func() error { return os.MkdirAll(tmp, 0o755) },
		// In memory: fsync of the disk of a busy test machine takes seconds, and nothing here cuts the power.
		func() error { return unix.Mount("tmpfs", tmp, "tmpfs", 0, "mode=755,size=4g") },
		func() error { return os.Setenv("TMPDIR", tmp) },
		func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(lo); err != nil {
				return err
			}
			r := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(overlay), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
			return netlink.RouteAdd(r)
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// needMachine is the first line of every test.
func needMachine(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network, mount and PID namespaces need root")
	}
}

// need finds a program of the machine.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed", program)
	}
	return path
}

// raced says that bounds on memory and time mean nothing: the race detector takes several times as much of both.
func raced() bool { return os.Getenv(raceEnv) != "" }

func binary() string { return filepath.Join(os.Getenv(machineEnv), "dstack-gw") }
