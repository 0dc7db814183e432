package gateway

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// echo serves connections that say what they hear, on one port of all addresses.
func echo(t *testing.T, port int) {
	t.Helper()
	l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
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
}

// chat is a connection through the gateway to an echo server.
type chat struct {
	*tls.Conn
	r *bufio.Reader
}

func (g *gateway) chat(label string) (*chat, error) {
	c, err := g.tlsTo(label+"."+base, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return &chat{c, bufio.NewReader(c)}, nil
}

// say sends a line and wants it back soon.
func (c *chat) say(line string) error {
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	got, err := c.r.ReadString('\n')
	if err == nil && got != line+"\n" {
		err = fmt.Errorf("said %q, heard %q", line, got)
	}
	return err
}

// cpu is the processor time that a process has used.
func cpu(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat := string(read(t, fmt.Sprintf("/proc/%d/stat", pid)))
	f := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	var ticks int64
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func descriptors(t *testing.T, pid int) int {
	t.Helper()
	d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// rss is the resident memory of a process in MiB.
func rss(t *testing.T, pid int) int {
	t.Helper()
	for line := range strings.Lines(string(read(t, fmt.Sprintf("/proc/%d/status", pid)))) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			kib, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return kib >> 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// TestDescriptors: a gateway that has run out of descriptors serves whom it serves, turns others away, does not spin, and
// is well again when there are descriptors.
func TestDescriptors(t *testing.T) {
	t.Parallel()
	g := newGateway(t, nil)
	g.wrap = []string{need(t, "prlimit"), "--nofile=256:256"}
	g.start()
	v := newGuest(t, "echo")
	v.register(t, g)
	echo(t, 7001)
	idle := descriptors(t, g.proc.cmd.Process.Pid)
	var chats []*chat
	for range 20 {
		c, err := g.chat(v.instance + "-7001")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		chats = append(chats, c)
	}
	all := func(when string) {
		t.Helper()
		for i, c := range chats {
			if err := c.say(fmt.Sprintf("%s, I am %d", when, i)); err != nil {
				t.Errorf("%s: connection %d: %v", when, i, err)
			}
		}
	}
	all("before")

	// Clients who begin a hello and do not end it.
	var crowd []net.Conn
	closed := 0
	for range 400 {
		c, err := net.DialTimeout("tcp", g.addr(proxyPort), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte{22, 3, 1})
		crowd = append(crowd, c)
	}
	g.logged("level=WARN", "out of descriptors", "raise RLIMIT_NOFILE")
	all("crowded")
	before, began := cpu(t, g.proc.cmd.Process.Pid), time.Now()
	for _, c := range crowd { // those who were accepted wait for their handshake timeout of 5 s
		c.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			closed++
		}
	}
	if closed < 10 {
		t.Errorf("only %d of 400 were turned away", closed)
	}
	// Whoever comes now is served or not, but is not kept longer than the crowd may stay.
	late := time.Now()
	c, err := g.chat(v.instance + "-7001")
	if err == nil {
		c.Close()
	}
	if d := time.Since(late); d > 6*time.Second {
		t.Errorf("a good client in the crowd: %v after %s", err, d)
	}
	t.Logf("%d of 400 were turned away; a good client: %v after %s", closed, err, time.Since(late).Round(time.Millisecond))
	if used, took := cpu(t, g.proc.cmd.Process.Pid)-before, time.Since(began); used > took/2 {
		t.Errorf("the crowd costs %s of processor time in %s", used, took)
	}
	all("still crowded")
	for _, c := range crowd {
		c.Close()
	}
	within(t, 5*time.Second, func() error {
		c, err := g.chat(v.instance + "-7001")
		if err == nil {
			defer c.Close()
			err = c.say("well again")
		}
		return err
	})
	newGuest(t, "later").register(t, g)
	all("after")
	for _, c := range chats {
		c.Close()
	}
	within(t, 5*time.Second, func() error {
		if n := descriptors(t, g.proc.cmd.Process.Pid); n > idle+12 {
			return fmt.Errorf("%d descriptors are open, %d were before", n, idle)
		}
		return nil
	})
	if !strings.Contains(g.admin("GetMeta", ""), `"registered":2`) {
		t.Error("a registration is lost")
	}
}

// TestHalfOpen: 2,000 clients that never finish their hello disturb nobody and are gone after the handshake timeout; one
// source that opens more than it may is cut off, others are not.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	g := startGateway(t, settings{"core.proxy.timeouts.handshake": "4s", "core.proxy.max_half_open_per_source": 1000})
	v := newGuest(t, "page")
	v.register(t, g)
	pages(t, 8085, "app")
	pid := g.proc.cmd.Process.Pid
	idle, memory := descriptors(t, pid), rss(t, pid)
	hello := []byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3} // the first bytes of one
	var mu sync.Mutex
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	crowd := func(source string, n int) {
		t.Helper()
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range n / 8 {
					c, err := d.Dial("tcp", g.addr(proxyPort))
					if err != nil {
						t.Error(err)
						return
					}
					c.Write(hello)
					mu.Lock()
					open = append(open, c)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	}
	good := func(when string) {
		t.Helper()
		worst := time.Duration(0)
		for range 50 {
			began := time.Now()
			if page, err := g.get(v.instance+"-8085", 5*time.Second); err != nil || page != "10.8.0.2 app" {
				t.Errorf("%s: %v %q", when, err, page)
			}
			worst = max(worst, time.Since(began))
		}
		if worst > 2*time.Second {
			t.Errorf("%s: a good client waited %s", when, worst)
		}
		t.Logf("%s: good clients waited %s at most, %d descriptors, %d MiB", when, worst.Round(time.Millisecond), descriptors(t, pid), rss(t, pid))
	}
	good("alone")
	crowd("127.0.9.1", 1000)
	crowd("127.0.9.2", 1000)
	good("2,000 half-open clients")
	if n := descriptors(t, pid) - idle; n < 1500 {
		t.Errorf("%d of 2,000 connections are held", n)
	}
	if got := rss(t, pid); got > memory+64 {
		t.Errorf("2,000 half-open clients cost %d MiB", got-memory)
	}
	crowd("127.0.9.1", 1000)
	good("one source opens 1,000 more")
	if n := descriptors(t, pid) - idle; n > 2100 {
		t.Errorf("%d connections are held: max_half_open_per_source does not hold", n)
	}
	g.logged("connection refused", "reason=overload")
	within(t, 8*time.Second, func() error {
		if n := descriptors(t, pid); n > idle+20 {
			return fmt.Errorf("%d descriptors are open, %d were before", n, idle)
		}
		return nil
	})
	g.logged("connection refused", "reason=timeout", "timeout waiting for the ClientHello")
}
