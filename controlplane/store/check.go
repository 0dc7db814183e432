package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// checkDatabase reads the whole database of an etcd that is not running: every page must be reachable, every value must
// decode. It is done before etcd sees the files because etcd, or the database below it, ends the process when it meets
// damage later on a goroutine of its own. A few milliseconds per ten thousand keys. What it cannot find is a page that
// belongs to two places; the count of crashed attempts (maxCrashes) is for that.
func checkDatabase(dir string) error {
	path := filepath.Join(dir, "member", "snap", "db")
	walDir := filepath.Join(dir, "member", "wal")
	logs, err := filepath.Glob(filepath.Join(walDir, "*.wal"))
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil // a first start that was cut short; etcd rebuilds the file from its log, or starts anew
	case err != nil:
		return fmt.Errorf("looking at the database: %w", err)
	case len(logs) == 0 && st.Size() > 0:
		// etcd would begin a new log at index 1 and silently ignore writes until it reaches the old index.
		return fmt.Errorf("the database %s is there but its log is missing from %s", path, walDir)
	}

	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("the database %s is damaged: %v", path, p)
			}
		}()
		debug.SetPanicOnFault(true) // pages beyond the end of the file
		done <- walkDatabase(path)
	}()
	return <-done
}

func walkDatabase(path string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		if errors.Is(err, bolt.ErrTimeout) {
			return transientError{fmt.Errorf("the database %s is in use by another process, or by an etcd of this process that hangs: %w", path, err)}
		}
		return fmt.Errorf("the database %s does not open: %w", path, err)
	}
	defer db.Close()
	return db.View(func(tx *bolt.Tx) error {
		if st, err := os.Stat(path); err == nil && tx.Size() > st.Size() {
			return fmt.Errorf("the database %s has %d bytes, its head says %d", path, st.Size(), tx.Size())
		}
		return tx.ForEach(func(name []byte, bucket *bolt.Bucket) error {
			values := string(name) == "key"
			return bucket.ForEach(func(k, v []byte) error {
				if !values {
					return nil
				}
				var kv mvccpb.KeyValue
				if err := proto.Unmarshal(v, &kv); err != nil {
					return fmt.Errorf("the database %s holds a revision that does not decode: %w", path, err)
				}
				return nil
			})
		})
	})
}

// asidePath returns a free name to keep a damaged database under.
func asidePath(dir string, now time.Time) string {
	base := dir + ".corrupt-" + now.UTC().Format("20060102T150405Z")
	for path, n := base, 2; ; n++ {
		if !exists(path) {
			return path
		}
		path = fmt.Sprintf("%s-%d", base, n)
	}
}

// listAside returns the damaged databases kept beside dir.
func listAside(dir string) []string {
	all, _ := filepath.Glob(strings.NewReplacer("[", "\\[", "*", "\\*", "?", "\\?").Replace(dir) + ".corrupt-*")
	return all
}
