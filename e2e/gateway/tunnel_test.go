package gateway

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// namespace is a network namespace of its own, for as long as the test runs.
type namespace struct{ calls chan func() }

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range n.calls {
			f()
		}
	}()
	t.Cleanup(func() { close(n.calls) })
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	return n
}

// do runs f on a thread in the namespace. Sockets made and programs started by f belong there.
func (n *namespace) do(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	n.calls <- func() { done <- f() }
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// tunnelled makes a gateway with WireGuard in its process; guests reach it at outside.
func tunnelled(t *testing.T, more settings) *gateway {
	s := settings{"core.wg.mode": "userspace", "core.wg.interface": "wg-e2e", "core.wg.listen_port": 51830, "core.wg.endpoint": outside.String(), "core.wg.ip": "10.9.0.1/16",
		"core.wg.reserved_net": []string{"10.9.0.1/32"}, "core.wg.client_ip_range": "10.9.0.0/16"}
	for k, v := range more {
		s[k] = v
	}
	return newGateway(t, s)
}

var outside = netip.MustParseAddrPort("192.0.2.1:51830")

// cvm is a guest behind a tunnel, with its own network stack.
type cvm struct {
	*guest
	t   *testing.T
	n   int
	ns  *namespace
	dev *device.Device
	ip  netip.Addr // in the tunnel
}

// newCVM makes CVM number n of the machine: a namespace and a link to the machine, not yet registered.
func newCVM(t *testing.T, n int, v *guest) *cvm {
	t.Helper()
	c := &cvm{guest: v, t: t, n: n, ns: newNamespace(t)}
	var fd *os.File
	c.ns.do(t, func() (err error) {
		fd, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	defer fd.Close()
	name := fmt.Sprintf("e2e-cvm%d", n)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd.Fd())}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(veth) })
	machine, inside := netip.AddrFrom4([4]byte{172, 20, byte(n), 1}), netip.AddrFrom4([4]byte{172, 20, byte(n), 2})
	if err := bringUp(name, netip.PrefixFrom(machine, 24)); err != nil {
		t.Fatal(err)
	}
	c.ns.do(t, func() error {
		return errors.Join(bringUp("lo", netip.MustParsePrefix("127.0.0.1/8")), bringUp("eth0", netip.PrefixFrom(inside, 24)),
			netlink.RouteAdd(&netlink.Route{Gw: machine.AsSlice()}))
	})
	return c
}

func bringUp(name string, addr netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(addr)}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

// join registers the CVM and brings its tunnel up.
func (c *cvm) join(g *gateway) {
	c.t.Helper()
	ip, body := c.register(c.t, g)
	c.ip = ip
	var answer struct {
		WG struct {
			Servers []struct{ PK, Endpoint string } `json:"servers"`
		} `json:"wg"`
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || len(answer.WG.Servers) != 1 {
		c.t.Fatalf("%v: %s", err, body)
	}
	server, err := wgtypes.ParseKey(answer.WG.Servers[0].PK)
	if err != nil {
		c.t.Fatal(err)
	}
	c.ns.do(c.t, func() error {
		link, err := tun.CreateTUN("wg0", 1420)
		if err != nil {
			return err
		}
		c.dev = device.NewDevice(link, conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))
		err = c.dev.IpcSet(fmt.Sprintf("private_key=%x\nlisten_port=9182\npublic_key=%x\nallowed_ip=10.9.0.1/32\nendpoint=%s\npersistent_keepalive_interval=25\n", c.key[:], server[:], answer.WG.Servers[0].Endpoint))
		if err == nil {
			err = c.dev.Up()
		}
		return errors.Join(err, bringUp("wg0", netip.PrefixFrom(ip, 16)))
	})
	c.t.Cleanup(c.dev.Close)
}

// listen opens a port of the CVM.
func (c *cvm) listen(port int) (l net.Listener) {
	c.t.Helper()
	c.ns.do(c.t, func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	})
	return l
}

// nft runs a command of nft(8) inside the CVM.
func (c *cvm) nft(command string) {
	c.t.Helper()
	path := need(c.t, "nft")
	c.ns.do(c.t, func() error {
		out, err := exec.Command(path, command).CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft %s: %w: %s", command, err, out)
		}
		return nil
	})
}

// TestDeadBackends: one of two instances of an app dies in every way that real ones die, and nobody notices: every request
// is answered, and at most one of them waits, for less than a second.
func TestDeadBackends(t *testing.T) {
	g := tunnelled(t, nil)
	need(t, "nft")
	if err := bringUp("lo", netip.PrefixFrom(outside.Addr(), 32)); err != nil {
		t.Fatal(err)
	}
	g.start()
	site := web(t).issue(t, "*."+base)
	pair, err := tls.X509KeyPair(site.chain, site.key)
	if err != nil {
		t.Fatal(err)
	}
	var cvms []*cvm
	for n := range 2 {
		c := newCVM(t, n+1, newGuest(t, fmt.Sprintf("cvm %d", n)))
		c.join(g)
		servePages(t, c.listen(8080), "plain")
		servePages(t, tls.NewListener(c.listen(8443), &tls.Config{Certificates: []tls.Certificate{pair}}), "tls")
		cvms = append(cvms, c)
	}
	app := cvms[0].app
	online := func(want int) {
		t.Helper()
		within(t, 20*time.Second, func() error {
			if got := g.admin("GetMeta", ""); got != fmt.Sprintf(`{"registered":2,"online":%d}`, want) {
				return errors.New(got)
			}
			return nil
		})
	}
	online(2)

	// round makes n requests one after the other and says who answered and how many waited.
	round := func(what string, n, maySlow int) map[string]int {
		t.Helper()
		who, slow, worst := map[string]int{}, 0, time.Duration(0)
		for i := range n {
			label, text := app+"-8080", " plain"
			if i%2 == 1 {
				label, text = app+"-8443s", " tls"
			}
			began := time.Now()
			page, err := g.get(label, 5*time.Second)
			d := time.Since(began)
			worst = max(worst, d)
			if d > 190*time.Millisecond { // the head start of the first instance is 200 ms
				slow++
			}
			if err != nil || !strings.HasSuffix(page, text) || d > time.Second {
				t.Errorf("%s: request %d took %s: %v %q", what, i, d, err, page)
			}
			who[strings.TrimSuffix(page, text)]++
		}
		if slow > maySlow {
			t.Errorf("%s: %d of %d requests waited", what, slow, n)
		}
		t.Logf("%s: %d requests, %d waited, the slowest took %s, by %v", what, n, slow, worst.Round(time.Millisecond), who)
		return who
	}
	if who := round("both alive", 100, 0); len(who) != 2 {
		t.Errorf("one of two instances gets everything: %v", who)
	}

	// silent drops what comes to the servers of a CVM, closed answers with resets, healthy ends either.
	rule := func(c *cvm, verdict string) {
		c.nft("add table inet e2e; add chain inet e2e in { type filter hook input priority 0; }; add rule inet e2e in tcp dport { 8080, 8443 } " + verdict)
	}
	silent := func(c *cvm) { rule(c, "drop") }
	closed := func(c *cvm) { rule(c, "reject with tcp reset") }
	healthy := func(c *cvm) { c.nft("delete table inet e2e") }
	spared := func(who map[string]int, dead *cvm) {
		t.Helper()
		if who[dead.ip.String()] > 0 {
			t.Errorf("the dead instance answered: %v", who)
		}
	}
	a, b := cvms[0], cvms[1]

	silent(a)
	spared(round("A is silent", 100, 1), a)
	// By its own name there is nobody else to ask.
	began := time.Now()
	if page, err := g.get(a.instance+"-8080", 10*time.Second); err == nil {
		t.Errorf("the dead instance answered %q", page)
	}
	if d := time.Since(began); d < 4*time.Second || d > 7*time.Second {
		t.Errorf("core.proxy.timeouts.connect is 5 s, the connection ended after %s", d)
	}
	healthy(a)

	closed(b) // while A has a bad name
	spared(round("B is closed, A was silent until now", 100, 0), b)
	closed(a)
	began = time.Now()
	if page, err := g.get(app+"-8080", 5*time.Second); err == nil || time.Since(began) > time.Second {
		t.Errorf("both are closed: %v %q after %s", err, page, time.Since(began))
	}
	g.logged("connection refused", "reason=dial", "no instance of 2 tried")
	healthy(a)
	healthy(b)
	within(t, 20*time.Second, func() error {
		who := map[string]bool{}
		for range 8 {
			page, err := g.get(app+"-8080", 5*time.Second)
			if err != nil {
				t.Errorf("coming back: %v", err)
			}
			who[page] = true
		}
		if len(who) != 2 {
			return fmt.Errorf("only %v answers", who)
		}
		return nil
	})

	b.ns.do(t, b.dev.Down)
	spared(round("the tunnel of B is down", 100, 1), b)
	b.ns.do(t, b.dev.Up)

	// A restart in user space loses the tunnels' state; the gateway opens them again itself.
	g.kill()
	g.start()
	began = time.Now()
	within(t, 15*time.Second, func() error { _, err := g.get(app+"-8080", time.Second); return err })
	t.Logf("after kill -9 the app is reached through its tunnel again in %s", time.Since(began).Round(time.Millisecond))
}
