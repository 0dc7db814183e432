package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// listTimeout bounds reading everything.
const listTimeout = 30 * time.Second

// relist reads all of etcd into the mirror.
func (s *Store) relist(ctx context.Context, b *backend) error {
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) {
		return b.kv.Get(ctx, "", clientv3.WithPrefix())
	})
	if err != nil {
		return fmt.Errorf("listing etcd: %w", err)
	}
	content := make(map[string]known, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		content[string(kv.GetKey())] = known{value: kv.GetValue(), rev: kv.GetModRevision()}
	}
	s.mirror.replace(content, resp.Header.Revision)
	return nil
}

// follow applies etcd's changes until it is gone or the store is closed. A watch that breaks off (compaction, lost
// leader, overload) is resumed with a new list; the mirror turns that into the differences.
func (s *Store) follow(b *backend) error {
	for {
		err := s.watchOnce(b)
		switch {
		case s.ctx.Err() != nil:
			return s.ctx.Err()
		case b.fault != nil && faulted(b):
			return b.fault.Err()
		}
		s.noteError(err)
		s.log.Warn("the watch on etcd broke off, reading everything again", "err", err)
		for delay := 100 * time.Millisecond; ; delay = min(2*delay, 5*time.Second) {
			ctx, cancel := context.WithTimeout(s.ctx, listTimeout)
			err := s.relist(ctx, b)
			cancel()
			if err == nil {
				s.wake()
				break
			}
			s.setDown(err)
			select {
			case <-s.ctx.Done():
				return s.ctx.Err()
			case <-b.fault.C():
				return b.fault.Err()
			case <-time.After(delay):
			}
		}
	}
}

func faulted(b *backend) bool {
	select {
	case <-b.fault.C():
		return true
	default:
		return false
	}
}

func (s *Store) watchOnce(b *backend) error {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	s.mirror.mu.Lock()
	from := s.mirror.seen + 1
	s.mirror.mu.Unlock()
	// Without a leader the watch would be silent instead of broken.
	changes := b.watcher.Watch(clientv3.WithRequireLeader(ctx), "", clientv3.WithPrefix(), clientv3.WithRev(from))
	for {
		select {
		case resp, ok := <-changes:
			if !ok {
				return errors.New("the watch was closed")
			}
			if err := resp.Err(); err != nil {
				return err
			}
			s.apply(resp)
		case <-b.fault.C():
			return b.fault.Err()
		}
	}
}

func (s *Store) apply(resp clientv3.WatchResponse) {
	changes := make([]op, 0, len(resp.Events))
	revs := make([]int64, 0, len(resp.Events))
	urgent := false
	for _, e := range resp.Events {
		key := string(e.Kv.GetKey())
		o := op{key: key}
		if e.Type != mvccpb.Event_DELETE {
			o.value = e.Kv.GetValue()
		}
		changes, revs = append(changes, o), append(revs, e.Kv.GetModRevision())
		urgent = urgent || group(key)+"/" != PrefixInstances && !volatileKey(key)
	}
	s.mirror.watched(changes, revs, resp.Header.Revision)
	if urgent {
		select {
		case s.urgent <- struct{}{}:
		default:
		}
	}
}
