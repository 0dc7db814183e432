package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"testing"
	"testing/synctest"
	"time"
)

// ticketRig is two acceptors, one with ALPN h2 (names with suffix g) and one
// without, as the proxy has them.
func ticketRig(t *testing.T, ca *opensslCA) (s *Store, plain, g *tls.Config) {
	s = newStore(t, Options{})
	if err := s.Update("app.example", ca.record("app", "ecdsa-pkcs8", "app.example")); err != nil {
		t.Fatal(err)
	}
	plain = &tls.Config{GetCertificate: s.GetCertificate}
	g = &tls.Config{GetCertificate: s.GetCertificate, NextProtos: []string{"h2"}}
	return s, plain, g
}

func resumes(t *testing.T, server, client *tls.Config) bool {
	t.Helper()
	cs, ss, err := handshake(t, server, client)
	if err != nil {
		t.Fatal(err)
	}
	if cs.DidResume != ss.DidResume {
		t.Error("client and server disagree about resumption")
	}
	return cs.DidResume
}

func TestTicketsResumeAcrossAcceptors(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(v), func(t *testing.T) {
			_, plain, g := ticketRig(t, ca)
			client := func(alpn ...string) *tls.Config {
				return &tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example", MinVersion: v, MaxVersion: v, NextProtos: alpn}
			}
			// Without shared keys they do not: the reason for this type.
			c := client()
			c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			resumes(t, plain, c)
			if resumes(t, g, c) {
				t.Fatal("acceptors share keys by themselves, the test proves nothing")
			}

			keys, err := NewTicketKeys(TicketOptions{})
			if err != nil {
				t.Fatal(err)
			}
			keys.Attach(plain, g)
			c.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			if resumes(t, plain, c) {
				t.Fatal("resumed a session that never was")
			}
			if !resumes(t, g, c) {
				t.Error("a session of the plain acceptor does not resume on the h2 one")
			}
			c2 := client("h2")
			c2.ClientSessionCache = c.ClientSessionCache
			if !resumes(t, g, c2) || !resumes(t, plain, c2) {
				t.Error("a session of the h2 acceptor does not resume")
			}
		})
	}
}

func TestTicketRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := NewTicketKeys(TicketOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- keys.Run(ctx) }()
		current := func() [][32]byte {
			synctest.Wait()
			keys.mu.Lock()
			defer keys.mu.Unlock()
			return append([][32]byte(nil), keys.keys...)
		}
		first := current()
		if len(first) != 1 {
			t.Fatalf("%d keys at start, want 1", len(first))
		}
		time.Sleep(23 * time.Hour)
		if got := current(); got[0] != first[0] {
			t.Error("rotated before 24 h")
		}
		time.Sleep(2 * time.Hour)
		second := current()
		if len(second) != 2 || second[0] == first[0] || second[1] != first[0] {
			t.Fatal("after a day the old key must follow a new one")
		}
		time.Sleep(24 * time.Hour)
		if got := current(); len(got) != 3 || got[2] != first[0] {
			t.Error("the key of two days ago must still decrypt")
		}
		time.Sleep(24 * time.Hour)
		got := current()
		if len(got) != 3 {
			t.Errorf("%d keys, want 3", len(got))
		}
		for _, k := range got {
			if k == first[0] {
				t.Error("the key of three days ago was kept")
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Real sessions over the days.
func TestTicketsAcrossRotation(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	_, plain, _ := ticketRig(t, ca)
	now := time.Now()
	clock := func() time.Time { return now }
	keys, err := NewTicketKeys(TicketOptions{Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	keys.Attach(plain)
	day := func() {
		now = now.Add(24 * time.Hour)
		keys.mu.Lock()
		defer keys.mu.Unlock()
		if err := keys.rotate(); err != nil {
			t.Fatal(err)
		}
	}
	for days, want := range map[int]bool{0: true, 1: true, 2: true, 3: false} {
		// The clients' clocks stand still, so only the keys decide.
		c := &tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example", ClientSessionCache: tls.NewLRUClientSessionCache(1)}
		resumes(t, plain, c)
		for range days {
			day()
		}
		if got := resumes(t, plain, c); got != want {
			t.Errorf("a session resumes after %d rotations: %v, want %v", days, got, want)
		}
	}
}

func TestTicketsSharedByNodes(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	secret := bytes.Repeat([]byte{7}, 32)
	node := func(at time.Time, secret []byte) *tls.Config {
		_, plain, _ := ticketRig(t, ca)
		keys, err := NewTicketKeys(TicketOptions{Secret: secret, Now: func() time.Time { return at }})
		if err != nil {
			t.Fatal(err)
		}
		keys.Attach(plain)
		return plain
	}
	noon := time.Unix(20_000*86400+43200, 0)
	for _, tc := range []struct {
		name   string
		second *tls.Config
		want   bool
	}{
		{"the same moment", node(noon, secret), true},
		{"a day later", node(noon.Add(24*time.Hour), secret), true},
		{"two days later", node(noon.Add(48*time.Hour), secret), true},
		{"three days later", node(noon.Add(72*time.Hour), secret), false},
		{"a clock one day behind", node(noon.Add(-24*time.Hour), secret), true},
		{"another secret", node(noon, bytes.Repeat([]byte{8}, 32)), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example", ClientSessionCache: tls.NewLRUClientSessionCache(1)}
			resumes(t, node(noon, secret), c)
			if got := resumes(t, tc.second, c); got != tc.want {
				t.Errorf("resumed: %v, want %v", got, tc.want)
			}
		})
	}
	if _, err := NewTicketKeys(TicketOptions{Secret: []byte("short")}); err == nil {
		t.Error("a short secret was accepted")
	}
}

// Rotation while clients resume all the time.
func TestRotationUnderHandshakes(t *testing.T) {
	ca := newOpensslCA(t, "test CA")
	_, plain, g := ticketRig(t, ca)
	keys, err := NewTicketKeys(TicketOptions{Rotation: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	keys.Attach(plain, g)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- keys.Run(ctx) }()
	c := &tls.Config{RootCAs: ca.pool(), ServerName: "x.app.example", ClientSessionCache: tls.NewLRUClientSessionCache(1)}
	resumed := 0
	for i := range 200 {
		if resumes(t, []*tls.Config{plain, g}[i%2], c) {
			resumed++
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if resumed == 0 {
		t.Error("nothing resumed")
	}
}
