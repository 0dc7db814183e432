package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// backup is the content of backup.json: everything but locks, secrets included (sealed ones stay sealed).
type backup struct {
	V         int       `json:"v"`
	WrittenAt time.Time `json:"written_at"`
	Node      uint32    `json:"node"`
	// CRC32C is over the compact JSON of keys. Without it the content is taken as it is, for one that was edited by hand.
	CRC32C *uint32                    `json:"crc32c,omitempty"`
	Keys   map[string]json.RawMessage `json:"keys"`
}

func (s *Store) backupPath() string { return filepath.Join(s.dir, "backup.json") }

// Backup writes backup.json, mode 0600, from memory; it works without etcd. The store does so by itself.
func (s *Store) Backup() error {
	s.backupMu.Lock()
	defer s.backupMu.Unlock()
	at := s.opts.Now().UTC()
	data, keys, err := s.encodeBackup(at)
	if err == nil {
		s.keepLarger(keys)
		err = writeFile(s.backupPath(), data)
	}
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	if s.state.backupErr = err; err != nil {
		return fmt.Errorf("store: writing the backup: %w", err)
	}
	s.state.backedUp = at
	s.backupKeys = keys
	return nil
}

// encodeBackup builds the file piece by piece: the values are JSON already.
func (s *Store) encodeBackup(at time.Time) (data []byte, n int, err error) {
	content := s.mirror.all()
	keys := []byte{'{'}
	for _, key := range slices.Sorted(maps.Keys(content)) {
		value := content[key]
		if volatileKey(key) || !json.Valid(value) {
			continue
		}
		name, err := json.Marshal(key)
		if err != nil {
			return nil, 0, err
		}
		if n++; n > 1 {
			keys = append(keys, ',')
		}
		keys = append(append(append(keys, name...), ':'), value...)
	}
	keys = append(keys, '}')
	crc, err := checksum(keys)
	if err != nil {
		return nil, 0, err
	}
	head, err := json.Marshal(backup{V: formatVersion, WrittenAt: at, Node: s.opts.NodeID, CRC32C: &crc})
	if err != nil {
		return nil, 0, err
	}
	return append(append(bytes.TrimSuffix(head, []byte("null}")), keys...), '}'), n, nil
}

func checksum(keys []byte) (uint32, error) {
	var compact bytes.Buffer
	if err := json.Compact(&compact, keys); err != nil {
		return 0, err
	}
	return crc32.Checksum(compact.Bytes(), crc32.MakeTable(crc32.Castagnoli)), nil
}

// keepLarger saves the last backup from being replaced by one with much less in it: an etcd that was emptied, or the
// wrong cluster, must not take the backup along. backupMu is held.
func (s *Store) keepLarger(keys int) {
	if s.backupKeys == 0 { // the first one of this life
		old, _, err := readBackup(s.backupPath())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			keep := s.backupPath() + ".unreadable"
			s.log.Error("the last backup cannot be read; it is kept", "err", err, "kept_as", keep, "keep_err", os.Rename(s.backupPath(), keep))
			return
		}
		s.backupKeys = len(old)
	}
	if s.backupKeys < 10 || keys >= s.backupKeys/2 {
		return
	}
	keep := filepath.Join(s.dir, "backup.before-loss.json")
	if err := os.Rename(s.backupPath(), keep); err != nil {
		s.log.Error("the larger backup cannot be kept", "err", err)
		return
	}
	s.log.Warn("the store has lost more than half of its keys since the last backup; that backup is kept", "keys_before", s.backupKeys, "keys_now", keys, "kept_as", keep)
}

func readBackup(path string) (keys map[string][]byte, written time.Time, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, time.Time{}, err
	}
	return parseBackup(data)
}

func parseBackup(data []byte) (map[string][]byte, time.Time, error) {
	var b struct {
		backup
		Keys json.RawMessage `json:"keys"` // as it stands in the file
	}
	if err := json.Unmarshal(data, &b); err != nil {
		return nil, time.Time{}, fmt.Errorf("the backup is not the store's JSON: %w", redactJSON(err))
	}
	if b.V != formatVersion {
		return nil, time.Time{}, fmt.Errorf("the backup has format version %d, this release reads %d", b.V, formatVersion)
	}
	if b.CRC32C != nil {
		if crc, err := checksum(b.Keys); err != nil || crc != *b.CRC32C {
			return nil, time.Time{}, errors.New("the checksum of the backup is wrong: it is damaged. If it was edited on purpose, remove its field crc32c")
		}
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(b.Keys, &keys); err != nil {
		return nil, time.Time{}, fmt.Errorf("the backup has no keys: %w", redactJSON(err))
	}
	out := make(map[string][]byte, len(keys))
	for key, value := range keys {
		var compact bytes.Buffer
		if err := json.Compact(&compact, value); err != nil {
			return nil, time.Time{}, fmt.Errorf("the backup has a wrong value: %w", redactJSON(err))
		}
		out[key] = compact.Bytes()
	}
	return out, b.WrittenAt, nil
}

// restore fills a new embedded etcd from the backup. Keys that are there already win: an earlier attempt may have been
// cut short.
func (s *Store) restore(ctx context.Context, b *backend) error {
	content, written, err := readBackup(s.backupPath())
	switch {
	case errors.Is(err, os.ErrNotExist):
		s.log.Error("there is no backup to restore: the store starts with what the journal holds. Guests register again by themselves; DNS credentials, domains and the ACME account must be set up again", "backup", s.backupPath())
		return os.Remove(s.restorePath())
	case err != nil:
		keep := s.backupPath() + ".unreadable"
		s.log.Error("the backup cannot be read: the store starts with what the journal holds. Guests register again by themselves; DNS credentials, domains and the ACME account must be set up again",
			"err", err, "kept_as", keep)
		return errors.Join(os.Rename(s.backupPath(), keep), os.Remove(s.restorePath()))
	}
	ops := make([]op, 0, len(content))
	for key, value := range content {
		ops = append(ops, op{key: key, value: value})
	}
	slices.SortFunc(ops, func(a, b op) int { return strings.Compare(a.key, b.key) })
	for chunk := range chunks(ops) {
		_, err := call(ctx, b, func(ctx context.Context) (struct{}, error) {
			var none struct{}
			absent := make([]clientv3.Cmp, len(chunk))
			for n, o := range chunk {
				absent[n] = clientv3.Compare(clientv3.CreateRevision(o.key), "=", 0)
			}
			resp, err := b.kv.Txn(ctx).If(absent...).Then(etcdOps(chunk)...).Commit()
			if err != nil || resp.Succeeded {
				return none, err
			}
			for n, o := range chunk {
				if _, err := b.kv.Txn(ctx).If(absent[n]).Then(etcdOps([]op{o})...).Commit(); err != nil {
					return none, err
				}
			}
			return none, nil
		})
		if err != nil {
			return transientError{fmt.Errorf("restoring the backup: %w", err)}
		}
	}
	s.log.Warn("the backup was restored into a new etcd", "keys", len(content), "backup_of", written)
	return os.Remove(s.restorePath())
}

// housekeep runs the periodic work: free-space gate, health, backup, defragmentation.
func (s *Store) housekeep() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var (
		lastBackup, lastDefrag = time.Now(), time.Now()
		backedUp               uint64
		urgent                 = true // the first backup soon after the start
	)
	for n := 0; ; n++ {
		select {
		case <-s.ctx.Done():
			return
		case <-s.urgent:
			urgent = true
			continue
		case <-tick.C:
		}
		if s.opts.Mode == Embedded {
			// From now on etcd may not be opened at the next start: the backup must not lack what it holds.
			urgent = s.checkDisk() || urgent
		}
		if n%5 == 0 {
			s.checkHealth()
		}
		version := s.mirror.currentVersion()
		if version != backedUp && (urgent || time.Since(lastBackup) >= s.opts.BackupInterval) {
			if err := s.Backup(); err != nil {
				s.log.Error("the backup of the store failed; it is tried again", "err", err)
			} else {
				backedUp = version
			}
			urgent, lastBackup = false, time.Now()
		}
		if s.opts.Mode == Embedded && time.Since(lastDefrag) >= 10*time.Minute {
			lastDefrag = time.Now()
			s.defragment()
		}
	}
}

// checkDisk opens and closes the gate before etcd: a full disk is fatal to it, so it must not be written near to that.
// It reports whether the gate was closed just now.
func (s *Store) checkDisk() (closed bool) {
	free, err := freeBytes(s.dir)
	if err != nil {
		return false // the directory is not there; etcd's own state tells more
	}
	s.stateMu.Lock()
	was := s.state.diskFull
	switch {
	case free < s.opts.MinFreeBytes:
		s.state.diskFull = fmt.Sprintf("the disk is almost full: %d MiB free on the file system of %s, %d MiB are needed", free>>20, s.dir, s.opts.MinFreeBytes>>20)
	case free >= s.opts.MinFreeBytes+s.opts.MinFreeBytes/8: // some distance, not to flap
		s.state.diskFull = ""
	}
	is := s.state.diskFull
	if was == "" && is != "" {
		// The writer finds its way back by a replay.
		s.state.writable, s.state.reason, s.state.since = false, is, s.opts.Now()
	}
	s.stateMu.Unlock()
	if closed = was == "" && is != ""; closed {
		s.log.Error("etcd is not written any more; registrations go to the journal, admin changes and issuance are refused. Free some space", "why", is)
	}
	if was != "" && is == "" {
		s.wake()
	}
	return closed
}

// checkHealth notices an etcd that has lost its quorum while nobody writes, and keeps Status up to date.
func (s *Store) checkHealth() {
	b := s.currentBackend()
	if b == nil {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.opts.WriteTimeout)
	defer cancel()
	_, err := call(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) { return b.kv.Get(ctx, "quorum") })
	if err != nil && s.ctx.Err() == nil {
		s.stateMu.Lock()
		was := s.state.writable
		s.stateMu.Unlock()
		s.setDown(fmt.Errorf("reading from etcd: %w", err))
		if was {
			s.log.Error("etcd does not answer: registrations go to the journal, admin changes and issuance are refused until it does", "err", err)
		}
	}
	s.askServer(ctx, b)
}

// defragment gives space back when most of a larger database is empty.
func (s *Store) defragment() {
	b := s.currentBackend()
	s.stateMu.Lock()
	st := s.state.server
	s.stateMu.Unlock()
	if b == nil || st.dbSize < 64<<20 || st.dbInUse > st.dbSize/2 {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	if _, err := call(ctx, b, func(context.Context) (struct{}, error) { return struct{}{}, b.defragment() }); err != nil {
		s.log.Warn("defragmenting the etcd database failed", "err", err)
	}
}
