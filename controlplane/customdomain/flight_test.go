package customdomain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// TestTTL checks how long what is known is believed.
func TestTTL(t *testing.T) {
	soaOf := func(ttl, minimum int) string {
		return fmt.Sprintf("example. %d IN SOA ns.example. root.example. 1 2 3 4 %d", ttl, minimum)
	}
	alias := fmt.Sprintf("%s. 20 IN CNAME b.example.", atPrimary)
	for _, tt := range []struct {
		what string
		a    answer
		want time.Duration
	}{
		{"by TTL", txtAt(atPrimary, 60, "app:1"), 60 * time.Second},
		{"at least a second", txtAt(atPrimary, 0, "app:1"), time.Second},
		{"at most an hour", txtAt(atPrimary, 86400, "app:1"), time.Hour},
		{"TTL with the top bit", answer{rrs: []string{atPrimary + `. 4294967295 IN TXT "app:1"`}}, time.Second},
		{"alias lives shorter", answer{rrs: []string{alias, `b.example. 60 IN TXT "app:1"`}}, 20 * time.Second},
		{"alias lives longer", answer{rrs: []string{alias, `b.example. 7 IN TXT "app:1"`}}, 7 * time.Second},
		{"malformed", txtAt(atPrimary, 60, "?"), 10 * time.Second},
		{"malformed, short", txtAt(atPrimary, 3, "?"), 3 * time.Second},
		{"absent", answer{ns: []string{soaOf(300, 300)}, rcode: dns.RcodeNameError}, 10 * time.Second},
		{"absent, by minimum", answer{ns: []string{soaOf(300, 4)}, rcode: dns.RcodeNameError}, 4 * time.Second},
		{"absent, by TTL of SOA", answer{ns: []string{soaOf(5, 300)}}, 5 * time.Second},
		{"absent, at least a second", answer{ns: []string{soaOf(0, 0)}}, time.Second},
		{"absent without SOA", answer{rcode: dns.RcodeNameError}, time.Second},
		{"failure", servfail, 2 * time.Second},
	} {
		t.Run(tt.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				z := newZone(map[string]answer{atPrimary: tt.a, atWildcard: txtAt(atWildcard, 86400, "wild:1")})
				r := piped(t, z, Options{})
				asked := func() bool {
					t.Helper()
					resolve(t, r, name)
					return slices.Contains(z.queries(), atPrimary)
				}
				if !asked() {
					t.Fatal("not asked at first")
				}
				time.Sleep(tt.want - time.Millisecond)
				if asked() {
					t.Errorf("asked again before %v", tt.want)
				}
				time.Sleep(time.Millisecond)
				if !asked() {
					t.Errorf("not asked again after %v", tt.want)
				}
			})
		})
	}
}

// TestClock lets the injected clock decide what has expired.
func TestClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 60, "app:1")})
		now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
		r := piped(t, z, Options{Clock: func() time.Time { return now }})
		resolve(t, r, name)
		time.Sleep(time.Hour)
		if _, _, ok := r.Cached(name); !ok {
			t.Error("the time of the system counts")
		}
		now = now.Add(time.Minute)
		if _, _, ok := r.Cached(name); ok {
			t.Error("the time of the clock does not count")
		}
	})
}

// TestNewRecord publishes a record that was missing, and one that was malformed.
func TestNewRecord(t *testing.T) {
	for _, before := range []answer{nodata, txtAt(atPrimary, 3600, "?")} {
		synctest.Test(t, func(t *testing.T) {
			z := newZone(map[string]answer{atPrimary: before})
			r := piped(t, z, Options{})
			if _, err := resolve(t, r, name); err == nil {
				t.Fatal("resolved")
			}
			z.set(atPrimary, txtAt(atPrimary, 3600, "app:443"))
			time.Sleep(10 * time.Second)
			if a, err := resolve(t, r, name); err != nil || a != (Answer{"app", 443}) {
				t.Errorf("after 10 s: %+v, %v", a, err)
			}
		})
	}
}

// TestStale lets the resolvers fail after a name was known.
func TestStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 60, "app:443")})
		r := piped(t, z, Options{StaleFor: 10 * time.Minute})
		want := Answer{"app", 443}
		expect := func(what string, queries int, took time.Duration) {
			t.Helper()
			begin := time.Now()
			a, err := resolve(t, r, name)
			if err != nil || a != want {
				t.Errorf("%s: %+v, %v; want %+v", what, a, err, want)
			}
			if d := time.Since(begin); d != took {
				t.Errorf("%s: took %v, want %v", what, d, took)
			}
			if n := len(z.queries()); n != queries {
				t.Errorf("%s: %d queries, want %d", what, n, queries)
			}
		}
		expect("at first", 1, 0)
		z.setAll(servfail)
		time.Sleep(time.Minute)
		expect("SERVFAIL", 1, 0)
		expect("SERVFAIL, again", 0, 0)
		time.Sleep(staleRetry)
		expect("SERVFAIL, later", 1, 0)

		z.setAll(answer{silent: true})
		time.Sleep(staleRetry)
		expect("silence", 1, staleWait)
		expect("silence, again", 0, 0)
		r.wg.Wait()
		z.queries()
		expect("silence, lookup over", 0, 0)

		z.setAll(txtAt(atPrimary, 60, "new:1"))
		time.Sleep(staleRetry)
		want = Answer{"new", 1}
		expect("well again", 1, 0)

		z.setAll(servfail)
		time.Sleep(time.Minute + 10*time.Minute - time.Nanosecond)
		expect("at the end of its life", 1, 0)
		time.Sleep(staleRetry)
		if a, err := resolve(t, r, name); !errors.Is(err, ErrResolver) || !strings.Contains(err.Error(), "SERVFAIL") {
			t.Errorf("after its life: %+v, %v; want ErrResolver", a, err)
		}
	})
}

// TestStaleIsNotForAbsent removes the record while the resolvers are well.
func TestStaleIsNotForAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 60, "app:443")})
		r := piped(t, z, Options{})
		resolve(t, r, name)
		z.set(atPrimary, answer{rcode: dns.RcodeNameError, ns: []string{soa}})
		time.Sleep(time.Minute)
		if a, err := resolve(t, r, name); !errors.Is(err, ErrNotFound) {
			t.Errorf("removed: %+v, %v; want ErrNotFound", a, err)
		}
		z.setAll(servfail)
		time.Sleep(time.Minute)
		if a, err := resolve(t, r, name); !errors.Is(err, ErrResolver) {
			t.Errorf("removed, then the resolvers failed: %+v, %v; want ErrResolver", a, err)
		}
	})
}

// TestStaleOff forgets a record as soon as it expires.
func TestStaleOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 60, "app:443")})
		r := piped(t, z, Options{StaleFor: -1})
		resolve(t, r, name)
		z.setAll(servfail)
		time.Sleep(time.Minute)
		if a, err := resolve(t, r, name); !errors.Is(err, ErrResolver) {
			t.Errorf("%+v, %v; want ErrResolver", a, err)
		}
	})
}

// TestStaleWildcard needs the absence of two records to be remembered as well:
// each of them would use up the budget of the connection.
func TestStaleWildcard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: nodata, atLegacy: nodata, atWildcard: txtAt(atWildcard, 60, "wild:443")})
		r := piped(t, z, Options{Compat: true})
		resolve(t, r, name)
		z.setAll(answer{silent: true})
		time.Sleep(time.Minute)
		begin := time.Now()
		if a, err := resolve(t, r, name); err != nil || a != (Answer{"wild", 443}) {
			t.Errorf("%+v, %v", a, err)
		}
		if d := time.Since(begin); d > 3*staleWait {
			t.Errorf("took %v", d)
		}
	})
}

// TestStaleMalformed repeats what was wrong, not that the resolvers fail.
func TestStaleMalformed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 60, "?")})
		r := piped(t, z, Options{})
		resolve(t, r, name)
		z.setAll(servfail)
		time.Sleep(time.Minute)
		if a, err := resolve(t, r, name); !errors.Is(err, ErrMalformed) {
			t.Errorf("%+v, %v; want ErrMalformed", a, err)
		}
	})
}

// TestCoalesce sends a hundred at once.
func TestCoalesce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(at, value string) answer {
			return answer{reply: func(q *dns.Msg, _ string) *dns.Msg {
				time.Sleep(500 * time.Millisecond)
				m := new(dns.Msg).SetReply(q)
				m.Answer = rrs(at + `. 60 IN TXT "` + value + `"`)
				return m
			}}
		}
		z := newZone(map[string]answer{atPrimary: slow(atPrimary, "app:443"), atLegacy: slow(atLegacy, "old:1")})
		r := piped(t, z, Options{Compat: true})
		impatient, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		errs := make([]error, 100)
		for i := range errs {
			ctx := t.Context()
			if i%2 == 0 {
				ctx = impatient
			}
			wg.Go(func() { _, errs[i] = r.Resolve(ctx, name) })
		}
		time.Sleep(100 * time.Millisecond)
		cancel()
		wg.Wait()
		for i, err := range errs {
			if i%2 == 0 && (!errors.Is(err, context.Canceled) || errors.Is(err, ErrResolver)) || i%2 == 1 && err != nil {
				t.Errorf("%d: %v", i, err)
			}
		}
		if asked := z.queries(); !slices.Equal(asked, []string{atPrimary, atLegacy}) {
			t.Errorf("asked for %q", asked)
		}
	})
}

// TestImpatient lets the only one who waits give up: the answer is not lost.
func TestImpatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: {reply: func(q *dns.Msg, _ string) *dns.Msg {
			time.Sleep(500 * time.Millisecond)
			m := new(dns.Msg).SetReply(q)
			m.Answer = rrs(atPrimary + `. 60 IN TXT "app:443"`)
			return m
		}}})
		r := piped(t, z, Options{})
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := r.Resolve(ctx, name); !errors.Is(err, ErrResolver) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want ErrResolver and DeadlineExceeded", err)
		}
		time.Sleep(time.Second)
		if a, err, ok := r.Cached(name); !ok || err != nil || a != (Answer{"app", 443}) {
			t.Errorf("%+v, %v, %v", a, err, ok)
		}
	})
}

// TestOverload fills the table of lookups.
func TestOverload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: txtAt(atPrimary, 60, "app:443")})
		r := piped(t, z, Options{MaxOutstanding: 2})
		resolve(t, r, name)
		time.Sleep(time.Minute)

		var wg sync.WaitGroup
		for _, sni := range []string{"a.slow.example", "b.slow.example"} {
			z.set("_dstack-app-address."+sni, answer{silent: true})
			wg.Go(func() {
				if _, err := resolve(t, r, sni); !errors.Is(err, ErrResolver) {
					t.Errorf("%s: %v, want ErrResolver", sni, err)
				}
			})
		}
		synctest.Wait()
		if _, err := resolve(t, r, "c.example"); !errors.Is(err, ErrOverload) || !strings.HasSuffix(err.Error(), ": 2, the limit") {
			t.Errorf("%v, want ErrOverload", err)
		}
		if a, err := resolve(t, r, name); err != nil || a != (Answer{"app", 443}) {
			t.Errorf("known before: %+v, %v", a, err)
		}
		wg.Wait()
		synctest.Wait()
		if _, err := resolve(t, r, "c.example"); !errors.Is(err, ErrNotFound) {
			t.Errorf("when there is room again: %v, want ErrNotFound", err)
		}
	})
}

// TestClose ends lookups in progress and refuses further ones.
func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := newZone(map[string]answer{atPrimary: {silent: true}, atLegacy: {silent: true}})
		r := piped(t, z, Options{Compat: true})
		done := make(chan error, 1)
		go func() {
			_, err := resolve(t, r, name)
			done <- err
		}()
		synctest.Wait()
		begin := time.Now()
		r.Close()
		if err := <-done; !errors.Is(err, ErrClosed) {
			t.Errorf("waiting: %v, want ErrClosed", err)
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("closing took %v", d)
		}
		if _, err := resolve(t, r, name); !errors.Is(err, ErrClosed) {
			t.Errorf("afterwards: %v, want ErrClosed", err)
		}
	})
}

// TestConcurrent is for the race detector: few names, short lives, a small cache.
func TestConcurrent(t *testing.T) {
	z := newZone(map[string]answer{})
	for i := range 40 {
		at := fmt.Sprintf("_dstack-app-address.n%d.example", i)
		z.set(at, txtAt(at, 1, fmt.Sprintf("app%d:443", i)))
	}
	var mu sync.Mutex
	now := time.Unix(0, 0)
	r := open(t, Options{
		Servers: pipeServers, Dial: pipes{serverA.String(): z}.dial, Compat: true, MaxOutstanding: 8,
		Clock: func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			now = now.Add(time.Millisecond)
			return now
		},
	})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 300 {
				n := (g + i) % 60
				a, err := r.Resolve(t.Context(), fmt.Sprintf("n%d.example", n))
				switch {
				case errors.Is(err, ErrOverload):
				case n < 40 && (err != nil || a.ID != fmt.Sprintf("app%d", n)):
					t.Errorf("n%d: %+v, %v", n, a, err)
				case n >= 40 && !errors.Is(err, ErrNotFound):
					t.Errorf("n%d: %+v, %v", n, a, err)
				}
			}
		})
	}
	wg.Wait()
}
