package dev

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/dev/cvm"
)

// The story: a machine (this test binary once more, in a network and a mount
// namespace of its own) on which somebody runs the real dstack and dstack-gw, and
// pastes the lines with the real curl.
//
//	up, up again, paste all lines, kill a CVM, repair, kill the gateway, repair, down

const (
	machineEnv  = "DSTACK_DEV_TEST_MACHINE" // directory with the programs
	storyBudget = 4 * time.Minute
)

// onMachine runs the calling test on a fresh machine and reports whether this
// process is there.
func onMachine(t *testing.T) (programs string, inside bool) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and WireGuard need root")
	}
	if dir := os.Getenv(machineEnv); dir != "" {
		bootMachine(t)
		return dir, true
	}
	dir := buildPrograms(t)
	ctx, cancel := context.WithTimeout(t.Context(), storyBudget)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), machineEnv+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// With a PID namespace nothing outlives the machine.
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("on the machine: %v", err)
	}
	if err != nil || testing.Verbose() {
		t.Logf("output of the machine:\n%s", out)
	}
	if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Error("the test did not run on the machine")
	}
	return "", false
}

// buildPrograms builds once for all tests. TestMain removes the directory.
func buildPrograms(t *testing.T) string {
	t.Helper()
	if builtPrograms != "" {
		return builtPrograms
	}
	dir, err := os.MkdirTemp("", "dstack-dev-test")
	if err != nil {
		t.Fatal(err)
	}
	// As make build does it, so that its cache serves. Root builds in a checkout of
	// somebody else, where git would refuse to tell the version.
	build := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-o", dir, "../cmd/dstack", "../cmd/dstack-gw")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		t.Fatalf("build the programs: %v\n%s", err, out)
	}
	builtPrograms = dir
	return dir
}

var builtPrograms string

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if builtPrograms != "" {
			os.RemoveAll(builtPrograms)
		}
		os.Exit(code)
	}))
}

// bootMachine gives the machine its own /proc and /run.
func bootMachine(t *testing.T) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(unix.Mount("proc", "/proc", "proc", 0, ""))
	must(unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"))
	must(unix.Mount("tmpfs", "/var/lib", "tmpfs", 0, "mode=755")) // DefaultStateDir
	// As a machine has them that once used either.
	must(os.Mkdir("/run/netns", 0o755))
	must(os.Mkdir("/run/wireguard", 0o755))
	lo, err := netlink.LinkByName("lo")
	must(err)
	must(netlink.LinkSetUp(lo))
}

// person is who works on the machine.
type person struct {
	t     *testing.T
	path  string // of the program dstack
	state string
	extra []string // flags of up
}

// dstack runs "dstack dev ..." and wants it to succeed.
func (u *person) dstack(args ...string) string {
	u.t.Helper()
	out, err := u.try(args...)
	if err != nil {
		u.t.Fatalf("dstack dev %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (u *person) try(args ...string) (string, error) {
	if args[0] == "up" {
		args = append(args, u.extra...)
	}
	out, err := exec.Command(u.path, append([]string{"dev"}, args...)...).CombinedOutput()
	return string(out), err
}

// get asks a label for its page, as one connection.
func (u *person) get(host string) (string, error) {
	cmd := exec.Command("curl", "-sS", "--fail", "--max-time", "10", "--cacert", state{u.state}.webCA(),
		"--connect-to", "::127.0.0.1:8443", "https://"+host+"/")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	return string(out), nil
}

func (u *person) record(name string) *record {
	u.t.Helper()
	r, err := state{u.state}.readRecord(name)
	if err != nil || r == nil {
		u.t.Fatalf("no record of process %s: %v", name, err)
	}
	return r
}

func (u *person) pids() map[string]int {
	u.t.Helper()
	pids := make(map[string]int)
	for _, name := range []string{"gateway", "dns", "web-1", "web-2", "api-1"} {
		pids[name] = u.record(name).PID
	}
	return pids
}

func (u *person) cvmStatus(name string) *cvm.Status {
	u.t.Helper()
	st, err := cvm.ReadStatus(filepath.Join(state{u.state}.cvm(name), cvm.FileStatus))
	if err != nil {
		u.t.Fatal(err)
	}
	return st
}

// eventually repeats f until it is content.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// machineView is what may not change from before up to after down.
func machineView(t *testing.T) string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, l := range links {
		a := l.Attrs()
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, a.Name, a.Flags, a.Alias, addrs)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(&b, routes)
	rules, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	fmt.Fprintln(&b, string(rules), err)
	for _, dir := range []string{"/run/netns", "/run/wireguard", "/usr/sbin/policy-rc.d"} {
		entries, err := os.ReadDir(dir)
		if err == nil {
			fmt.Fprintln(&b, dir, len(entries))
		}
	}
	return b.String()
}

// pasteREADME runs the README's example lines at the top of a checkout.
func pasteREADME(t *testing.T, programs string) {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, found := strings.Cut(string(text), "```sh\nCA=")
	block, _, closed := strings.Cut(block, "```")
	if !found || !closed {
		t.Fatal("the README has no block of lines that begins with CA=")
	}
	checkout := t.TempDir()
	if err := os.Symlink(programs, filepath.Join(checkout, "bin")); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace("CA="+block), "\n")
	for _, l := range lines[1:] {
		cmd := exec.Command("sh", "-c", lines[0]+"\n"+l)
		cmd.Dir = checkout
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "web-") {
			t.Errorf("from the README: %s\n%v: %s", l, err, out)
		}
	}
	if len(lines) < 8 {
		t.Errorf("the README has only %d lines", len(lines))
	}
}

func TestStory(t *testing.T) {
	programs, inside := onMachine(t)
	if !inside {
		return
	}
	u := &person{
		t: t, path: filepath.Join(programs, "dstack"), state: DefaultStateDir,
		extra: []string{"--refresh", "2s", "--poll", "500ms"},
	}
	apps, err := plan()
	if err != nil {
		t.Fatal(err)
	}
	web := apps[0]
	page := web.id + "-8080.apps.dstack.test"

	// A network of somebody else is in the way.
	foreign := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "dstackdev-br"}}
	if err := netlink.LinkAdd(foreign); err != nil {
		t.Fatal(err)
	}
	if out, err := u.try("up"); err == nil || !strings.Contains(out, "there is an interface dstackdev-br that dstack dev did not make") {
		t.Errorf("up over a foreign interface: %v\n%s", err, out)
	}
	if err := netlink.LinkDel(foreign); err != nil {
		t.Fatalf("the foreign interface was touched: %v", err)
	}
	lan := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "lan0"}}
	if err := netlink.LinkAdd(lan); err != nil {
		t.Fatal(err)
	}
	addr, err := netlink.ParseAddr("10.212.0.1/14")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(lan, addr); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lan); err != nil {
		t.Fatal(err)
	}
	if out, err := u.try("up"); err == nil || !strings.Contains(out, "choose another network with --uplink") {
		t.Errorf("up over a network that is in use: %v\n%s", err, out)
	}
	u.dstack("down")
	before := machineView(t)
	u.extra = append(u.extra, "--uplink", "192.168.213.0/24", "--overlay", "192.168.214.0/24")

	// up, and once more.
	out := u.dstack("up")
	t.Logf("first up:\n%s", out)
	pids := u.pids()
	u.dstack("up")
	for name, pid := range u.pids() {
		if pid != pids[name] {
			t.Errorf("the second up started %s again", name)
		}
	}
	if st := u.dstack("status"); !strings.Contains(st, "web-2") {
		t.Errorf("status:\n%s", st)
	}

	// Every printed line, as it is pasted into a shell.
	facts, err := ReadFacts(u.state)
	if err != nil {
		t.Fatal(err)
	}
	printed := u.dstack("lines")
	if len(facts.Lines) < 9 {
		t.Errorf("only %d lines", len(facts.Lines))
	}
	for _, l := range facts.Lines {
		for where, text := range map[string]string{"up": out, "lines": printed} {
			if !strings.Contains(text, "\n"+l.Shell()+"\n") {
				t.Errorf("%s does not print %q", where, l.Shell())
			}
		}
		got, err := exec.Command("sh", "-c", l.Shell()).Output()
		ok := false
		for _, w := range l.Want {
			ok = ok || strings.Contains(string(got), w)
		}
		if err != nil || !ok {
			t.Errorf("%s: %q, %v", l.Shell(), got, err)
		}
	}

	pasteREADME(t, programs)

	// A port that the app did not open.
	if got, err := u.get(web.id + "-8090.apps.dstack.test"); err == nil {
		t.Errorf("the guest agent's port is open although the policy does not list it: %q", got)
	}

	// Registrations go on and change nothing.
	first := u.cvmStatus("web-2")
	eventually(t, "web-2 registers again", func() error {
		if st := u.cvmStatus("web-2"); st.Registrations < first.Registrations+2 || st.Failures > 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if st := u.cvmStatus("web-2"); st.ClientIP != first.ClientIP || !st.Handshake.Equal(first.Handshake) && st.Handshake.Before(first.Handshake) {
		t.Errorf("refreshing changed the tunnel: %+v, then %+v", first, st)
	}

	// A CVM dies without a word: nobody notices.
	u.dstack("kill", "web-1")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				start := time.Now()
				got, err := u.get(page)
				if took := time.Since(start); err != nil || !strings.HasPrefix(got, "web-2 ") || took > 3*time.Second {
					t.Errorf("after the death of web-1: %q, %v, %v", got, err, took)
				}
			}
		})
	}
	wg.Wait()
	if out, err := u.try("status"); err == nil || !strings.Contains(out, "does not run") {
		t.Errorf("status does not miss web-1: %v\n%s", err, out)
	}
	address := u.cvmStatus("web-1").ClientIP
	u.dstack("up") // wants answers of both
	if st := u.cvmStatus("web-1"); st.ClientIP != address {
		t.Errorf("web-1 came back as %s, was %s", st.ClientIP, address)
	}

	// The gateway dies without a word, with connections under way, and comes back
	// with all it knew.
	gateway := u.record("gateway")
	if err := unix.Kill(gateway.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "web-1 notices", func() error {
		if st := u.cvmStatus("web-1"); !strings.Contains(st.Error, "register at https://192.168.213.1:8010") {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	addresses := map[string]string{"web-1": u.cvmStatus("web-1").ClientIP, "web-2": u.cvmStatus("web-2").ClientIP}
	u.dstack("up")
	if now := u.record("gateway"); now.PID == gateway.PID {
		t.Error("the gateway was not started again")
	}
	for name, old := range addresses {
		if st := u.cvmStatus(name); st.ClientIP != old {
			t.Errorf("%s has another address after the restart: %s, was %s", name, st.ClientIP, old)
		}
	}
	for range 10 {
		if got, err := u.get(page); err != nil {
			t.Errorf("after the restart: %q, %v", got, err)
		}
	}

	// Other options: the same environment elsewhere.
	u.dstack("up", "--proxy", "127.0.0.1:9443")
	if facts, err = ReadFacts(u.state); err != nil || facts.Proxy != "127.0.0.1:9443" {
		t.Errorf("facts %+v, %v", facts, err)
	}

	// Its record lost and killed meanwhile: down finds it all the same.
	if err := os.Remove(state{u.state}.record("web-2")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(u.record("gateway").PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	u.dstack("down")
	if after := machineView(t); after != before {
		t.Errorf("down left traces; before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := os.Stat(u.state); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
	if left, err := processes(func(pid int) bool { return pid != 1 && pid != os.Getpid() }); err != nil || len(left) > 0 {
		for _, pid := range left {
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			t.Errorf("process %d is still there: %q", pid, name)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if out := u.dstack("down"); !strings.Contains(out, "Nothing is up") {
		t.Errorf("down on nothing says %q", out)
	}
}

// A gateway that does not start is reported with its own words, and what was
// started is removed by down.
func TestStoryGatewayFails(t *testing.T) {
	programs, inside := onMachine(t)
	if !inside {
		return
	}
	u := &person{t: t, path: filepath.Join(programs, "dstack"), state: DefaultStateDir}
	taken, err := net.Listen("tcp", "127.0.0.1:8443")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	before := machineView(t)
	out, err := u.try("up")
	if err == nil || !strings.Contains(out, "8443") || !strings.Contains(out, "in use") {
		t.Errorf("up with the proxy's port taken: %v\n%s", err, out)
	}
	if out, err := u.try("status"); err == nil {
		t.Errorf("status is content:\n%s", out)
	}
	u.dstack("down", "--keep")
	var kept []string
	for _, f := range []string{"ca/root-ca.key", "gateway/wg.key"} {
		if _, err := os.Stat(state{u.state}.private(f)); err == nil {
			kept = append(kept, f)
		}
	}
	if len(kept) != 2 {
		t.Errorf("down --keep kept only %v", kept)
	}
	u.dstack("down")
	if after := machineView(t); after != before {
		t.Errorf("down left traces; before:\n%s\nafter:\n%s", before, after)
	}
	if _, err := os.Stat(u.state); !os.IsNotExist(err) {
		t.Errorf("the state is still there: %v", err)
	}
}
