package wireguard

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The rig of the tunnel tests. The test binary starts itself again in a fresh
// network namespace, which is the gateway's, and once more for every guest:
//
//	 gateway (this test, re-executed)          guest n (runGuest)
//	+-----------------------------+          +----------------------+
//	| wg-test 10.8.255.254/16     |          | wg0 10.8.0.n/32      |
//	|   device under test         |  tunnel  |   wireguard-go, echo |
//	|      \____________________ = = = = = = = ______/ on TCP 7000  |
//	| vg<n> 10.99.n.1/24   -------- veth ------ eth0 10.99.n.2/24   |
//	+-----------------------------+          +----------------------+
//
// Nothing of it is visible outside, and all of it goes with the processes.

const (
	guestEnv = "WIREGUARD_TEST_GUEST"
	netnsEnv = "WIREGUARD_TEST_NETNS"
	// modeEnv chooses the mode under test, userspace if unset. The VM script
	// sets it to kernel.
	modeEnv = "WIREGUARD_TEST_MODE"
	// slowEnv, if set, makes fewer changes a second: an emulated CPU is 20
	// times slower.
	slowEnv = "WIREGUARD_TEST_SLOW"

	echoPort  = 7000
	guestPort = 9182
)

// inNetns runs the calling test in a namespace of its own and reports whether
// this process is the one inside.
func inNetns(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("creating network namespaces needs root")
	}
	if os.Getenv(netnsEnv) != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), netnsEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in the namespace: %v", err)
	}
	if err != nil || testing.Verbose() {
		t.Logf("output from the namespace:\n%s", out)
	}
	if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Error("the test did not run in the namespace")
	}
	return false
}

// gatewayNamespace prepares the gateway's side of the rig.
func gatewayNamespace(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	// A private /var/run/wireguard, so that the default socket path is tested
	// and nothing is left on the machine.
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = os.MkdirAll("/var/run/wireguard", 0o700)
	}
	if err == nil {
		err = unix.Mount("none", "/var/run/wireguard", "tmpfs", 0, "mode=0700")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// guest is the far end of one tunnel.
type guest struct {
	n       int
	private wgtypes.Key
	cmd     *exec.Cmd
	in      *json.Encoder
	out     *bufio.Scanner
}

// order is what a guest is told; it answers with a line.
type order struct {
	Op       string // up: addresses and echo; tunnel: a new WireGuard device
	N        int
	IP       netip.Addr
	Private  wgtypes.Key
	Gateway  wgtypes.Key    // public key
	Endpoint netip.AddrPort // of the gateway, invalid: the guest waits to be called
}

func mustKey(t testing.TB) wgtypes.Key {
	t.Helper()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// startGuest brings guest n up with its veth, but without a tunnel.
func startGuest(t *testing.T, n int) *guest {
	t.Helper()
	g := &guest{n: n, private: mustKey(t)}
	g.cmd = exec.Command("/proc/self/exe")
	g.cmd.Env = append(os.Environ(), guestEnv+"=1")
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	g.cmd.Stderr = os.Stderr
	in, err := g.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // the guest ends with its input
		if err := g.cmd.Wait(); err != nil {
			t.Errorf("guest %d: %v", n, err)
		}
	})
	g.in, g.out = json.NewEncoder(in), bufio.NewScanner(out)

	name := fmt.Sprintf("vg%d", n)
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name, MTU: 1500},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsPid(g.cmd.Process.Pid),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	if err := (rtnl{}).bringUp(name, netip.PrefixFrom(vethIP(n, 1), 24)); err != nil {
		t.Fatal(err)
	}
	g.tell(t, order{Op: "up", N: n})
	return g
}

func vethIP(n, side int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, byte(n), byte(side)}) }

func (g *guest) peer() Peer {
	return Peer{ID: fmt.Sprintf("guest-%d", g.n), PublicKey: g.private.PublicKey(), IP: testIP(g.n)}
}

// tunnel gives the guest its end; call: it knows the gateway's address and
// starts the handshake, as real guests do.
func (g *guest) tunnel(t *testing.T, gateway wgtypes.Key, port int, call bool) {
	t.Helper()
	o := order{Op: "tunnel", N: g.n, IP: testIP(g.n), Private: g.private, Gateway: gateway}
	if call {
		o.Endpoint = netip.AddrPortFrom(vethIP(g.n, 1), uint16(port))
	}
	g.tell(t, o)
}

func (g *guest) tell(t *testing.T, o order) {
	t.Helper()
	if err := g.in.Encode(o); err != nil {
		t.Fatalf("guest %d: %v", g.n, err)
	}
	if !g.out.Scan() {
		t.Fatalf("guest %d ended: %v", g.n, g.out.Err())
	}
	if s := g.out.Text(); s != "ok" {
		t.Fatalf("guest %d: %s", g.n, s)
	}
}

// runGuest is the whole guest process.
func runGuest() {
	in := json.NewDecoder(os.Stdin)
	var dev *device.Device
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			if dev != nil {
				dev.Close()
			}
			return
		}
		var err error
		switch o.Op {
		case "up":
			if err = (rtnl{}).bringUp("lo", netip.MustParsePrefix("127.0.0.1/8")); err == nil {
				err = (rtnl{}).bringUp("eth0", netip.PrefixFrom(vethIP(o.N, 2), 24))
			}
			if err == nil {
				err = echo()
			}
		case "tunnel":
			if dev != nil {
				dev.Close()
			}
			dev, err = guestTunnel(o)
		default:
			err = fmt.Errorf("unknown order %q", o.Op)
		}
		if err != nil {
			fmt.Println(err)
		} else {
			fmt.Println("ok")
		}
	}
}

func guestTunnel(o order) (*device.Device, error) {
	t, err := tun.CreateTUN("wg0", 1420)
	if err != nil {
		return nil, err
	}
	dev := device.NewDevice(t, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
	conf := fmt.Sprintf("private_key=%x\nlisten_port=%d\npublic_key=%x\nallowed_ip=10.8.255.254/32\n", o.Private[:], guestPort, o.Gateway[:])
	if o.Endpoint.IsValid() {
		conf += fmt.Sprintf("endpoint=%s\npersistent_keepalive_interval=25\n", o.Endpoint)
	}
	if err := dev.IpcSet(conf); err != nil {
		return nil, err
	}
	if err := dev.Up(); err != nil {
		return nil, err
	}
	// The mask stands in for the route to the gateway.
	return dev, (rtnl{}).bringUp("wg0", netip.PrefixFrom(o.IP, 16))
}

func echo() error {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{Port: echoPort})
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return nil
}

// ask sends a line through the tunnel to ip and waits for it to come back.
func ask(ip netip.Addr, timeout time.Duration) error {
	d := net.Dialer{Timeout: timeout, KeepAlive: -1}
	c, err := d.Dial("tcp4", netip.AddrPortFrom(ip, echoPort).String())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	msg := "hello through the tunnel\n"
	if _, err := io.WriteString(c, msg); err != nil {
		return err
	}
	got := make([]byte, len(msg))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != msg {
		return fmt.Errorf("sent %q, got %q", msg, got)
	}
	return nil
}
