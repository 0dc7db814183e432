package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"golang.org/x/sys/unix"
)

const (
	// walSegment is what etcd preallocates for a log file; it keeps a second one ready.
	walSegment = 64 << 20
	// embeddedTick is raft's clock. A single node waits for its own election only, so short ticks cost nothing but a few
	// wake-ups and save most of a second at each start.
	embeddedTick = 20 * time.Millisecond
	// maxCrashes is how many times in a row the process may crash while it opens the database before the database is held
	// responsible. Only crashes of the Go program count: a kill or a power failure says nothing about the database.
	maxCrashes = 2
	// closeTimeout bounds the orderly end of an embedded etcd.
	closeTimeout = 10 * time.Second
)

// transientError is a reason not to open the database now that does not speak against the database.
type transientError struct{ error }

func (e transientError) Unwrap() error { return e.error }

// outsideFault tells troubles of the machine from damage of the database: only damage justifies moving it aside. etcd
// wraps some errors as text only.
func outsideFault(err error) bool {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EACCES, syscall.EPERM, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, context.DeadlineExceeded, context.Canceled} {
		if errors.Is(err, e) || strings.Contains(err.Error(), e.Error()) {
			return true
		}
	}
	return errors.As(err, new(transientError))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// freeBytes returns what an unprivileged writer could still write to the file system of path.
func freeBytes(path string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", path, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// openEmbedded starts etcd on dir. It opens no socket of any kind: there are no peers, and the client calls in process.
func openEmbedded(ctx context.Context, dir, marker string, opts Options, log *slog.Logger) (*backend, error) {
	fresh := !exists(filepath.Join(dir, "member"))
	need := opts.MinFreeBytes
	if fresh {
		need += 2 * walSegment
	}
	if free, err := freeBytes(filepath.Dir(dir)); err == nil && free < need {
		return nil, transientError{fmt.Errorf("%d MiB free on the file system of %s, %d MiB are needed: %w", free>>20, dir, need>>20, syscall.ENOSPC)}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, transientError{err}
	}
	if !fresh {
		n, err := countCrashes(marker)
		if err != nil {
			return nil, transientError{fmt.Errorf("noting a crash while the database was opened: %w", err)}
		}
		if n >= maxCrashes {
			return nil, fmt.Errorf("the gateway crashed %d times in a row while it opened the database", n)
		}
		if err := watchCrash(marker); err != nil {
			return nil, transientError{fmt.Errorf("noting the attempt to open the database: %w", err)}
		}
		if err := checkDatabase(dir); err != nil {
			return nil, err
		}
	}

	cfg := embed.NewConfig()
	self := url.URL{Scheme: "unix", Host: "self:0"} // never listened on, never dialled
	cfg.Name = "gateway"
	cfg.Dir = dir
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{self}, []url.URL{self}
	cfg.InitialCluster = cfg.Name + "=" + self.String()
	cfg.TickMs = uint(embeddedTick / time.Millisecond)
	cfg.ElectionMs = 10 * cfg.TickMs
	cfg.QuotaBackendBytes = opts.QuotaBytes
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "1m"
	// The log of a single node serves no follower: keep little of it in memory.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 1000, 100
	f := newFault()
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(serverLogger(log, f))

	b := &backend{fault: f, embedded: true}
	e, err := startEtcd(ctx, b, cfg)
	if err == nil {
		select {
		case <-e.Server.ReadyNotify():
		case <-f.C():
			err = f.Err()
		case <-e.Server.StopNotify():
			err = errors.New("etcd ended while it started")
		case <-ctx.Done():
			err = transientError{fmt.Errorf("etcd did not become ready: %w", ctx.Err())}
		}
		if err != nil {
			abandon(e.Close, closeTimeout)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("starting etcd on %s: %w", dir, err)
	}
	c := v3client.New(e.Server)
	b.kv, b.watcher, b.lease, b.maint = c.KV, c.Watcher, c.Lease, c.Maintenance
	b.defragment = e.Server.Defragment // not through the client: its maintenance service lacks a part when in process
	b.close = func(timeout time.Duration) bool {
		return abandon(func() {
			c.Close()
			e.Close()
		}, timeout)
	}
	go func() {
		select {
		case <-e.Server.StopNotify():
			// Our own close, or etcd stopped itself after an error of its run loop; the latter must not go unnoticed.
			f.set(errors.New("etcd stopped"))
		case <-f.C():
		}
	}()
	return b, nil
}

// startEtcd starts etcd. One that comes up after ctx has ended is stopped again.
func startEtcd(ctx context.Context, b *backend, cfg *embed.Config) (*embed.Etcd, error) {
	var (
		mu     sync.Mutex
		gone   bool // nobody waits any more
		landed *embed.Etcd
	)
	e, err := call(ctx, b, func(context.Context) (*embed.Etcd, error) {
		e, err := embed.StartEtcd(cfg)
		mu.Lock()
		defer mu.Unlock()
		if err == nil && gone {
			e.Close()
			return nil, ctx.Err()
		}
		landed = e
		return e, err
	})
	if err != nil {
		mu.Lock()
		gone = true
		late := landed
		mu.Unlock()
		if late != nil {
			abandon(late.Close, closeTimeout)
		}
	}
	return e, err
}

// abandon runs stop and waits for it for a limited time only. It reports whether stop came to its end; etcd may also
// panic or end the goroutine in the middle.
func abandon(stop func(), timeout time.Duration) bool {
	done := make(chan bool, 1)
	go func() {
		completed := false
		defer func() {
			_ = recover()
			done <- completed
		}()
		stop()
		completed = true
	}()
	select {
	case completed := <-done:
		return completed
	case <-time.After(timeout):
		return false
	}
}

// The marker file counts the attempts to open the database that have not come to an end.
// crashReport is where the runtime writes why the process crashed while the database was being opened. etcd and its
// database panic on damage in goroutines of their own, where nothing can recover them.
func crashReport(marker string) string { return marker + ".crash" }

// watchCrash has a crash of the process reported until endWatch.
func watchCrash(marker string) error {
	f, err := os.OpenFile(crashReport(marker), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() // the runtime keeps a duplicate
	return debug.SetCrashOutput(f, debug.CrashOptions{})
}

func endWatch(marker string) {
	_ = debug.SetCrashOutput(nil, debug.CrashOptions{})
	_ = os.Remove(crashReport(marker))
}

// countCrashes returns how many crashes in a row the marker stands for, the one of the last attempt included.
func countCrashes(marker string) (int, error) {
	n := readMarker(marker)
	if st, err := os.Stat(crashReport(marker)); err != nil || st.Size() == 0 {
		return n, nil
	}
	if err := writeMarker(marker, n+1); err != nil {
		return n, err
	}
	return n + 1, os.Remove(crashReport(marker))
}

func readMarker(path string) int {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return n
}

func writeMarker(path string, n int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(n))
	return errors.Join(err, f.Sync(), f.Close())
}

// salvage gives the database new files when an instance that hangs keeps the old ones locked: the copy is what a crash
// would have left, and etcd recovers from it in the same way. The old directory is deleted; its blocks are free when
// the process ends.
func salvage(dir string) error {
	tmp, old := dir+".copy", dir+".stopped"
	if err := errors.Join(os.RemoveAll(tmp), os.RemoveAll(old)); err != nil {
		return err
	}
	if err := copyTree(dir, tmp); err != nil {
		return errors.Join(fmt.Errorf("copying the database: %w", err), os.RemoveAll(tmp))
	}
	if err := os.Rename(dir, old); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return errors.Join(err, os.Rename(old, dir))
	}
	return errors.Join(syncDir(filepath.Dir(dir)), os.RemoveAll(old))
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o700)
		case !d.Type().IsRegular(), strings.HasSuffix(path, ".tmp"):
			return nil // a log file made in advance
		}
		return copyFile(path, target)
	})
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Sync(), out.Close())
}

// repairQuota makes room after the database has hit its quota: forget history, defragment, lift the alarm.
func repairQuota(ctx context.Context, b *backend, revision int64) error {
	_, err := call(ctx, b, func(ctx context.Context) (struct{}, error) {
		if _, err := b.kv.Compact(ctx, revision, clientv3.WithCompactPhysical()); err != nil && !strings.Contains(err.Error(), "has been compacted") {
			return struct{}{}, fmt.Errorf("compacting: %w", err)
		}
		if err := b.defragment(); err != nil {
			return struct{}{}, fmt.Errorf("defragmenting: %w", err)
		}
		if _, err := b.maint.AlarmDisarm(ctx, &clientv3.AlarmMember{}); err != nil {
			return struct{}{}, fmt.Errorf("lifting the quota alarm: %w", err)
		}
		return struct{}{}, nil
	})
	return err
}
