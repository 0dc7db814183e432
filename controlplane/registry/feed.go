package registry

// Feed remembers which instances changed since its last Take, so that a consumer
// that mirrors the registry (routing, WireGuard) does work in proportion to the
// changes and not to the number of instances.
type Feed struct {
	// C holds one notice; receive from it, then call Take.
	C <-chan struct{}

	r      *Registry
	cancel func()
	dirty  map[string]struct{} // guarded by r.mu, as is all
	all    bool
}

// Follow returns a feed whose first Take gives everything. Close it when done.
func (r *Registry) Follow() *Feed {
	c, cancel := r.Subscribe()
	f := &Feed{C: c, r: r, cancel: cancel, dirty: map[string]struct{}{}, all: true}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.feeds == nil {
		r.feeds = map[*Feed]struct{}{}
	}
	r.feeds[f] = struct{}{}
	return f
}

// Close ends the feed.
func (f *Feed) Close() {
	f.cancel()
	f.r.mu.Lock()
	defer f.r.mu.Unlock()
	delete(f.r.feeds, f)
}

// Take returns the instances that were added or changed and the ids that went since
// the last call, in no order. all says that changed is the whole state instead:
// whatever the consumer has beyond it must go.
func (f *Feed) Take() (changed []Instance, removed []string, all bool) {
	f.r.mu.Lock()
	defer f.r.mu.Unlock()
	if all = f.all; all {
		changed = values(f.r.order)
	} else {
		for id := range f.dirty {
			if i, ok := f.r.active[id]; ok {
				changed = append(changed, *i)
			} else {
				removed = append(removed, id)
			}
		}
	}
	f.all = false
	clear(f.dirty)
	return changed, removed, all
}

func (r *Registry) touch(id string) {
	for f := range r.feeds {
		f.dirty[id] = struct{}{}
	}
}
