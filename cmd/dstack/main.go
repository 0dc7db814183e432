// Command dstack is the user's tool. Its one group of commands so far, dev,
// brings up a platform on this machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/dstack-gw/dstack-gw/dev"
	"github.com/dstack-gw/dstack-gw/dev/cvm"
)

// Set by the linker (make build).
var (
	version  = "0.6.0"
	revision = "0000000000000000000000000000000000000000"
)

const usage = `Usage: dstack dev <command> [flags]
       dstack version

  dev up           bring up gateway, apps and tunnels, or repair them; prints lines to try
  dev status       processes, tunnels, lines; fails if something is missing
  dev down         remove everything again
  dev kill <cvm>   take a CVM from the network as a power failure does (web-1, web-2, api-1)
  dev lines        the lines to try
  dev grpc <name>  one gRPC health check through the gateway, by a name such as <app>-50051g

"dstack dev up -h" shows the flags.
`

// errUsage has been explained already.
var errUsage = errors.New("bad usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "dstack: "+err.Error())
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out, errOut io.Writer) error {
	switch {
	case len(args) == 1 && (args[0] == "version" || args[0] == "--version"):
		fmt.Fprintf(out, "dstack v%s (git:%.20s)\n", version, revision)
		return nil
	case len(args) == 1 && (args[0] == "-h" || args[0] == "--help" || args[0] == "help"):
		fmt.Fprint(out, usage)
		return nil
	case len(args) >= 2 && args[0] == "dev":
		if cmd, ok := commands()[args[1]]; ok {
			return cmd(ctx, args[2:], out, errOut)
		}
	}
	fmt.Fprint(errOut, usage)
	return errUsage
}

type command func(ctx context.Context, args []string, out, errOut io.Writer) error

func commands() map[string]command {
	return map[string]command{
		"up": up, "status": status, "down": down, "kill": kill, "lines": lines, "grpc": grpc,
		// Processes that up starts.
		"cvm": runCVM, "dns": runDNS,
	}
}

// flags makes the flag set of a command, with its operands for the usage text.
func flags(name, operands string, errOut io.Writer) *flag.FlagSet {
	f := flag.NewFlagSet("dstack dev "+name, flag.ContinueOnError)
	f.SetOutput(errOut)
	f.Usage = func() {
		fmt.Fprintf(errOut, "Usage: dstack dev %s [flags]%s\n", name, operands)
		f.PrintDefaults()
	}
	return f
}

// parse wants exactly n operands.
func parse(f *flag.FlagSet, args []string, n int) error {
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if f.NArg() != n {
		fmt.Fprintf(f.Output(), "got %d operands, want %d\n", f.NArg(), n)
		f.Usage()
		return errUsage
	}
	return nil
}

// stateFlag is in all commands.
func stateFlag(f *flag.FlagSet) *string {
	return f.String("state", dev.DefaultStateDir, "`directory` of the environment")
}

// asRoot starts the command again through sudo unless this is root; done says
// that it has run.
func asRoot(ctx context.Context, out, errOut io.Writer) (done bool, err error) {
	self, err := os.Executable()
	if err != nil {
		return false, fmt.Errorf("find this program: %w", err)
	}
	argv, err := dev.Sudo(os.Geteuid(), append([]string{self}, os.Args[1:]...))
	if err != nil || argv == nil {
		return false, err
	}
	fmt.Fprintln(errOut, "Root is needed for network namespaces and WireGuard; sudo may ask for your password.")
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, out, errOut
	cmd.Cancel = func() error { return nil } // Ctrl-C reaches sudo by itself
	err = cmd.Run()
	if code := (*exec.ExitError)(nil); errors.As(err, &code) && code.Exited() {
		os.Exit(code.ExitCode()) // it has said why
	}
	return true, err
}

func up(ctx context.Context, args []string, out, errOut io.Writer) error {
	o := dev.Defaults()
	f := flags("up", "", errOut)
	f.StringVar(&o.StateDir, "state", o.StateDir, "`directory` for keys, logs and data")
	f.StringVar(&o.Name, "name", o.Name, "begin of the names of interfaces and namespaces")
	f.StringVar(&o.BaseDomain, "base-domain", o.BaseDomain, "`domain` of the apps")
	f.StringVar(&o.CustomDomain, "custom-domain", o.CustomDomain, "`domain` that a TXT record leads to an app")
	f.TextVar(&o.Proxy, "proxy", o.Proxy, "IPv4 `address:port` for connections to apps")
	f.TextVar(&o.Admin, "admin", o.Admin, "loopback `address:port` of the admin server")
	f.TextVar(&o.DNS, "dns", o.DNS, "loopback `address:port` of the DNS server with the TXT record")
	f.Func("rpc-port", "TCP `port` on the bridge where CVMs register (default "+fmt.Sprint(o.RPCPort)+")", port(&o.RPCPort))
	f.Func("wireguard-port", "UDP `port` of the tunnels (default "+fmt.Sprint(o.WireGuardPort)+")", port(&o.WireGuardPort))
	f.TextVar(&o.Uplink, "uplink", o.Uplink, "`network` between this machine and the CVMs")
	f.TextVar(&o.Overlay, "overlay", o.Overlay, "`network` inside the tunnels")
	f.StringVar(&o.WireGuard, "wireguard", o.WireGuard, "auto, kernel or userspace")
	f.DurationVar(&o.Refresh, "refresh", o.Refresh, "time between two registrations of a CVM")
	f.DurationVar(&o.Stale, "stale", o.Stale, "age of the last handshake at which a CVM builds its tunnel anew")
	f.DurationVar(&o.Poll, "poll", o.Poll, "how often a CVM looks at its tunnel")
	f.StringVar(&o.Gateway, "gateway", "", "dstack-gw `program` (default: beside this one, then in PATH)")
	if err := parse(f, args, 0); err != nil {
		return err
	}
	if err := o.Check(); err != nil { // before anybody types a password
		return err
	}
	if done, err := asRoot(ctx, out, errOut); done || err != nil {
		return err
	}
	var err error
	if o.Self, err = os.Executable(); err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	if o.Gateway, err = gateway(o.Gateway, o.Self); err != nil {
		return err
	}
	return dev.Up(ctx, o, out)
}

func port(to *uint16) func(string) error {
	return func(s string) error {
		// netip knows what a port is.
		a, err := netip.ParseAddrPort("0.0.0.0:" + s)
		if err != nil || a.Port() == 0 {
			return errors.New("want a number from 1 to 65535")
		}
		*to = a.Port()
		return nil
	}
}

// gateway finds dstack-gw.
func gateway(given, self string) (string, error) {
	if given != "" {
		return filepath.Abs(given)
	}
	beside := filepath.Join(filepath.Dir(self), "dstack-gw")
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	if p, err := exec.LookPath("dstack-gw"); err == nil {
		return filepath.Abs(p)
	}
	return "", fmt.Errorf("there is no dstack-gw, neither as %s nor in PATH: build it (make build) or name it with --gateway", beside)
}

func status(ctx context.Context, args []string, out, errOut io.Writer) error {
	f := flags("status", "", errOut)
	dir := stateFlag(f)
	if err := parse(f, args, 0); err != nil {
		return err
	}
	if done, err := asRoot(ctx, out, errOut); done || err != nil {
		return err
	}
	return dev.ReportStatus(ctx, *dir, out)
}

func down(ctx context.Context, args []string, out, errOut io.Writer) error {
	f := flags("down", "", errOut)
	dir := stateFlag(f)
	name := f.String("name", dev.Defaults().Name, "begin of the names, if the state is lost")
	keep := f.Bool("keep", false, "keep keys, certificates and the gateway's data for the next up")
	if err := parse(f, args, 0); err != nil {
		return err
	}
	if done, err := asRoot(ctx, out, errOut); done || err != nil {
		return err
	}
	return dev.Down(ctx, *dir, *name, *keep, out)
}

func kill(ctx context.Context, args []string, out, errOut io.Writer) error {
	f := flags("kill", " <cvm>", errOut)
	dir := stateFlag(f)
	if err := parse(f, args, 1); err != nil {
		return err
	}
	if done, err := asRoot(ctx, out, errOut); done || err != nil {
		return err
	}
	return dev.Kill(*dir, f.Arg(0), out)
}

func lines(_ context.Context, args []string, out, errOut io.Writer) error {
	f := flags("lines", "", errOut)
	dir := stateFlag(f)
	if err := parse(f, args, 0); err != nil {
		return err
	}
	return dev.PrintLines(*dir, out)
}

func grpc(ctx context.Context, args []string, out, errOut io.Writer) error {
	f := flags("grpc", " <name>", errOut)
	dir := stateFlag(f)
	if err := parse(f, args, 1); err != nil {
		return err
	}
	return dev.GRPC(ctx, *dir, f.Arg(0), out)
}

// logger writes to what up made the log file.
func logger(errOut io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(errOut, nil))
}

func runCVM(ctx context.Context, args []string, _, errOut io.Writer) error {
	f := flags("cvm", " <cvm.json>   (started by up, in the CVM's network namespace)", errOut)
	if err := parse(f, args, 1); err != nil {
		return err
	}
	c, err := cvm.LoadConfig(f.Arg(0))
	if err != nil {
		return err
	}
	return cvm.Run(ctx, c, logger(errOut))
}

func runDNS(ctx context.Context, args []string, _, errOut io.Writer) error {
	f := flags("dns", " <address:port> <zone.json>   (started by up)", errOut)
	if err := parse(f, args, 2); err != nil {
		return err
	}
	addr, err := netip.ParseAddrPort(f.Arg(0))
	if err != nil {
		return fmt.Errorf("address of the DNS server: %w", err)
	}
	text, err := os.ReadFile(f.Arg(1))
	if err != nil {
		return fmt.Errorf("DNS zone: %w", err)
	}
	zone, err := dev.ReadZone(text)
	if err != nil {
		return err
	}
	return dev.ServeDNS(ctx, addr, zone, logger(errOut))
}
