package store

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
)

// op is one write on its way: a put, or a delete when value is nil.
type op struct {
	key   string
	value []byte
	at    int64
	// journaled: the op is in the journal file, so it survives the process.
	journaled bool
}

// mirror is the store's content in memory: what etcd is known to hold, covered by the writes it does not hold yet.
type mirror struct {
	mu    sync.Mutex
	known map[string]known
	// overlay are the writes of this node that wait for etcd, by key.
	overlay map[string]op
	// visible is what readers see, by group and key.
	visible map[string]map[string][]byte
	count   int
	// version grows with every visible change.
	version uint64
	// seen is the revision up to which etcd's changes were applied.
	seen     int64
	watchers map[*Watcher]struct{}
}

// known is etcd's state of one key. A deleted key is remembered until the watch has passed the revision of its
// deletion, or an older put still on its way would bring it back.
type known struct {
	value   []byte
	rev     int64
	deleted bool
}

func newMirror() *mirror {
	return &mirror{
		known: make(map[string]known), overlay: make(map[string]op),
		visible: make(map[string]map[string][]byte), watchers: make(map[*Watcher]struct{}),
	}
}

// refresh recomputes what is visible under key and tells the watchers; mu is held.
func (m *mirror) refresh(key string) {
	var value []byte
	if k, ok := m.known[key]; ok && !k.deleted {
		value = k.value
	}
	if o, ok := m.overlay[key]; ok && (value == nil || writtenAt(value) <= o.at) {
		value = o.value
	}
	g := group(key)
	old, had := m.visible[g][key]
	switch {
	case value == nil && !had, value != nil && had && string(old) == string(value):
		return
	case value == nil:
		delete(m.visible[g], key)
		m.count--
	default:
		if m.visible[g] == nil {
			m.visible[g] = make(map[string][]byte)
		}
		m.visible[g][key] = value
		if !had {
			m.count++
		}
	}
	m.version++
	for w := range m.watchers {
		w.mark(key)
	}
}

// etcdChange takes over a change of etcd at rev; nil deletes. Older news than what is known are ignored.
func (m *mirror) etcdChange(key string, value []byte, rev int64) {
	if m.known[key].rev >= rev {
		return
	}
	m.known[key] = known{value: value, rev: rev, deleted: value == nil}
	m.refresh(key)
}

// watched applies changes in the order of the watch; rev is the revision they reach up to.
func (m *mirror) watched(changes []op, revs []int64, rev int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, c := range changes {
		m.etcdChange(c.key, c.value, revs[n])
	}
	m.seen = max(m.seen, rev)
	for _, c := range changes {
		if k, ok := m.known[c.key]; ok && k.deleted && k.rev <= m.seen {
			delete(m.known, c.key)
		}
	}
}

// committed notes writes that etcd has accepted at rev and that no longer wait.
func (m *mirror) committed(ops []op, rev int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range ops {
		delete(m.overlay, o.key)
		if rev > m.known[o.key].rev {
			m.known[o.key] = known{value: o.value, rev: rev, deleted: o.value == nil}
		}
		m.refresh(o.key)
	}
}

// superseded drops waiting writes to which etcd has a later answer: values[n] at revs[n], nil if the key is not there.
func (m *mirror) superseded(ops []op, values [][]byte, revs []int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, o := range ops {
		delete(m.overlay, o.key)
		if values[n] != nil && revs[n] > m.known[o.key].rev {
			m.known[o.key] = known{value: values[n], rev: revs[n]}
		}
		m.refresh(o.key)
	}
}

// abandon drops a waiting write.
func (m *mirror) abandon(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.overlay, key)
	m.refresh(key)
}

// wait covers keys with writes that etcd does not have yet.
func (m *mirror) wait(ops []op) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range ops {
		m.overlay[o.key] = o
		m.refresh(o.key)
	}
}

// waiting returns the writes that etcd does not have yet, by key.
func (m *mirror) waiting() []op {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.overlay), func(a, b op) int { return cmp.Compare(a.key, b.key) })
}

// replace takes over the whole content of etcd as of rev. A revision below what was seen means another database.
func (m *mirror) replace(content map[string]known, rev int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.known
	m.known = content
	if rev >= m.seen {
		// What was committed while the list was on its way is newer than the list.
		for key, k := range old {
			if k.rev > rev {
				m.known[key] = k
			}
		}
	}
	m.seen = rev
	for key := range m.known {
		m.refresh(key)
	}
	for key := range old {
		if _, still := m.known[key]; !still {
			m.refresh(key)
		}
	}
}

func (m *mirror) get(key string) ([]byte, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	value, ok := m.visible[group(key)][key]
	return value, ok
}

type keyValue struct {
	key   string
	value []byte
}

// list returns the pairs below prefix, by key. The prefix must contain its first slash.
func (m *mirror) list(prefix string) []keyValue {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []keyValue
	for key, value := range m.visible[group(prefix)] {
		if strings.HasPrefix(key, prefix) {
			out = append(out, keyValue{key, value})
		}
	}
	slices.SortFunc(out, func(a, b keyValue) int { return cmp.Compare(a.key, b.key) })
	return out
}

// all returns everything.
func (m *mirror) all() map[string][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string][]byte, m.count)
	for _, g := range m.visible {
		maps.Copy(out, g)
	}
	return out
}

func (m *mirror) currentVersion() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.version
}

// Event says that a key changed. Read the current state with the store's getters: events of a key are merged, and the
// state may be newer than the event.
type Event struct {
	Kind    Kind
	ID      string // see Kind
	Key     string
	Deleted bool
}

// Watcher collects the changes below its prefixes until they are taken. Nothing is lost however slow the reader is:
// changes of one key are merged into one event. Restarts, compactions and reconnections of etcd show only as the
// differences they make.
type Watcher struct {
	m        *mirror
	prefixes []string
	ready    chan struct{}
	pending  map[string]struct{} // guarded by m.mu
}

// Watch subscribes to the keys below the prefixes (or equal to them); none means all. All existing keys are reported
// first. Close the watcher when done.
func (s *Store) Watch(prefixes ...string) *Watcher {
	w := &Watcher{m: s.mirror, prefixes: slices.Clone(prefixes), ready: make(chan struct{}, 1), pending: make(map[string]struct{})}
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	for _, g := range w.m.visible {
		for key := range g {
			w.mark(key)
		}
	}
	w.m.watchers[w] = struct{}{}
	return w
}

// mark notes a changed key; m.mu is held.
func (w *Watcher) mark(key string) {
	if len(w.prefixes) > 0 && !slices.ContainsFunc(w.prefixes, func(p string) bool { return strings.HasPrefix(key, p) }) {
		return
	}
	w.pending[key] = struct{}{}
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

// Ready receives when there are events to Take.
func (w *Watcher) Ready() <-chan struct{} { return w.ready }

// Take returns the changes since the last call, by key; it does not wait.
func (w *Watcher) Take() []Event {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	events := make([]Event, 0, len(w.pending))
	for key := range w.pending {
		_, there := w.m.visible[group(key)][key]
		kind, id := parseKey(key)
		events = append(events, Event{Kind: kind, ID: id, Key: key, Deleted: !there})
	}
	clear(w.pending)
	slices.SortFunc(events, func(a, b Event) int { return cmp.Compare(a.Key, b.Key) })
	return events
}

// Next waits for changes and takes them.
func (w *Watcher) Next(ctx context.Context) ([]Event, error) {
	for {
		select {
		case <-w.ready:
			if events := w.Take(); len(events) > 0 {
				return events, nil
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the subscription. The Ready channel is not closed.
func (w *Watcher) Close() {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	delete(w.m.watchers, w)
	clear(w.pending)
}
