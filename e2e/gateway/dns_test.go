package gateway

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/dev"
)

// TestDeadResolver: a resolver that swallows questions costs new custom domains their connection, in time, and nobody else
// anything. What was known stays known.
func TestDeadResolver(t *testing.T) {
	t.Parallel()
	g := newGateway(t, settings{"core.proxy.timeouts.dns_resolve": "3s"})
	at := netip.AddrPortFrom(g.ip, 53)
	g.conf["core.proxy.app_address_dns_servers"] = []string{at.String()}
	g.start()
	v := newGuest(t, "shop")
	v.register(t, g)
	names := []string{"www.shop.example", "later.shop.example"}
	site := web(t).issue(t, names...)
	pair, err := tls.X509KeyPair(site.chain, site.key)
	if err != nil {
		t.Fatal(err)
	}
	servePages(t, listenTLS(t, 8444, pair), "shop")
	pages(t, 8081, "platform")

	zone := &dev.Zone{TXT: map[string]string{}}
	for _, n := range names {
		zone.TXT["_dstack-app-address."+n] = v.instance + ":8444"
	}
	serve := func() (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- dev.ServeDNS(ctx, at, zone, slog.New(slog.DiscardHandler)) }()
		return func() { cancel(); <-done }
	}
	custom := func(name string, timeout time.Duration) (time.Duration, error) {
		began := time.Now()
		c, err := g.tlsTo(name, timeout)
		if err == nil {
			c.Close()
		}
		return time.Since(began), err
	}
	stop := serve()
	within(t, 5*time.Second, func() error { _, err := custom("www.shop.example", time.Second); return err })
	stop()

	sink, err := net.ListenPacket("udp4", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	go io.Copy(io.Discard, packets{sink})

	// Many at once, each a name of its own, so that nothing is coalesced.
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			d, err := custom(fmt.Sprintf("n%d.shop.example", i), 10*time.Second)
			if err == nil || d < 2500*time.Millisecond || d > 8*time.Second {
				t.Errorf("an unknown custom domain ended after %s: %v", d, err)
			}
		})
	}
	worst := time.Duration(0)
	for range 100 {
		began := time.Now()
		if page, err := g.get(v.instance+"-8081", 5*time.Second); err != nil {
			t.Errorf("a platform name while the resolver is dead: %v %q", err, page)
		}
		worst = max(worst, time.Since(began))
	}
	if worst > 2*time.Second {
		t.Errorf("a platform name waited %s for a dead resolver", worst)
	}
	if d, err := custom("www.shop.example", 5*time.Second); err != nil {
		t.Errorf("a custom domain that was known: %v after %s", err, d)
	}
	wg.Wait()
	g.logged("connection refused", "reason=dns", ".shop.example")
	g.logged("resolver does not answer", at.String())
	t.Logf("platform names took at most %s while 200 connections waited for a dead resolver", worst.Round(time.Millisecond))

	sink.Close()
	defer serve()()
	began := time.Now()
	within(t, 15*time.Second, func() error { _, err := custom("later.shop.example", 5*time.Second); return err })
	t.Logf("a new custom domain resolves %s after the resolver is back", time.Since(began).Round(time.Millisecond))
}

// packets makes a reader of datagrams.
type packets struct{ net.PacketConn }

func (p packets) Read(b []byte) (int, error) {
	n, _, err := p.ReadFrom(b)
	return n, err
}

func listenTLS(t *testing.T, port int, pair tls.Certificate) net.Listener {
	t.Helper()
	l, err := tls.Listen("tcp4", fmt.Sprintf(":%d", port), &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}
