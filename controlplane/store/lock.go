package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Lock is held until Release, until Lost, or until somebody releases it by force. It lives on a lease that is kept alive
// in the background: if the process dies, the lock is free after its TTL.
type Lock struct {
	s     *Store
	key   string
	rev   int64 // create revision of the key: the fencing token
	lease clientv3.LeaseID
	lost  chan struct{}
	stop  context.CancelFunc
	once  sync.Once
}

// HeldError says who holds a lock. It is an ErrLocked.
type HeldError struct {
	Key    string
	Holder LockHolder
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("%s is held by node %d since %s", e.Key, e.Holder.Node, time.Unix(int64(e.Holder.Since), 0).UTC().Format(time.RFC3339))
}

func (e *HeldError) Unwrap() error { return ErrLocked }

// LockCert takes the lock for issuing a domain's certificate. If it is held the error is a *HeldError; there is no
// waiting. ttl is how long the lock outlives its holder, at least 5 s.
func (s *Store) LockCert(ctx context.Context, domain string, ttl time.Duration) (*Lock, error) {
	if err := checkName("domain", domain); err != nil {
		return nil, err
	}
	return s.acquire(ctx, certKey(domain, "lock"), ttl)
}

// LockACMERotation takes the lock for replacing the ACME account.
func (s *Store) LockACMERotation(ctx context.Context, ttl time.Duration) (*Lock, error) {
	return s.acquire(ctx, KeyACMERotationLock, ttl)
}

// ForceReleaseCertLock takes a lock away from whoever holds it; no lock is no error. The former holder's fenced writes
// fail from now on.
func (s *Store) ForceReleaseCertLock(ctx context.Context, domain string) error {
	return s.transact(ctx, "releasing the lock of "+domain, []write{{certKey(domain, "lock"), nil}})
}

func (s *Store) acquire(ctx context.Context, key string, ttl time.Duration) (*Lock, error) {
	ttl = max(ttl, 5*time.Second)
	b, err := s.writableBackend()
	if err != nil {
		return nil, fmt.Errorf("store: locking %s: %w", key, err)
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.WriteTimeout)
	defer cancel()
	now := s.opts.Now()
	value, err := s.codec.encode(key, now.UnixMilli(), LockHolder{Node: s.opts.NodeID, Since: uint64(max(now.Unix(), 0))})
	if err != nil {
		return nil, err
	}
	granted, err := call(ctx, b, func(ctx context.Context) (*clientv3.LeaseGrantResponse, error) {
		return b.lease.Grant(ctx, int64(ttl/time.Second))
	})
	if err != nil {
		return nil, fmt.Errorf("store: locking %s: getting a lease: %w", key, err)
	}
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return b.kv.Txn(ctx).If(absent(key).cmp).Then(clientv3.OpPut(key, string(value), clientv3.WithLease(granted.ID))).Else(clientv3.OpGet(key)).Commit()
	})
	if err != nil {
		s.revoke(b, granted.ID)
		return nil, fmt.Errorf("store: locking %s: %w", key, err)
	}
	if !resp.Succeeded {
		s.revoke(b, granted.ID)
		held := &HeldError{Key: key}
		if kvs := resp.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
			_ = s.codec.decode(key, kvs[0].GetValue(), &held.Holder) // an unreadable lock is held all the same
		}
		return nil, fmt.Errorf("store: %w", held)
	}
	s.mirror.committed([]op{{key: key, value: value, at: now.UnixMilli()}}, resp.Header.Revision)
	alive, stop := context.WithCancel(s.ctx)
	l := &Lock{s: s, key: key, rev: resp.Header.Revision, lease: granted.ID, lost: make(chan struct{}), stop: stop}
	s.locks.Go(func() { l.keepAlive(alive, ttl) })
	return l, nil
}

// revoke gives a lease back, with all that lives on it; if that fails it runs out by itself.
func (s *Store) revoke(b *backend, id clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), s.opts.WriteTimeout)
	defer cancel()
	if _, err := call(ctx, b, func(ctx context.Context) (*clientv3.LeaseRevokeResponse, error) { return b.lease.Revoke(ctx, id) }); err != nil {
		s.log.Debug("a lease could not be given back", "err", err)
	}
}

// keepAlive renews the lease and closes lost when the lock may have passed to somebody else.
func (l *Lock) keepAlive(ctx context.Context, ttl time.Duration) {
	expires := time.Now().Add(ttl)
	tick := time.NewTicker(ttl / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			if l.s.ctx.Err() != nil {
				close(l.lost) // the store was closed under the holder
			}
			return
		case <-tick.C:
		}
		start := time.Now()
		ours, known := l.renew(ctx)
		switch {
		case ours:
			expires = start.Add(ttl)
		case ctx.Err() == nil && (known || !time.Now().Before(expires)):
			close(l.lost)
			return
		}
	}
}

// renew extends the lease and reports whether the lock is ours, if that is known.
func (l *Lock) renew(ctx context.Context) (ours, known bool) {
	b := l.s.currentBackend()
	if b == nil {
		return false, false
	}
	ctx, cancel := context.WithTimeout(ctx, l.s.opts.WriteTimeout)
	defer cancel()
	if _, err := call(ctx, b, func(ctx context.Context) (*clientv3.LeaseKeepAliveResponse, error) {
		return b.lease.KeepAliveOnce(ctx, l.lease)
	}); err != nil {
		return false, errors.Is(err, rpctypes.ErrLeaseNotFound)
	}
	// The lease can outlive the lock: it may have been released by force.
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) { return b.kv.Get(ctx, l.key) })
	if err != nil {
		return false, false
	}
	return len(resp.Kvs) > 0 && resp.Kvs[0].GetCreateRevision() == l.rev, true
}

// Lost is closed when the lock is no longer held for sure; work under it should stop. Fenced writes are safe anyway.
func (l *Lock) Lost() <-chan struct{} { return l.lost }

// Release gives the lock back. It is safe to call more than once; if etcd cannot be reached the lock runs out by itself.
func (l *Lock) Release(ctx context.Context) {
	l.once.Do(func() {
		l.stop()
		b := l.s.currentBackend()
		if b == nil {
			return
		}
		err := l.s.transact(ctx, "releasing "+l.key, []write{{l.key, nil}}, condition{l.cmp(), ErrFenced})
		if err != nil {
			l.s.log.Debug("a lock was not released, it runs out by itself", "key", l.key, "err", err)
		}
		l.s.revoke(b, l.lease)
	})
}

func (l *Lock) cmp() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.key), "=", l.rev)
}

// guard adds the fence to the conditions of a write; a nil lock adds nothing.
func (l *Lock) guard(conditions ...condition) []condition {
	if l == nil {
		return conditions
	}
	return append([]condition{{l.cmp(), ErrFenced}}, conditions...)
}
