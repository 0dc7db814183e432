package rpc

import "sync"

// instanceLocks order what happens to one instance: whoever changes its record holds its lock until the change is
// stored, so that the store never ends with the older of two records. Different instances never wait for each other.
type instanceLocks struct {
	mu   sync.Mutex
	held map[string]*instanceLock
}

type instanceLock struct {
	sync.Mutex
	users int // holders and waiters, guarded by instanceLocks.mu
}

func (l *instanceLocks) lock(id string) (unlock func()) {
	l.mu.Lock()
	if l.held == nil {
		l.held = make(map[string]*instanceLock)
	}
	k := l.held[id]
	if k == nil {
		k = new(instanceLock)
		l.held[id] = k
	}
	k.users++
	l.mu.Unlock()
	k.Lock()
	return func() {
		k.Unlock()
		l.mu.Lock()
		if k.users--; k.users == 0 {
			delete(l.held, id)
		}
		l.mu.Unlock()
	}
}
