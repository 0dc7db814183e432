package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// writerProcess is the child of the kill tests: it stores instances from several goroutines and prints the number of
// each after it was acknowledged.
func writerProcess(dir string) {
	s, err := Open(context.Background(), Options{Dir: dir, NodeID: 1})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	first, _ := strconv.Atoi(os.Getenv("STORE_TEST_FIRST"))
	var mu sync.Mutex
	fmt.Println("open", s.Status().Writable)
	for w := range 8 {
		go func() {
			for n := first + w; ; n += 8 {
				d, err := s.PutInstance(context.Background(), instance(n))
				mu.Lock()
				fmt.Println(n, d, err)
				mu.Unlock()
			}
		}()
	}
	select {}
}

// runWriter starts the child, lets it write for a while, kills it and returns the acknowledged numbers.
func runWriter(t *testing.T, dir string, first int, d time.Duration) (acked []int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STORE_TEST_WRITER="+dir, "STORE_TEST_FIRST="+strconv.Itoa(first))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if f[0] == "open" {
			if f[1] != "true" {
				t.Errorf("the child is not writable")
			}
			time.AfterFunc(d, func() { cmd.Process.Signal(syscall.SIGKILL) })
			continue
		}
		n, err := strconv.Atoi(f[0])
		if err != nil || len(f) != 3 || f[1] != "stored" || f[2] != "<nil>" {
			t.Errorf("child says %q", lines.Text())
			continue
		}
		acked = append(acked, n)
	}
	cmd.Wait()
	return acked
}

// TestKill9: what was acknowledged as stored is there after a kill -9 in the middle of writing, several times in a row.
func TestKill9(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	total := map[int]bool{}
	for round := range 4 {
		acked := runWriter(t, dir, round*100_000, 50*time.Millisecond+rand.N(250*time.Millisecond))
		if len(acked) == 0 {
			t.Fatal("nothing was written")
		}
		for _, n := range acked {
			total[n] = true
		}
	}
	s, buf := mustOpen(t, dir)
	for n := range total {
		has(t, s, instance(n))
	}
	if st := s.Status(); len(st.MovedAside) > 0 {
		t.Errorf("a killed process was taken for damage: %v\n%s", st.MovedAside, buf)
	}
	t.Logf("%d acknowledged records over 4 kills, all there", len(total))
}

// fill writes n instances and closes the store in the given way.
func fill(t *testing.T, dir string, n int) {
	t.Helper()
	s, _ := mustOpen(t, dir)
	var wg sync.WaitGroup
	for k := range n {
		wg.Go(func() { put(t, s, instance(k), Stored) })
	}
	wg.Wait()
	if err := s.CreateDNSCredential(context.Background(), DNSCredential{ID: "c1", Provider: "cloudflare", Settings: map[string]string{"api_token": "tok"}}, true); err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestDamage(t *testing.T) {
	t.Parallel()
	if !inChild(t) { // an etcd that breaks off its start leaves two goroutines behind
		return
	}
	db := func(dir string) string { return filepath.Join(dir, "store/etcd/member/snap/db") }
	wal := func(t *testing.T, dir string) string {
		logs, _ := filepath.Glob(filepath.Join(dir, "store/etcd/member/wal/*.wal"))
		if len(logs) == 0 {
			t.Fatal("no wal")
		}
		return logs[len(logs)-1]
	}
	edit := func(t *testing.T, path string, f func([]byte) []byte) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, f(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	garbage := func(b []byte) {
		for n := range b {
			b[n] = byte(rng.Uint32())
		}
	}
	tests := []struct {
		name   string
		damage func(t *testing.T, dir string)
		aside  int // databases moved aside
	}{
		{"none", func(*testing.T, string) {}, 0},
		{"database: all garbage", func(t *testing.T, dir string) { edit(t, db(dir), func(b []byte) []byte { garbage(b); return b }) }, 1},
		{"database: both heads", func(t *testing.T, dir string) {
			edit(t, db(dir), func(b []byte) []byte { garbage(b[:8192]); return b })
		}, 1},
		{"database: pages behind the heads", func(t *testing.T, dir string) {
			edit(t, db(dir), func(b []byte) []byte { garbage(b[8192:]); return b })
		}, 1},
		{"database: cut", func(t *testing.T, dir string) {
			// The file is larger than what is used of it.
			d, err := bolt.Open(db(dir), 0o600, &bolt.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			var used int64
			d.View(func(tx *bolt.Tx) error { used = tx.Size(); return nil })
			d.Close()
			edit(t, db(dir), func(b []byte) []byte { return b[:used/2/4096*4096] })
		}, 1},
		{"database: cut to two pages", func(t *testing.T, dir string) { edit(t, db(dir), func(b []byte) []byte { return b[:8192] }) }, 1},
		{"log: missing", func(t *testing.T, dir string) { os.RemoveAll(filepath.Dir(wal(t, dir))) }, 1},
		{"log: garbage at the start", func(t *testing.T, dir string) {
			edit(t, wal(t, dir), func(b []byte) []byte { garbage(b[:4096]); return b })
		}, 1},
		{"all but the backup gone", func(t *testing.T, dir string) { os.RemoveAll(filepath.Join(dir, "store/etcd")) }, 0},
		{"crash loop while opening", func(t *testing.T, dir string) { writeMarker(filepath.Join(dir, "store/etcd.opening"), maxCrashes) }, 1},
		{"second crash while opening", func(t *testing.T, dir string) {
			marker := filepath.Join(dir, "store/etcd.opening")
			writeMarker(marker, maxCrashes-1)
			if err := os.WriteFile(crashReport(marker), []byte("panic: page 12 already freed"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, 1},
		{"killed while opening, again and again", func(t *testing.T, dir string) {
			marker := filepath.Join(dir, "store/etcd.opening")
			writeMarker(marker, maxCrashes-1)
			if err := os.WriteFile(crashReport(marker), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, 0},
		{"one crash while opening", func(t *testing.T, dir string) { writeMarker(filepath.Join(dir, "store/etcd.opening"), 1) }, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			fill(t, dir, 300)
			tt.damage(t, dir)
			s, buf := mustOpen(t, dir)
			for n := range 300 {
				has(t, s, instance(n))
			}
			if c, ok := s.DNSCredential("c1"); !ok || c.Settings["api_token"] != "tok" || s.DefaultDNSCredential() != "c1" {
				t.Error("the credential was lost")
			}
			st := s.Status()
			if len(st.MovedAside) != tt.aside {
				t.Errorf("moved aside: %v, want %d\n%s", st.MovedAside, tt.aside, buf)
			}
			if loud := strings.Contains(buf.String(), "level=ERROR"); loud != (tt.aside > 0 || tt.name == "all but the backup gone") {
				t.Errorf("loud: %v\n%s", loud, buf)
			}
			if strings.Contains(buf.String(), "tok") && strings.Contains(buf.String(), "api_token") {
				t.Error("a secret is in the log")
			}
			put(t, s, instance(1000), Stored)
			s.Close()
			s, _ = mustOpen(t, dir)
			has(t, s, instance(1000))
			has(t, s, instance(5))
		})
	}
}

// TestHangingEtcd: a dead etcd that cannot be ended keeps its files locked; the store goes on with a copy of them.
func TestHangingEtcd(t *testing.T) {
	t.Parallel()
	if !inChild(t) { // the hanging etcd stays
		return
	}
	dir := t.TempDir()
	s, buf := mustOpen(t, dir)
	for n := range 50 {
		put(t, s, instance(n), Stored)
	}
	b := s.currentBackend()
	b.close = func(time.Duration) bool { return false }
	b.fault.set(errors.New("invented"))
	eventually(t, "etcd to be given up", func() bool { return s.currentBackend() == nil })
	put(t, s, instance(50), Journaled)
	eventually(t, "etcd to be back", func() bool { return s.Status().Writable })
	put(t, s, instance(51), Stored)
	for n := range 52 {
		has(t, s, instance(n))
	}
	if st := s.Status(); st.Pending != 0 || len(st.MovedAside) > 0 || exists(s.etcdDir()+".stopped") || !strings.Contains(buf.String(), "going on with a copy") {
		t.Errorf("%+v\n%s", st, buf)
	}
	s.Close()
	s, _ = mustOpen(t, dir)
	for n := range 52 {
		has(t, s, instance(n))
	}
}

// TestDamagedBackup: neither the database nor the backup can be read; the journal still counts.
func TestDamagedBackup(t *testing.T) {
	dir := t.TempDir()
	fill(t, dir, 10)
	backup := filepath.Join(dir, "store/backup.json")
	if err := os.WriteFile(backup, []byte(`{"v":1,"keys":{}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "store/etcd/member/wal")); err != nil {
		t.Fatal(err)
	}
	j, _, err := openJournal(filepath.Join(dir, "store/journal"))
	if err != nil {
		t.Fatal(err)
	}
	c, _ := newCodec(1, nil)
	value, _ := c.encode(instanceKey(instance(77).ID), 5, toInstanceRecord(instance(77)))
	if _, err := j.append([]op{{key: instanceKey(instance(77).ID), value: value, at: 5}}, nil); err != nil {
		t.Fatal(err)
	}
	j.close()

	s, buf := mustOpen(t, dir)
	has(t, s, instance(77))
	if n := len(s.Instances()); n != 1 {
		t.Errorf("%d instances", n)
	}
	if !exists(backup+".unreadable") || !strings.Contains(buf.String(), "must be set up again") {
		t.Errorf("the unreadable backup was not kept, or nobody was told:\n%s", buf)
	}
	if st := s.Status(); st.Pending != 0 {
		t.Errorf("%d pending", st.Pending)
	}
}

// tmpfs mounts a small file system of its own.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Fatalf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// ballast fills the file system of dir up to free bytes.
func ballast(t *testing.T, dir string, free int64) (remove func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	// In steps: etcd reserves a log file at the same time.
	for size, step := int64(0), int64(1<<20); step > 0; {
		now, err := freeBytes(dir)
		if err != nil {
			t.Fatal(err)
		}
		if step = min(step, now-free); step <= 0 {
			break
		}
		if err := unix.Fallocate(int(f.Fd()), 0, size, step); errors.Is(err, unix.ENOSPC) {
			step /= 2
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		size += step
	}
	f.Close()
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDiskFills: the disk fills up while the store runs. Registrations go on, admin writes are refused with the reason,
// and all is well again when there is space.
func TestDiskFills(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "400m")
	s, buf := mustOpen(t, dir)
	put(t, s, instance(1), Stored)
	remove := ballast(t, dir, 1<<20)
	eventually(t, "the gate to close", func() bool { return !s.Status().Writable })
	for n := 2; n < 500; n++ {
		put(t, s, instance(n), Journaled)
	}
	err := s.PutACMEAttestation(context.Background(), ACMEAttestation{})
	if err == nil || !strings.Contains(err.Error(), "disk is almost full") {
		t.Errorf("admin write: %v", err)
	}
	if st := s.Status(); st.Pending != 498 || st.Volatile != 0 || st.JournalBytes == 0 || !strings.Contains(st.Reason, "disk is almost full") {
		t.Errorf("%+v", st)
	}
	has(t, s, instance(400))
	remove()
	eventually(t, "the gate to open", func() bool { return s.Status().Writable })
	if st := s.Status(); st.Pending != 0 {
		t.Errorf("%d pending", st.Pending)
	}
	put(t, s, instance(500), Stored)
	s.Close()
	s, _ = mustOpen(t, dir)
	for n := 1; n <= 500; n++ {
		has(t, s, instance(n))
	}
	if strings.Contains(buf.String(), "etcd stopped") {
		t.Errorf("etcd met the full disk:\n%s", buf)
	}
}

// TestStartOnFullDisk: the process restarts while the disk is full, with records in the journal.
func TestStartOnFullDisk(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "400m")
	fill(t, dir, 20)
	remove := ballast(t, dir, 1<<20)
	opts, buf := testOptions(t, dir)
	for start := range 2 {
		s, err := Open(context.Background(), opts)
		if err != nil {
			t.Fatal(err)
		}
		has(t, s, instance(3)) // from the backup
		if start == 1 {
			has(t, s, instance(100)) // from the journal
		}
		put(t, s, instance(100+start), Journaled)
		if st := s.Status(); st.Writable || st.Connected || !strings.Contains(st.Reason, "needed") || len(st.MovedAside) > 0 {
			t.Errorf("%+v", st)
		}
		s.Close()
	}
	if !strings.Contains(buf.String(), "starting from the backup") {
		t.Errorf("not said:\n%s", buf)
	}
	s := openWith(t, opts)
	remove()
	eventually(t, "etcd to open", func() bool { return s.Status().Writable })
	for _, n := range []int{3, 100, 101} {
		has(t, s, instance(n))
	}
	put(t, s, instance(200), Stored)
}

// TestVolatile: not even the journal can be written, because its reserve is used up.
func TestVolatile(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "400m")
	s, _ := mustOpen(t, dir)
	remove := ballast(t, dir, 0)
	eventually(t, "the gate to close", func() bool { return !s.Status().Writable })
	ctx := context.Background()
	n := 0
	for d := Journaled; d == Journaled; n++ {
		var err error
		if d, err = s.PutInstance(ctx, instance(n)); d == Volatile && (err == nil || !strings.Contains(err.Error(), "only in memory")) {
			t.Fatalf("%v, %v", d, err)
		} else if d != Volatile && err != nil {
			t.Fatal(err)
		}
		if n > 40_000 {
			t.Fatal("the disk is not full")
		}
	}
	t.Logf("the reserve took %d registrations", n-1)
	if n < 5000 {
		t.Errorf("the reserve took only %d registrations", n-1)
	}
	has(t, s, instance(n-1))
	if st := s.Status(); st.Volatile != 1 || st.Pending != n {
		t.Errorf("%+v", st)
	}
	remove()
	eventually(t, "etcd to take it all", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	s.Close()
	s, _ = mustOpen(t, dir)
	if got := len(s.Instances()); got != n {
		t.Errorf("%d instances, want %d", got, n)
	}
}

// TestReadOnlyDir: nothing can be written at all; the store still opens, shows the backup and keeps registrations in
// memory.
func TestReadOnlyDir(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "400m")
	fill(t, dir, 5)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	opts, _ := testOptions(t, dir)
	s := openWith(t, opts)
	has(t, s, instance(3))
	put(t, s, instance(9), Volatile)
	has(t, s, instance(9))
	if st := s.Status(); st.Writable || len(st.MovedAside) > 0 || st.Volatile != 1 {
		t.Errorf("%+v", st)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	eventually(t, "etcd to open", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	put(t, s, instance(10), Stored)
}

// TestEtcdDies: etcd meets a fatal error while it runs - here a disk that fills between two looks of the gate. The
// gateway must live, take registrations, and get its etcd back without a restart.
func TestEtcdDies(t *testing.T) {
	t.Parallel()
	if !inChild(t) { // the dead etcd leaves goroutines behind
		return
	}
	dir := tmpfs(t, "400m")
	opts, buf := testOptions(t, dir)
	opts.MinFreeBytes = 1 // the gate stays open
	s := openWith(t, opts)
	put(t, s, instance(0), Stored)
	remove := ballast(t, dir, 0)
	// Large records fill the preallocated log.
	big := instance(1)
	big.PolicyHash = strings.Repeat("x", 1<<20)
	last := Stored
	for n := 0; n < 300 && last == Stored; n++ {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		last, _ = s.PutInstance(ctx, big)
		cancel()
	}
	if last == Stored {
		t.Fatal("etcd did not notice the full disk")
	}
	eventually(t, "etcd to be given up", func() bool { return strings.Contains(buf.String(), "etcd is gone") })
	s.PutInstance(context.Background(), instance(2))
	has(t, s, instance(2))
	remove()
	eventually(t, "etcd to be back", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	put(t, s, instance(3), Stored)
	for _, n := range []int{0, 2, 3} {
		has(t, s, instance(n))
	}
	t.Log(buf)
	if len(s.Status().MovedAside) > 0 {
		t.Errorf("a full disk was taken for damage:\n%s", buf)
	}
	s.Close()
	s, _ = mustOpen(t, dir)
	for _, n := range []int{0, 2, 3} {
		has(t, s, instance(n))
	}
}
