package registry

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Sentinels; the texts are part of the wire behaviour of RegisterCvm (gateway spec 3.2).
var (
	ErrKeyInUse      = errors.New("WireGuard public key is already registered to another instance")
	ErrOtherApp      = errors.New("instance_id is already registered to a different app")
	ErrPoolExhausted = errors.New("IP pool exhausted, no available addresses in client_ip_range")
	// ErrNotFound is wrapped as "instance <id> not found".
	ErrNotFound = errors.New("not found")
	// ErrConflict: a record names a key or an address that an older registration holds.
	ErrConflict = errors.New("record lost against an older registration")
)

// Config is the address plan of this node (gateway spec 1.9). It is not validated against itself here; the
// configuration loader did that.
type Config struct {
	// Network is core.wg.ip: the own address with the mask of the overlay.
	Network netip.Prefix
	// Reserved is core.wg.reserved_net.
	Reserved []netip.Prefix
	// ClientRange is core.wg.client_ip_range, the pool of this node.
	ClientRange netip.Prefix
	// OwnKey is core.wg.public_key; empty switches the own-key check off.
	OwnKey string
}

// Registry is the table of instances. All methods are safe for concurrent use.
type Registry struct {
	cfg     Config
	now     func() time.Time
	version atomic.Uint64

	mu     sync.Mutex
	active map[string]*Instance
	// shadows are valid records that lost a key or an address to an older one. They are invisible but remembered: when
	// the winner goes they take its place, so that the state depends on the records alone and not on their order.
	shadows map[string]shadow
	byKey   map[string]*Instance
	byIP    map[netip.Addr]*Instance
	order   []*Instance            // active ones by id
	apps    map[string][]*Instance // active ones of an app by id
	pool    *pool
	subs    map[chan struct{}]struct{}
	feeds   map[*Feed]struct{}
}

type shadow struct {
	*Instance
	why error
}

// New returns an empty registry. now gives registration times.
func New(cfg Config, now func() time.Time) (*Registry, error) {
	for what, p := range map[string]netip.Prefix{"network": cfg.Network, "client range": cfg.ClientRange} {
		if !p.IsValid() || !p.Addr().Is4() {
			return nil, fmt.Errorf("registry: the %s %q is not an IPv4 prefix", what, p)
		}
	}
	for _, p := range cfg.Reserved {
		if !p.IsValid() || !p.Addr().Is4() {
			return nil, fmt.Errorf("registry: the reserved net %q is not an IPv4 prefix", p)
		}
	}
	cfg.Reserved = slices.Clone(cfg.Reserved)
	r := &Registry{cfg: cfg, now: now, pool: newPool(cfg), subs: make(map[chan struct{}]struct{})}
	r.shadows = make(map[string]shadow)
	r.resetActive()
	return r, nil
}

func (r *Registry) resetActive() {
	r.active = make(map[string]*Instance)
	r.byKey = make(map[string]*Instance)
	r.byIP = make(map[netip.Addr]*Instance)
	r.apps = make(map[string][]*Instance)
	r.order = nil
	for f := range r.feeds {
		f.all = true
	}
}

// Request is one registration, after the caller was identified (gateway spec 3.2 steps 1-6 are the caller's).
type Request struct {
	AppID, InstanceID, ComposeHash, PublicKey string
	// Policy is nil when the guest did not report one.
	Policy *PortPolicy
}

// Result says what a registration did.
type Result struct {
	Instance Instance
	// Prev is the record before, nil for a new instance. With Peer set, its key and address are the ones to take away.
	Prev *Instance
	// Record: the record differs from the stored one and must be written.
	Record bool
	// Peer: key or address differ, the WireGuard peer must be set before the guest is answered. (A registration can also
	// free what a conflicting record waited for; such side effects are announced to subscribers only.)
	Peer bool
	// Created: the instance was not routable before.
	Created bool
}

// Register performs steps 7 to 11 of gateway spec 3.2. A registration that changes nothing returns with Record and Peer
// false. On error nothing has changed.
func (r *Registry) Register(q Request) (Result, error) {
	if q.AppID == "" {
		return Result{}, fmt.Errorf("[%s] app id is empty", q.InstanceID)
	}
	if q.InstanceID == "" {
		return Result{}, fmt.Errorf("[%s] instance id is empty", q.InstanceID)
	}
	// A record that Load would refuse later must not come into being.
	if err := checkID("app id", q.AppID); err != nil {
		return Result{}, fmt.Errorf("[%.128s] %w", q.InstanceID, err)
	}
	if err := checkID("instance id", q.InstanceID); err != nil {
		return Result{}, fmt.Errorf("[%.128s] %w", q.InstanceID, err)
	}
	if err := checkKey(q.PublicKey, r.cfg.OwnKey); err != nil {
		return Result{}, fmt.Errorf("[%s] invalid client public key: %w", q.InstanceID, err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	res, err := r.register(q)
	if err != nil {
		return Result{}, fmt.Errorf("failed to allocate IP address for client: %w", err)
	}
	return res, nil
}

func (r *Registry) register(q Request) (Result, error) {
	if r.keyTaken(q.PublicKey, q.InstanceID) {
		return Result{}, ErrKeyInUse
	}
	now := uint64(max(r.now().Unix(), 0))
	cur, routable := r.find(q.InstanceID)
	next := Instance{ID: q.InstanceID, AppID: q.AppID, PublicKey: q.PublicKey, PolicyHash: q.ComposeHash, RegTime: now}
	if cur != nil {
		if cur.AppID != q.AppID {
			return Result{}, ErrOtherApp
		}
		next = *cur
		if next.PublicKey != q.PublicKey {
			next.PublicKey, next.RegTime = q.PublicKey, now
		}
		if next.PolicyHash != q.ComposeHash {
			next.Policy, next.PolicyHash = nil, q.ComposeHash
		}
	}
	if q.Policy != nil && !q.Policy.Equal(next.Policy) {
		next.Policy = q.Policy.clone()
	}
	// A new key makes the registration young, so that it would lose an address which another record claims too.
	contested := routable && next.RegTime != cur.RegTime && r.pool.contested(cur.IP)
	if !routable || contested || !r.pool.valid(cur.IP) {
		ip, ok := r.pool.lowest()
		if !ok {
			return Result{}, ErrPoolExhausted
		}
		next.IP, next.RegTime = ip, now
	}

	res := Result{Instance: next, Created: !routable}
	if routable {
		prev := *cur
		res.Prev = &prev
		if next.Equal(prev) {
			return res, nil
		}
	}
	res.Record = true
	res.Peer = !routable || next.PublicKey != cur.PublicKey || next.IP != cur.IP
	r.put(&next)
	r.changed()
	return res, nil
}

// find returns the record of id and whether it is active.
func (r *Registry) find(id string) (*Instance, bool) {
	if i, ok := r.active[id]; ok {
		return i, true
	}
	return r.shadows[id].Instance, false
}

// keyTaken includes shadows: they are older than anything registered now and would win later.
func (r *Registry) keyTaken(key, id string) bool {
	if o, ok := r.byKey[key]; ok && o.ID != id {
		return true
	}
	for _, s := range r.shadows {
		if s.PublicKey == key && s.ID != id {
			return true
		}
	}
	return false
}

// put makes i the record of its id, replacing the one there was.
func (r *Registry) put(i *Instance) {
	if cur, ok := r.active[i.ID]; ok && len(r.shadows) == 0 && cur.PublicKey == i.PublicKey && cur.IP == i.IP {
		// The common refresh: only the policy differs.
		r.activate(i)
		return
	}
	r.drop(i.ID)
	r.pool.claim(i.IP)
	if why := r.conflict(i); why == nil && len(r.shadows) == 0 {
		r.activate(i)
		return
	}
	r.shadows[i.ID] = shadow{Instance: i}
	r.settle()
}

// drop forgets the record of id and frees what it held.
func (r *Registry) drop(id string) (*Instance, bool) {
	i, routable := r.find(id)
	if i == nil {
		return nil, false
	}
	if routable {
		r.touch(id)
		delete(r.active, id)
		delete(r.byKey, i.PublicKey)
		delete(r.byIP, i.IP)
		r.order = remove(r.order, id)
		if rest := remove(r.apps[i.AppID], id); len(rest) > 0 {
			r.apps[i.AppID] = rest
		} else {
			delete(r.apps, i.AppID)
		}
	} else {
		delete(r.shadows, id)
	}
	r.pool.release(i.IP)
	return i, true
}

// activate indexes i; its address is claimed already. An active record of the same id, app, key and address is replaced.
func (r *Registry) activate(i *Instance) {
	r.touch(i.ID)
	r.active[i.ID] = i
	r.byKey[i.PublicKey] = i
	r.byIP[i.IP] = i
	r.order = set(r.order, i)
	r.apps[i.AppID] = set(r.apps[i.AppID], i)
}

func (r *Registry) conflict(i *Instance) error {
	if o, ok := r.byKey[i.PublicKey]; ok {
		return fmt.Errorf("%w: public key is held by instance %s", ErrConflict, o.ID)
	}
	if o, ok := r.byIP[i.IP]; ok {
		return fmt.Errorf("%w: address %s is held by instance %s", ErrConflict, i.IP, o.ID)
	}
	return nil
}

// settle decides all conflicts anew: in the order of age each record is taken unless its key or address is gone.
// O(n log n), and only ever needed while nodes disagree.
func (r *Registry) settle() {
	all := slices.Collect(maps.Values(r.active))
	for _, s := range r.shadows {
		all = append(all, s.Instance)
	}
	slices.SortFunc(all, byAge)
	r.resetActive()
	clear(r.shadows)
	for _, i := range all {
		if why := r.conflict(i); why != nil {
			r.shadows[i.ID] = shadow{i, why}
			continue
		}
		r.active[i.ID], r.byKey[i.PublicKey], r.byIP[i.IP] = i, i, i
		r.order = append(r.order, i)
	}
	slices.SortFunc(r.order, func(a, b *Instance) int { return cmp.Compare(a.ID, b.ID) })
	for _, i := range r.order {
		r.apps[i.AppID] = append(r.apps[i.AppID], i)
	}
}

func search(list []*Instance, id string) (int, bool) {
	return slices.BinarySearchFunc(list, id, func(i *Instance, id string) int { return cmp.Compare(i.ID, id) })
}

func set(list []*Instance, i *Instance) []*Instance {
	at, found := search(list, i.ID)
	if found {
		list[at] = i
		return list
	}
	return slices.Insert(list, at, i)
}

func remove(list []*Instance, id string) []*Instance {
	if at, found := search(list, id); found {
		return slices.Delete(list, at, at+1)
	}
	return list
}

// RejectedRecord is a stored record that is not used, and why.
type RejectedRecord struct {
	ID  string
	Err error
}

// Load replaces the whole state with the given records (gateway spec 6.3). Records that are wrong in themselves are
// skipped; records that lose a key or an address (errors.Is ErrConflict) are kept aside and take over when the winner
// goes. The answer lists both, by id.
func (r *Registry) Load(records []Instance) []RejectedRecord {
	var rejected []RejectedRecord
	good := make([]*Instance, 0, len(records))
	for n := range records {
		i := records[n]
		if err := r.checkRecord(&i); err != nil {
			rejected = append(rejected, RejectedRecord{i.ID, err})
			continue
		}
		i.Policy, i.AdminPolicy = i.Policy.clone(), i.AdminPolicy.clone()
		good = append(good, &i)
	}
	// An id can occur twice only if the caller merges sources; which one stays must not depend on their order.
	slices.SortFunc(good, func(a, b *Instance) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.RegTime, b.RegTime), a.IP.Compare(b.IP),
			cmp.Compare(a.PublicKey, b.PublicKey), cmp.Compare(a.AppID, b.AppID))
	})

	r.mu.Lock()
	defer r.mu.Unlock()
	r.resetActive()
	clear(r.shadows)
	r.pool.reset()
	for n, i := range good {
		if n > 0 && good[n-1].ID == i.ID {
			rejected = append(rejected, RejectedRecord{i.ID, errors.New("the id occurs twice")})
			continue
		}
		r.pool.claim(i.IP)
		r.shadows[i.ID] = shadow{Instance: i}
	}
	r.settle()
	for _, s := range r.shadows {
		rejected = append(rejected, RejectedRecord{s.ID, s.why})
	}
	slices.SortStableFunc(rejected, func(a, b RejectedRecord) int { return cmp.Compare(a.ID, b.ID) })
	r.changed()
	return rejected
}

// Apply adopts one record as the store has it now, typically another node's write. changed reports whether the visible
// state differs. The error says why the record is not used; a record that is wrong in itself leaves the old one in place.
func (r *Registry) Apply(record Instance) (changed bool, err error) {
	if err := r.checkRecord(&record); err != nil {
		return false, err
	}
	record.Policy, record.AdminPolicy = record.Policy.clone(), record.AdminPolicy.clone()
	r.mu.Lock()
	defer r.mu.Unlock()
	cur, routable := r.find(record.ID)
	if cur != nil && cur.AppID != record.AppID {
		return false, ErrOtherApp
	}
	if cur == nil || !cur.Equal(record) {
		r.put(&record)
		_, now := r.active[record.ID]
		if changed = now || routable; changed {
			r.changed()
		}
	}
	if s, lost := r.shadows[record.ID]; lost {
		return changed, s.why
	}
	return changed, nil
}

// Remove forgets an instance. It returns the record, and false if there was none.
func (r *Registry) Remove(id string) (Instance, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, ok := r.drop(id)
	if !ok {
		return Instance{}, false
	}
	r.settleAfterDrop()
	r.changed()
	return *i, true
}

func (r *Registry) settleAfterDrop() {
	if len(r.shadows) > 0 {
		r.settle()
	}
}

// SetReportedPolicy stores what a policy fetch found for the compose file with the given hash. It changes nothing if
// the instance reported a policy itself in the meantime or runs another compose file by now.
func (r *Registry) SetReportedPolicy(id, composeHash string, p *PortPolicy) (i Instance, changed bool, err error) {
	return r.edit(id, func(next *Instance) {
		if next.PolicyHash == composeHash && next.Policy == nil {
			next.Policy = p.clone()
		}
	})
}

// SetAdminPolicy stores the operator's override (gateway spec 3.5).
func (r *Registry) SetAdminPolicy(id string, p *PortPolicy) (i Instance, changed bool, err error) {
	if p == nil {
		return Instance{}, false, errors.New("port policy is required")
	}
	return r.edit(id, func(next *Instance) { next.AdminPolicy = p.clone() })
}

// ClearAdminPolicy removes the override; without one it succeeds and changes nothing.
func (r *Registry) ClearAdminPolicy(id string) (i Instance, changed bool, err error) {
	return r.edit(id, func(next *Instance) { next.AdminPolicy = nil })
}

// edit changes policies of an active instance: key and address stay, so no conflict can arise.
func (r *Registry) edit(id string, change func(*Instance)) (Instance, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	cur, ok := r.active[id]
	if !ok {
		return Instance{}, false, fmt.Errorf("instance %s %w", id, ErrNotFound)
	}
	next := *cur
	change(&next)
	if next.Equal(*cur) {
		return *cur, false, nil
	}
	r.activate(&next)
	r.changed()
	return next, true, nil
}

// Instance returns the active record of id.
func (r *Registry) Instance(id string) (Instance, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, ok := r.active[id]
	if !ok {
		return Instance{}, false
	}
	return *i, true
}

// ByApp returns the instances of an app by id.
func (r *Registry) ByApp(app string) []Instance {
	r.mu.Lock()
	defer r.mu.Unlock()
	return values(r.apps[app])
}

// List returns all active instances by id.
func (r *Registry) List() []Instance {
	_, list := r.Snapshot()
	return list
}

// Snapshot returns List together with the version it stands for.
func (r *Registry) Snapshot() (version uint64, instances []Instance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.version.Load(), values(r.order)
}

// Apps returns the ids of all apps that have an instance, sorted.
func (r *Registry) Apps() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.apps))
}

// Len returns the number of active instances.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.active)
}

// Allocated returns the addresses of all active instances in ascending order.
func (r *Registry) Allocated() []netip.Addr {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.SortedFunc(maps.Keys(r.byIP), netip.Addr.Compare)
}

// PoolUsage returns how many addresses of the own range are claimed, and how many it has.
func (r *Registry) PoolUsage() (used, size uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return uint64(len(r.pool.claims)), r.pool.size()
}

func values(list []*Instance) []Instance {
	out := make([]Instance, len(list))
	for n, i := range list {
		out[n] = *i
	}
	return out
}

// Recycle removes the instances that nobody has heard of for longer than timeout and returns them by id (gateway spec
// 6.6). handshakes gives the latest WireGuard handshake any node has seen with an instance, the zero time if none is
// known; it is called without the lock. An instance without a known handshake is left alone until timeout has passed
// since startedAt: a node that has just started does not know yet whom the others talk to.
func (r *Registry) Recycle(handshakes func(id string) time.Time, timeout time.Duration, startedAt time.Time) []Instance {
	now := r.now()
	stale := func(t time.Time) bool { return now.Sub(t) > timeout }

	r.mu.Lock()
	var suspects []*Instance
	suspect := func(i *Instance) {
		if i.RegTime <= uint64(max(now.Unix(), 0)) && stale(time.Unix(int64(i.RegTime), 0)) {
			suspects = append(suspects, i)
		}
	}
	for _, i := range r.order {
		suspect(i)
	}
	for _, s := range r.shadows {
		suspect(s.Instance)
	}
	r.mu.Unlock()

	dead := suspects[:0]
	for _, i := range suspects {
		seen := handshakes(i.ID)
		if seen.IsZero() && !stale(startedAt) || !seen.IsZero() && !stale(seen) {
			continue
		}
		dead = append(dead, i)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	var gone []Instance
	for _, i := range dead {
		// A registration in the meantime has put another value there: the instance lives.
		if cur, _ := r.find(i.ID); cur == i {
			r.drop(i.ID)
			gone = append(gone, *i)
		}
	}
	if len(gone) > 0 {
		r.settleAfterDrop()
		r.changed()
	}
	slices.SortFunc(gone, func(a, b Instance) int { return cmp.Compare(a.ID, b.ID) })
	return gone
}

// Version grows with every change of the visible state.
func (r *Registry) Version() uint64 { return r.version.Load() }

// Subscribe returns a channel that receives after changes. It holds one notice: a slow reader sees one for many changes
// and reads the state itself with Snapshot. cancel ends the subscription; the channel is not closed.
func (r *Registry) Subscribe() (changes <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.subs[c] = struct{}{}
	return c, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.subs, c)
	}
}

func (r *Registry) changed() {
	r.version.Add(1)
	for c := range r.subs {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}
