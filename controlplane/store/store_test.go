package store

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("STORE_TEST_WRITER"); dir != "" {
		writerProcess(dir)
		return
	}
	if os.Getenv("STORE_TEST_CHILD") != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// inChild runs the calling test in a process of its own, for what cannot be cleaned up, and reports whether this is it.
func inChild(t *testing.T) bool {
	t.Helper()
	if os.Getenv("STORE_TEST_CHILD") != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "STORE_TEST_CHILD=1")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	return false
}

// logBuffer collects the log of a store.
type logBuffer struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func testOptions(t testing.TB, dir string) (Options, *logBuffer) {
	buf := &logBuffer{}
	return Options{Dir: dir, NodeID: 1, Logger: slog.New(slog.NewTextHandler(buf, &slog.HandlerOptions{Level: slog.LevelDebug}))}, buf
}

func openWith(t testing.TB, opts Options) *Store {
	t.Helper()
	s, err := Open(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustOpen(t testing.TB, dir string) (*Store, *logBuffer) {
	t.Helper()
	opts, buf := testOptions(t, dir)
	s := openWith(t, opts)
	if st := s.Status(); !st.Writable {
		t.Fatalf("not writable: %s\n%s", st.Reason, buf)
	}
	return s, buf
}

func instance(n int) registry.Instance {
	var key [32]byte
	key[0], key[1], key[2] = byte(n), byte(n>>8), 1
	return registry.Instance{
		ID: fmt.Sprintf("%040x", n), AppID: fmt.Sprintf("app%d", n%7), PublicKey: base64.StdEncoding.EncodeToString(key[:]),
		IP: netip.AddrFrom4([4]byte{10, 8, byte(n >> 8), byte(n)}), RegTime: 1_700_000_000 + uint64(n),
		Policy:     &registry.PortPolicy{Ports: map[uint16]registry.PortFlags{443: {PP: true}, 8080: {}}, Restrict: true},
		PolicyHash: strings.Repeat("ab", 32),
	}
}

func put(t testing.TB, s *Store, i registry.Instance, want Durability) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	d, err := s.PutInstance(ctx, i)
	if d != want || (err != nil) != (want == Volatile) {
		t.Fatalf("PutInstance(%s) = %v, %v; want %v (status %+v)", i.ID, d, err, want, s.Status())
	}
}

func has(t testing.TB, s *Store, i registry.Instance) {
	t.Helper()
	if got, ok := s.Instance(i.ID); !ok || !got.Equal(i) {
		t.Fatalf("Instance(%s) = %+v, %v; want %+v", i.ID, got, ok, i)
	}
}

func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

func TestRestart(t *testing.T) {
	dir := t.TempDir()
	s, _ := mustOpen(t, dir)
	plain := instance(1)
	full := instance(2)
	full.AdminPolicy = &registry.PortPolicy{}
	bare := registry.Instance{ID: "test-id/0", AppID: "a", PublicKey: full.PublicKey, IP: full.IP, RegTime: 3}
	for _, i := range []registry.Instance{plain, full, bare} {
		put(t, s, i, Stored)
		has(t, s, i) // read your writes
	}
	if d, err := s.DeleteInstance(context.Background(), plain.ID); d != Stored || err != nil {
		t.Fatal(d, err)
	}
	if _, ok := s.Instance(plain.ID); ok {
		t.Fatal("a deleted instance is still there")
	}
	uuid := s.NodeUUID()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s, buf := mustOpen(t, dir)
	has(t, s, full)
	has(t, s, bare)
	if got := s.Instances(); len(got) != 2 {
		t.Errorf("%d instances, want 2", len(got))
	}
	if s.NodeUUID() != uuid {
		t.Error("the uuid changed")
	}
	if strings.Contains(buf.String(), "level=ERROR") {
		t.Errorf("errors in the log of a normal restart:\n%s", buf)
	}
}

func TestModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s, _ := mustOpen(t, dir)
	put(t, s, instance(1), Stored)
	s.Close()
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		info, err := d.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o077 != 0 && path != dir {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
	for _, f := range []string{"node_uuid", "store/journal", "store/backup.json", "store/etcd"} {
		if !exists(filepath.Join(dir, f)) {
			t.Errorf("%s is missing", f)
		}
	}
}

// TestNoListener: the embedded etcd must not be reachable from anywhere.
func TestNoListener(t *testing.T) {
	sockets := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if target, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasPrefix(target, "socket:") {
				n++
			}
		}
		return n
	}
	before := sockets()
	s, _ := mustOpen(t, t.TempDir())
	put(t, s, instance(1), Stored)
	if after := sockets(); after != before {
		t.Errorf("%d sockets opened", after-before)
	}
}

func TestSecondProcess(t *testing.T) {
	dir := t.TempDir()
	mustOpen(t, dir)
	opts, _ := testOptions(t, dir)
	if _, err := Open(context.Background(), opts); !errors.Is(err, ErrDirInUse) {
		t.Fatalf("second open: %v", err)
	}
}

func TestOptions(t *testing.T) {
	for name, opts := range map[string]Options{
		"no dir":                {},
		"unknown mode":          {Dir: "/x", Mode: "memory"},
		"endpoints embedded":    {Dir: "/x", Endpoints: []string{"http://127.0.0.1:1"}},
		"external without URLs": {Dir: "/x", Mode: External},
		"short secret":          {Dir: "/x", Secret: []byte("short")},
	} {
		if _, err := Open(context.Background(), opts); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestClosed(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	s.Close()
	s.Close()
	if _, err := s.PutInstance(context.Background(), instance(1)); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := s.PutACMEAttestation(context.Background(), ACMEAttestation{}); !errors.Is(err, ErrNotWritable) {
		t.Error(err)
	}
}

func TestNodeUUID(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "node_uuid")
	a, err := LoadNodeUUID(dir)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Error(st.Mode(), err)
	}
	if b, err := LoadNodeUUID(dir); err != nil || a != b {
		t.Error("not stable", a, b, err)
	}
	// Written by upstream, with a newline and in capitals.
	if err := os.WriteFile(path, []byte("00010203-0405-0607-0809-0A0B0C0D0E0F\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := LoadNodeUUID(dir); err != nil || c != (UUID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) {
		t.Error(c, err)
	}
	for _, bad := range []string{"", "xx", "00010203-0405-0607-0809-0A0B0C0D0E0G", strings.Repeat("-", 36)} {
		os.WriteFile(path, []byte(bad), 0o600)
		d, err := LoadNodeUUID(dir)
		if err != nil || d == (UUID{}) {
			t.Errorf("%q: %v, %v", bad, d, err)
		}
		if e, _ := LoadNodeUUID(dir); e != d {
			t.Errorf("%q was not replaced", bad)
		}
	}
	if d, err := LoadNodeUUID(filepath.Join(dir, "missing")); err == nil || d == (UUID{}) {
		t.Error("an unstorable uuid must be usable and reported", d, err)
	}
}

func TestNodes(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	ctx := context.Background()
	n2 := Node{ID: 2, UUID: UUID{1, 2}, URL: "https://gw2:9202", WGPublicKey: "k", WGEndpoint: "203.0.113.5:51820", WGIP: "10.8.64.1/16"}
	n10 := Node{ID: 10, URL: "https://gw10"}
	for _, n := range []Node{n10, n2} {
		if d, err := s.PutNode(ctx, n); d != Stored || err != nil {
			t.Fatal(d, err)
		}
	}
	if got := s.Nodes(); len(got) != 2 || got[0] != n2 || got[1] != n10 {
		t.Errorf("%+v", got)
	}
	if _, err := s.SetNodeStatus(ctx, 2, "sideways"); err == nil {
		t.Error("a wrong status was accepted")
	}
	s.SetNodeStatus(ctx, 2, NodeDown)
	s.SetNodeStatus(ctx, 10, NodeUp)
	if got := s.NodeStatuses(); len(got) != 2 || got[2] != NodeDown || got[10] != NodeUp {
		t.Errorf("%+v", got)
	}
	s.SetPeerAddr(ctx, 2, "https://a")
	s.SetPeerAddr(ctx, 2, "https://b")
	if got := s.PeerAddrs(); len(got) != 1 || got[2] != "https://b" {
		t.Errorf("%+v", got)
	}
}
