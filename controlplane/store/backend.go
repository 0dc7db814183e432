package store

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// errAborted ends a call whose goroutine etcd ended: it met a condition for which etcd would end the process.
var errAborted = errors.New("etcd gave up inside the call, see its message in the log")

// backend is one open etcd, embedded or remote.
type backend struct {
	kv       clientv3.KV
	watcher  clientv3.Watcher
	lease    clientv3.Lease
	maint    clientv3.Maintenance
	endpoint string // for Maintenance.Status
	embedded bool
	// defragment gives unused space of an embedded database back; writes wait meanwhile.
	defragment func() error
	// fault tells when an embedded etcd is beyond help; nil for a remote one.
	fault *fault
	// close ends it within the given time; false: it hangs, and its files stay locked until the process ends.
	close func(timeout time.Duration) bool
}

// call runs f, which calls into etcd, and waits for its result, the context or the end of etcd. An embedded etcd works
// on the caller's goroutine and may panic on it, end it or hang on a lock it will never get: all of that stays in here.
func call[T any](ctx context.Context, b *backend, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		r := result{err: errAborted}
		defer func() {
			if p := recover(); p != nil {
				r.err = fmt.Errorf("etcd panicked: %v", p)
			}
			done <- r
		}()
		debug.SetPanicOnFault(true) // a page of the database that cannot be read
		r.v, r.err = f(ctx)
	}()
	var zero T
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		return zero, ctx.Err()
	case <-b.fault.C():
		return zero, b.fault.Err()
	}
}

// fault is the first fatal message of an embedded etcd.
type fault struct {
	once sync.Once
	c    chan struct{}
	err  error
}

func newFault() *fault { return &fault{c: make(chan struct{})} }

func (f *fault) set(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.c)
	})
}

// C is closed after the first fatal message; nil (never ready) for a nil fault.
func (f *fault) C() <-chan struct{} {
	if f == nil {
		return nil
	}
	return f.c
}

// Err is valid once C is closed.
func (f *fault) Err() error { return f.err }
