package controlplane

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestPolicyOfTheLiving: a thousand instances whose agents do not answer do not keep the policy of one waiting whose
// agent does.
func TestPolicyOfTheLiving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg, err := registry.New(registry.Config{Network: netip.MustParsePrefix("10.8.0.1/16"), ClientRange: netip.MustParsePrefix("10.8.0.0/16")}, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		register := func(id string) netip.Addr {
			key := make([]byte, 32)
			copy(key, id)
			r, err := reg.Register(registry.Request{AppID: "app", InstanceID: id, PublicKey: base64.StdEncoding.EncodeToString(key)})
			if err != nil {
				t.Fatal(err)
			}
			return r.Instance.IP
		}
		ctx, cancel := context.WithCancel(context.Background())
		var mu sync.Mutex
		got := map[string]time.Time{}
		opt := config.PortPolicyFetch{Timeout: 10 * config.Second, MaxRetries: 5, BackoffInitial: config.Second, BackoffMax: 30 * config.Second}
		f := newPolicyFetcher(ctx, slog.New(slog.DiscardHandler), reg, 8090, opt, func(_ context.Context, id, _ string, _ *registry.PortPolicy) error {
			mu.Lock()
			defer mu.Unlock()
			got[id] = time.Now()
			return nil
		})
		living := register("living")
		asked, most := 0, 0
		f.hc = &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			mu.Lock()
			asked++
			most = max(most, asked)
			mu.Unlock()
			defer func() { mu.Lock(); asked--; mu.Unlock() }()
			if r.URL.Hostname() == living.String() {
				return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(`{"tcb_info":""}`))}, nil
			}
			time.Sleep(time.Millisecond)
			return nil, errors.New("connection refused")
		})}
		for i := range 1000 {
			id := fmt.Sprint("dead", i)
			register(id)
			f.need(id)
		}
		synctest.Wait()
		began := time.Now()
		f.need("living")
		time.Sleep(2 * time.Second)
		mu.Lock()
		at, ok := got["living"]
		mu.Unlock()
		if d := at.Sub(began); !ok || d > 100*time.Millisecond {
			t.Errorf("the policy came (%v) after %s", ok, d)
		}
		time.Sleep(2 * time.Minute) // all attempts: 1+2+4+8+16 s between them
		if n := f.failures.Load(); n != 1000 {
			t.Errorf("%d of 1000 fetches failed", n)
		}
		if why := f.lastFailure("dead7"); !strings.Contains(why, "connection refused") {
			t.Errorf("the last failure is %q", why)
		}
		cancel()
		f.wg.Wait()
		if most > fetchLimit {
			t.Errorf("%d questions at once", most)
		}
	})
}
