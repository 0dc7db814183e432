package store

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
)

// Mode says where etcd runs.
type Mode string

const (
	// Embedded: a single node inside this process, without any listener.
	Embedded Mode = "embedded"
	// External: a cluster reached by URL.
	External Mode = "external"
)

// Sentinels.
var (
	// ErrNotWritable: etcd cannot be written now; the wrapped text says why. Registrations go to the journal instead.
	ErrNotWritable = errors.New("store is not writable")
	// ErrExists: the record to create is there already.
	ErrExists = errors.New("already exists")
	// ErrNotFound: the record to change is not there.
	ErrNotFound = errors.New("not found")
	// ErrInUse: the record cannot be deleted because another one refers to it.
	ErrInUse = errors.New("in use")
	// ErrLocked: somebody else holds the lock.
	ErrLocked = errors.New("locked")
	// ErrFenced: the lock under which the write was made is no longer held.
	ErrFenced = errors.New("lock lost")
	// ErrBusy: the queue of writes stayed full until the caller's deadline.
	ErrBusy = errors.New("too many writes are waiting")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store is closed")
	// ErrDirInUse: another process has the directory open.
	ErrDirInUse = errors.New("the store directory is in use by another process")
)

// Options configures Open.
type Options struct {
	// Mode defaults to Embedded.
	Mode Mode
	// Dir is the data directory (core.sync.data_dir), required. The store's own files are in Dir/store, mode 0700.
	Dir string
	// NodeID is this node's id, written into every record.
	NodeID uint32
	// Endpoints are the URLs or host:port pairs of an external etcd; required there, refused otherwise.
	Endpoints []string
	// TLS, Username and Password are for an external etcd.
	TLS                *tls.Config
	Username, Password string
	// Prefix is put before every key of an external etcd, so that a cluster can be shared. Default "dstack-gw/" there;
	// "/" alone means no prefix. An embedded etcd has none.
	Prefix string
	// Secret, if set, seals DNS credentials, the ACME account and certificate keys with AES-256-GCM. At least 16 bytes;
	// values in clear are still read.
	Secret []byte
	// Logger defaults to slog.Default().
	Logger *slog.Logger
	// Registerer, if set, gets the store's metrics.
	Registerer prometheus.Registerer
	// Now is the clock for time stamps; default time.Now.
	Now func() time.Time
	// QuotaBytes bounds the embedded database. Default 512 MiB: about 100,000 registrations with their history.
	QuotaBytes int64
	// MinFreeBytes: with less free space the embedded etcd is not written, because it cannot survive a full disk.
	// Default 64 MiB.
	MinFreeBytes int64
	// WriteTimeout is how long etcd has for a batch of registrations before they go to the journal. Default 2 s.
	WriteTimeout time.Duration
	// StartTimeout is how long Open waits for etcd before it starts without. Default 20 s embedded, 5 s external.
	StartTimeout time.Duration
	// BackupInterval is how often backup.json follows changed registrations. Other changes are backed up within a
	// second. Default 1 min.
	BackupInterval time.Duration
	// QueueSize bounds the registrations that wait to be written. Default 4096.
	QueueSize int
}

func (o *Options) fill() error {
	def := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&o.WriteTimeout, 2*time.Second)
	def(&o.BackupInterval, time.Minute)
	if o.QuotaBytes <= 0 {
		o.QuotaBytes = 512 << 20
	}
	if o.MinFreeBytes <= 0 {
		o.MinFreeBytes = 64 << 20
	}
	if o.QueueSize <= 0 {
		o.QueueSize = 4096
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Dir == "" {
		return errors.New("store: no data directory given")
	}
	switch o.Mode {
	case "", Embedded:
		o.Mode = Embedded
		if len(o.Endpoints) > 0 {
			return fmt.Errorf("store: mode %q takes no endpoints; set the mode to %q to use %v", Embedded, External, o.Endpoints)
		}
		o.Prefix = ""
		def(&o.StartTimeout, 20*time.Second)
	case External:
		def(&o.StartTimeout, 5*time.Second)
		if len(o.Endpoints) == 0 {
			return fmt.Errorf("store: mode %q needs endpoints", External)
		}
		switch o.Prefix {
		case "":
			o.Prefix = "dstack-gw/"
		case "/":
			o.Prefix = ""
		}
	default:
		return fmt.Errorf("store: unknown mode %q, want %q or %q", o.Mode, Embedded, External)
	}
	return nil
}

// Store is an open store. All methods are safe for concurrent use.
type Store struct {
	opts   Options
	log    *slog.Logger
	codec  *codec
	dir    string // the store's own directory
	uuid   UUID
	lock   *os.File
	mirror *mirror

	queue   chan *request
	kick    chan struct{} // wakes the writer to try etcd again
	closing chan struct{}
	closed  sync.Once
	ctx     context.Context // ends the supervisor and the housekeeper
	cancel  context.CancelFunc
	tasks   sync.WaitGroup
	writer  chan struct{} // closed when the writer has ended

	// Only the writer touches these.
	journal *journal
	lastAt  int64

	stateMu sync.Mutex
	state   state

	backupMu   sync.Mutex // one backup at a time
	backupKeys int        // keys in the last backup, guarded by backupMu
	urgent     chan struct{}

	locks sync.WaitGroup // keep-alives of held locks

	badMu sync.Mutex
	bad   map[string]string // keys that do not decode, with the reason
}

// state is what is known about etcd, guarded by stateMu.
type state struct {
	backend  *backend // nil while there is none
	writable bool
	reason   string // why it is not writable
	since    time.Time
	// wasWritable: it was once, in this life.
	wasWritable bool
	// probing: somebody finds out whether etcd can work; probed: it can.
	probing, probed bool
	diskFull        string // why the free-space gate is closed, empty when open
	lastErr         error
	lastAt          time.Time
	waiters         []chan struct{}
	// The rest is for Status.
	backedUp  time.Time
	backupErr error
	journal   int64
	server    serverStatus
}

// Open opens the store. It fails only on wrong options, when another process uses the directory or when ctx ends; any
// trouble with etcd, the disk or the files is logged and shown by Status, and the store starts with what it has.
func Open(ctx context.Context, opts Options) (*Store, error) {
	if err := opts.fill(); err != nil {
		return nil, err
	}
	c, err := newCodec(opts.NodeID, opts.Secret)
	if err != nil {
		return nil, err
	}
	s := &Store{
		opts: opts, log: opts.Logger.With("component", "store"), codec: c, dir: filepath.Join(opts.Dir, "store"), mirror: newMirror(),
		queue: make(chan *request, opts.QueueSize), kick: make(chan struct{}, 1), closing: make(chan struct{}),
		writer: make(chan struct{}), urgent: make(chan struct{}, 1), bad: make(map[string]string),
	}
	s.state.since = opts.Now()
	s.state.reason = "etcd was not opened yet"
	s.ctx, s.cancel = context.WithCancel(context.Background())

	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		s.log.Error("the store directory cannot be created: nothing is stored durably until this is repaired", "dir", s.dir, "err", err)
	} else if err := os.Chmod(s.dir, 0o700); err != nil {
		s.log.Warn("the store directory cannot be made private: it holds private keys", "dir", s.dir, "err", err)
	}
	if s.lock, err = lockDir(filepath.Join(s.dir, "lock")); errors.Is(err, ErrDirInUse) {
		s.cancel()
		return nil, err
	} else if err != nil {
		s.log.Error("the store directory cannot be locked against a second gateway", "dir", s.dir, "err", err)
	}
	if s.uuid, err = LoadNodeUUID(opts.Dir); err != nil {
		s.log.Error("the node uuid is not durable: other nodes see another node after a restart", "dir", opts.Dir, "err", err)
	}
	s.readJournal()

	first := make(chan error, 1)
	s.tasks.Add(1)
	go func() {
		defer s.tasks.Done()
		s.supervise(first)
	}()
	go s.write()

	timeout := time.NewTimer(opts.StartTimeout)
	defer timeout.Stop()
	select {
	case err = <-first:
	case <-timeout.C:
		err = fmt.Errorf("etcd did not open within %s", opts.StartTimeout)
	case <-ctx.Done():
		s.Close()
		return nil, fmt.Errorf("store: opening %s: %w", s.dir, ctx.Err())
	}
	if err == nil {
		// Replay what the journal holds before anybody reads: the records there are the younger ones.
		if werr := s.waitWritable(ctx, opts.WriteTimeout); werr != nil {
			s.log.Warn("etcd is open but not writable", "err", werr)
		}
	} else {
		s.startWithout(err)
	}
	s.tasks.Add(1)
	go func() {
		defer s.tasks.Done()
		s.housekeep()
	}()
	if opts.Registerer != nil {
		if err := opts.Registerer.Register(collector{s}); err != nil {
			s.Close()
			return nil, fmt.Errorf("store: registering metrics: %w", err)
		}
	}
	return s, nil
}

// startWithout fills the memory from the backup while etcd cannot be had.
func (s *Store) startWithout(cause error) {
	content, written, err := readBackup(s.backupPath())
	switch {
	case errors.Is(err, os.ErrNotExist):
		s.log.Error("etcd cannot be opened and there is no backup: starting empty. Guests register again by themselves; certificates and credentials are missing until etcd is back",
			"err", cause, "dir", s.dir)
		return
	case err != nil:
		s.log.Error("etcd cannot be opened and the backup cannot be read: starting empty. Guests register again by themselves; certificates and credentials are missing until etcd is back",
			"err", cause, "backup_err", err, "dir", s.dir)
		return
	}
	if s.mirror.seed(content) {
		s.log.Error("etcd cannot be opened: starting from the backup. Registrations go to the journal, admin changes and issuance are refused; the store keeps trying",
			"err", cause, "keys", len(content), "backup_of", written, "dir", s.dir)
	}
}

// seed takes over a backup unless etcd was heard in the meantime.
func (m *mirror) seed(content map[string][]byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen > 0 {
		return false
	}
	for key, value := range content {
		m.known[key] = known{value: value}
		m.refresh(key)
	}
	return true
}

// readJournal takes up the writes that did not reach etcd in an earlier life.
func (s *Store) readJournal() {
	path := filepath.Join(s.dir, "journal")
	j, content, err := openJournal(path)
	if err != nil {
		s.log.Error("the journal cannot be opened: registrations are not durable while etcd cannot be written", "err", err)
		s.journal = &journal{path: path, broken: true}
		return
	}
	s.journal = j
	s.state.journal = j.tail
	if content.damaged > 0 {
		keep := path + ".damaged-" + s.opts.Now().UTC().Format("20060102T150405Z")
		err := copyFile(path, keep)
		s.log.Error("the journal is damaged: some registrations of the time before are lost, their guests register again within minutes. A copy is kept",
			"damaged_bytes", content.damaged, "read_records", len(content.ops), "copy", keep, "copy_err", err)
	}
	// Frames of a write that failed half-way may follow younger ones: the time stamp decides.
	latest := make(map[string]op, len(content.ops))
	for _, o := range content.ops {
		if cur, ok := latest[o.key]; !ok || o.at >= cur.at {
			latest[o.key] = o
		}
		s.lastAt = max(s.lastAt, o.at)
	}
	for _, o := range latest {
		s.mirror.wait([]op{o})
	}
	if len(latest) > 0 {
		s.log.Warn("the journal holds writes that did not reach etcd before; they are replayed now", "records", len(latest))
	}
}

// Close writes what is queued, makes a last backup and ends etcd. It takes at most about 15 seconds.
func (s *Store) Close() error {
	s.closed.Do(func() {
		close(s.closing)
		<-s.writer
		s.cancel()
		s.tasks.Wait()
		s.locks.Wait()
		if s.mirror.currentVersion() > 0 {
			if err := s.Backup(); err != nil {
				s.log.Warn("the last backup failed", "err", err)
			}
		}
		s.journal.close()
		if s.lock != nil {
			s.lock.Close()
		}
		if s.opts.Registerer != nil {
			s.opts.Registerer.Unregister(collector{s})
		}
	})
	return nil
}

// NodeUUID returns the identity of the data directory.
func (s *Store) NodeUUID() UUID { return s.uuid }

// supervise keeps an etcd open until the store is closed. The first outcome goes to first.
func (s *Store) supervise(first chan<- error) {
	const maxDelay = 30 * time.Second
	delay := time.Second
	for {
		b, err := s.connect()
		if err == nil {
			s.setBackend(b)
		} else {
			s.setDown(err)
		}
		if first != nil {
			first <- err
			first = nil
		} else if err == nil {
			s.log.Info("etcd is open again")
		}
		if err == nil {
			delay = time.Second
			err = s.follow(b)
			s.setBackend(nil)
			s.setDown(err)
			if s.ctx.Err() == nil {
				s.log.Error("etcd is gone: registrations go to the journal, admin changes and issuance are refused. Opening it again", "err", err)
			}
			if !b.close(closeTimeout) && s.ctx.Err() == nil {
				s.log.Error("the stopped etcd hangs and keeps its files locked: going on with a copy of them")
				if err := salvage(s.etcdDir()); err != nil {
					s.log.Error("copying the database of the hanging etcd failed: restart the gateway to recover. Traffic and registrations go on", "err", err)
				}
			}
		} else if s.ctx.Err() == nil && delay > time.Second {
			s.log.Warn("etcd still cannot be opened", "err", err, "next_try_in", delay)
		}
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(delay):
		}
		delay = min(2*delay, maxDelay)
	}
}

func (s *Store) etcdDir() string { return filepath.Join(s.dir, "etcd") }

// connect opens etcd and reads it. A damaged embedded database is moved aside and replaced.
func (s *Store) connect() (*backend, error) {
	if s.opts.Mode == External {
		b, err := openExternal(s.opts, s.log)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(s.ctx, listTimeout)
		defer cancel()
		if err := s.relist(ctx, b); err != nil {
			b.close(closeTimeout)
			return nil, fmt.Errorf("reading etcd at %v: %w", s.opts.Endpoints, err)
		}
		return b, nil
	}

	b, err := s.connectEmbedded()
	if err == nil || s.ctx.Err() != nil || outsideFault(err) {
		return b, err
	}
	aside := asidePath(s.etcdDir(), s.opts.Now())
	// The mark comes first: if the process dies in between, the next start imports the backup all the same.
	if merr := writeMarker(s.restorePath(), 0); merr != nil {
		return nil, errors.Join(err, fmt.Errorf("the database is damaged but nothing can be written beside it: %w", merr))
	}
	if merr := os.Rename(s.etcdDir(), aside); merr != nil {
		return nil, errors.Join(err, fmt.Errorf("the database is damaged but cannot be moved aside: %w", merr))
	}
	_ = os.Remove(s.markerPath())
	s.log.Error("THE ETCD DATABASE IS DAMAGED. It was moved aside and a new one is filled from the backup and the journal. "+
		"Lost are registrations of the last minute (guests repeat them) and admin changes of the last second. "+
		"Check the disk; look at the admin settings; keep the directory for analysis or delete it", "err", err, "kept_as", aside)
	return s.connectEmbedded()
}

func (s *Store) markerPath() string  { return filepath.Join(s.dir, "etcd.opening") }
func (s *Store) restorePath() string { return filepath.Join(s.dir, "etcd.restore") }

func (s *Store) connectEmbedded() (*backend, error) {
	ctx, cancel := context.WithTimeout(s.ctx, 3*s.opts.StartTimeout)
	defer cancel()
	if !exists(s.etcdDir()) && exists(s.backupPath()) && !exists(s.restorePath()) {
		s.log.Error("the etcd directory is missing but a backup is there: it is restored. To start empty instead, stop the gateway and delete both",
			"dir", s.etcdDir(), "backup", s.backupPath())
		if err := writeMarker(s.restorePath(), 0); err != nil {
			return nil, transientError{err}
		}
	}
	defer endWatch(s.markerPath())
	b, err := openEmbedded(ctx, s.etcdDir(), s.markerPath(), s.opts, s.log)
	if err != nil {
		return nil, err
	}
	if exists(s.restorePath()) {
		err = s.restore(ctx, b)
	}
	if err == nil {
		err = s.relist(ctx, b)
	}
	if err != nil {
		b.close(closeTimeout)
		return nil, err
	}
	if err := os.Remove(s.markerPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.log.Warn("the note of crashes while the database was opened cannot be removed", "err", err)
	}
	return b, nil
}

func (s *Store) setBackend(b *backend) {
	s.stateMu.Lock()
	s.state.backend = b
	s.stateMu.Unlock()
	if b != nil {
		s.wake()
	}
}

// wake makes the writer try etcd.
func (s *Store) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// setDown notes why etcd cannot be written.
func (s *Store) setDown(err error) {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	if s.state.writable {
		s.state.writable, s.state.since = false, s.opts.Now()
	}
	s.state.reason = err.Error()
	s.state.lastErr, s.state.lastAt = err, s.opts.Now()
}

// setWritable notes that etcd takes writes, and returns since when it did not (zero: it did all along) and whether it
// is the first time.
func (s *Store) setWritable() (downSince time.Time, first bool) {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	if s.state.backend == nil {
		return time.Time{}, false // gone in the meantime
	}
	if !s.state.writable {
		downSince, first = s.state.since, !s.state.wasWritable
		s.state.writable, s.state.wasWritable, s.state.reason, s.state.since = true, true, "", s.opts.Now()
	}
	for _, w := range s.state.waiters {
		close(w)
	}
	s.state.waiters = nil
	return downSince, first
}

// writableBackend returns etcd if it can be written.
func (s *Store) writableBackend() (*backend, error) {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	if s.state.diskFull != "" {
		return nil, fmt.Errorf("%w: %s", ErrNotWritable, s.state.diskFull)
	}
	if !s.state.writable || s.state.backend == nil {
		return nil, fmt.Errorf("%w: %s", ErrNotWritable, s.state.reason)
	}
	return s.state.backend, nil
}

func (s *Store) currentBackend() *backend {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	return s.state.backend
}

func (s *Store) waitWritable(ctx context.Context, timeout time.Duration) error {
	s.stateMu.Lock()
	if s.state.writable {
		s.stateMu.Unlock()
		return nil
	}
	w := make(chan struct{})
	s.state.waiters = append(s.state.waiters, w)
	s.stateMu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-w:
		return nil
	case <-timer.C:
		_, err := s.writableBackend()
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lockDir keeps a second process out. The lock is the kernel's and ends with the process.
func lockDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) {
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("store: %w: %s is locked. Stop the other gateway, or give this one another data_dir", ErrDirInUse, path)
		}
		return nil, err
	}
	return f, nil
}

// LoadNodeUUID reads dir/node_uuid, the identity of a data directory (gateway spec 8.8: UUID text). A missing or invalid
// file is replaced by a new random one, mode 0600. With an error the returned UUID is valid but was not stored.
func LoadNodeUUID(dir string) (UUID, error) {
	path := filepath.Join(dir, "node_uuid")
	var u UUID
	text, err := os.ReadFile(path)
	if err == nil && u.UnmarshalText([]byte(strings.ToLower(strings.TrimSpace(string(text))))) == nil {
		return u, nil
	}
	if _, rerr := rand.Read(u[:]); rerr != nil {
		return u, fmt.Errorf("store: making a node uuid: %w", rerr)
	}
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80 // RFC 9562, version 4
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return u, fmt.Errorf("store: reading the node uuid: %w", err)
	}
	if err := writeFile(path, []byte(u.String())); err != nil {
		return u, fmt.Errorf("store: storing the node uuid: %w", err)
	}
	return u, nil
}

// writeFile replaces a file atomically and durably, mode 0600.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}
