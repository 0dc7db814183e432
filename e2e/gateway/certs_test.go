package gateway

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestCertificateFiles: the files of the static certificate change 200 times under handshakes: half-written, of two pairs,
// garbage, gone, and new. No handshake fails, and what is good in the end is served soon.
func TestCertificateFiles(t *testing.T) {
	t.Parallel()
	g := startGateway(t, nil)
	chain, key := g.path("proxy.crt"), g.path("proxy.key")
	first := &webCert{read(t, chain), read(t, key)}
	serial := func() (int64, error) {
		c, err := g.tlsTo("health."+base, 10*time.Second)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64(), nil
	}
	visible := func(what string, want *webCert) {
		t.Helper()
		began := time.Now()
		within(t, 5*time.Second, func() error {
			got, err := serial()
			if err == nil && got != want.serial(t) {
				err = fmt.Errorf("serial %d is served, not %d", got, want.serial(t))
			}
			return err
		})
		t.Logf("%s: served after %s", what, time.Since(began).Round(time.Millisecond))
	}
	visible("the first", first)

	// Handshakes without a pause, all kinds, until the end of the test.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var handshakes atomic.Int64
	for _, conf := range []*tls.Config{
		{}, {MaxVersion: tls.VersionTLS12}, {ClientSessionCache: tls.NewLRUClientSessionCache(4)}, {NextProtos: []string{"h2"}},
	} {
		conf.RootCAs, conf.ServerName = webRoots, "health."+base
		if conf.NextProtos != nil {
			conf.ServerName = "health-g." + base
		}
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(2 * time.Millisecond):
				}
				c, err := tls.Dial("tcp", g.addr(proxyPort), conf)
				if err != nil {
					t.Errorf("handshake %d: %v", handshakes.Load(), err)
					return
				}
				c.Close()
				handshakes.Add(1)
			}
		})
	}
	end := sync.OnceFunc(func() {
		close(stop)
		wg.Wait()
		t.Logf("%d handshakes", handshakes.Load())
	})
	defer end()

	second := web(t).issue(t, "*."+base)
	for i := range 200 {
		other := web(t).issue(t, "*."+base)
		switch i % 5 {
		case 0: // half-written
			write(t, chain, other.chain[:len(other.chain)/2])
		case 1: // of two pairs
			write(t, chain, other.chain)
		case 2:
			write(t, key, []byte("-----BEGIN PRIVATE KEY-----\nbm90IGEga2V5\n-----END PRIVATE KEY-----\n"))
		case 3:
			if err := errors.Join(os.Remove(chain), os.Remove(key)); err != nil {
				t.Error(err)
			}
		case 4:
			other.write(t, chain, key)
		}
		time.Sleep(10 * time.Millisecond)
	}
	second.write(t, chain, key)
	visible("after 200 changes", second)

	// A bad pair that stays is looked at, refused and named; the one in use stays.
	write(t, chain, first.chain)
	g.logged("level=ERROR", "reloading the static certificate failed: the previous one stays in use", key)
	if got, err := serial(); err != nil || got != second.serial(t) {
		t.Errorf("with a bad pair: %v, serial %d", err, got)
	}
	// Renewal tools put complete files in place by renaming.
	third := web(t).issue(t, "*."+base)
	third.write(t, chain+".new", key+".new")
	if err := errors.Join(os.Rename(chain+".new", chain), os.Rename(key+".new", key)); err != nil {
		t.Fatal(err)
	}
	visible("by renaming", third)

	// A certificate that is not there at the start ends it, with the file named.
	end()
	g.kill()
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	g.launch()
	if code := g.proc.wait(20 * time.Second); code != 1 {
		t.Errorf("without the key: exit code %d", code)
	}
	g.logged("static certificate", key, "no such file")
}
