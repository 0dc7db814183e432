package registry

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

var t0 = time.Unix(1_700_000_000, 0)

// clock is the injected time.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func key(n int) string {
	var raw [32]byte
	raw[0], raw[1], raw[2], raw[31] = byte(n), byte(n>>8), byte(n>>16), 1
	return base64.StdEncoding.EncodeToString(raw[:])
}

// defaults is the address plan of gateway spec 1.9.
func defaults() Config {
	return Config{
		Network:     netip.MustParsePrefix("10.0.0.1/24"),
		Reserved:    []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")},
		ClientRange: netip.MustParsePrefix("10.0.0.0/25"),
		OwnKey:      key(1 << 20),
	}
}

func mustNew(t testing.TB, cfg Config) (*Registry, *clock) {
	t.Helper()
	c := &clock{t0}
	r, err := New(cfg, c.now)
	if err != nil {
		t.Fatal(err)
	}
	return r, c
}

func mustRegister(t testing.TB, r *Registry, q Request) Result {
	t.Helper()
	res, err := r.Register(q)
	if err != nil {
		t.Fatalf("Register(%+v): %v", q, err)
	}
	check(t, r)
	return res
}

// check verifies the invariants of a registry.
func check(t testing.TB, r *Registry) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	claims := map[netip.Addr]int{}
	keys, ips := map[string]bool{}, map[netip.Addr]bool{}
	members := 0
	for id, i := range r.active {
		if i.ID != id || r.byKey[i.PublicKey] != i || r.byIP[i.IP] != i {
			t.Fatalf("indexes of %s disagree", id)
		}
		if keys[i.PublicKey] || ips[i.IP] {
			t.Fatalf("key or address of %s is not unique", id)
		}
		keys[i.PublicKey], ips[i.IP] = true, true
		if at, ok := search(r.order, id); !ok || r.order[at] != i {
			t.Fatalf("order lacks %s", id)
		}
		if at, ok := search(r.apps[i.AppID], id); !ok || r.apps[i.AppID][at] != i {
			t.Fatalf("app %s lacks %s", i.AppID, id)
		}
		claims[i.IP]++
	}
	for _, list := range r.apps {
		if len(list) == 0 {
			t.Fatal("an empty app stayed")
		}
		members += len(list)
	}
	if len(r.byKey) != len(r.active) || len(r.byIP) != len(r.active) || len(r.order) != len(r.active) || members != len(r.active) {
		t.Fatalf("sizes: %d active, %d keys, %d addresses, %d ordered, %d in apps", len(r.active), len(r.byKey), len(r.byIP), len(r.order), members)
	}
	if !slices.IsSortedFunc(r.order, func(a, b *Instance) int { return strings.Compare(a.ID, b.ID) }) {
		t.Fatal("order is not sorted")
	}
	for id, s := range r.shadows {
		if s.ID != id || s.why == nil {
			t.Fatalf("shadow %s is broken: %v", id, s.why)
		}
		if !keys[s.PublicKey] && !ips[s.IP] {
			t.Fatalf("%s is kept aside without a conflict", id)
		}
		claims[s.IP]++
	}
	// Allocated set == records, and every free address can be found again.
	want := 0
	for a, n := range claims {
		if r.pool.rng.Contains(a) {
			want++
			if r.pool.claims[toU32(a)] != n {
				t.Fatalf("%s is claimed %d times, want %d", a, r.pool.claims[toU32(a)], n)
			}
		}
	}
	if len(r.pool.claims) != want {
		t.Fatalf("%d addresses claimed, %d in records: leak", len(r.pool.claims), want)
	}
	for v := r.pool.first; v < r.pool.next && v <= r.pool.last; v++ {
		if iv, blocked := r.pool.blockedAt(v); blocked {
			v = iv.to
			continue
		}
		if r.pool.claims[uint32(v)] > 0 {
			continue
		}
		if _, ok := r.pool.inFreed[uint32(v)]; !ok {
			t.Fatalf("address %s is lost", fromU32(uint32(v)))
		}
	}
	if len(r.pool.inFreed) != len(r.pool.freed) {
		t.Fatalf("%d freed, %d queued", len(r.pool.inFreed), len(r.pool.freed))
	}
}

func TestRegisterErrors(t *testing.T) {
	r, _ := mustNew(t, defaults())
	mustRegister(t, r, Request{AppID: "aa", InstanceID: "i1", PublicKey: key(1)})
	nonCanonical := []byte(key(2))
	nonCanonical[42]++ // sets a bit that carries no data
	tests := []struct {
		name string
		q    Request
		want string // whole text, or a prefix when it ends with "..."
		is   error
	}{
		{"empty app", Request{InstanceID: "i2", PublicKey: key(2)}, "[i2] app id is empty", nil},
		{"empty instance", Request{AppID: "aa", PublicKey: key(2)}, "[] instance id is empty", nil},
		{"both empty", Request{}, "[] app id is empty", nil},
		{"space in id", Request{AppID: "aa", InstanceID: "a b", PublicKey: key(2)}, `[a b] instance id "a b" contains...`, nil},
		{"newline in app", Request{AppID: "a\na", InstanceID: "i2", PublicKey: key(2)}, `[i2] app id "a\na" contains...`, nil},
		{"long id", Request{AppID: "aa", InstanceID: strings.Repeat("x", 129), PublicKey: key(2)}, "[" + strings.Repeat("x", 128) + "] instance id has 129 bytes...", nil},
		{"no key", Request{AppID: "aa", InstanceID: "i2"}, "[i2] invalid client public key: want 44 characters...", nil},
		{"short key", Request{AppID: "aa", InstanceID: "i2", PublicKey: "AAAA"}, "[i2] invalid client public key: ...", nil},
		{"unpadded key", Request{AppID: "aa", InstanceID: "i2", PublicKey: key(2)[:43]}, "[i2] invalid client public key: ...", nil},
		{"31 bytes", Request{AppID: "aa", InstanceID: "i2", PublicKey: base64.StdEncoding.EncodeToString(make([]byte, 31))}, "[i2] invalid client public key: want 32 bytes, have 31", nil},
		{"33 bytes", Request{AppID: "aa", InstanceID: "i2", PublicKey: base64.StdEncoding.EncodeToString(make([]byte, 33))}, "[i2] invalid client public key: want 32 bytes, have 33", nil},
		{"url alphabet", Request{AppID: "aa", InstanceID: "i2", PublicKey: "-_" + key(2)[2:]}, "[i2] invalid client public key: not padded...", nil},
		{"newline in key", Request{AppID: "aa", InstanceID: "i2", PublicKey: key(2)[:10] + "\n" + key(2)[11:]}, "[i2] invalid client public key: not padded...", nil},
		{"second text of a key", Request{AppID: "aa", InstanceID: "i2", PublicKey: string(nonCanonical)}, "[i2] invalid client public key: not padded...", nil},
		{"own key", Request{AppID: "aa", InstanceID: "i2", PublicKey: defaults().OwnKey}, "[i2] invalid client public key: it is this gateway's own WireGuard key", errOwnKey},
		{"key of another", Request{AppID: "aa", InstanceID: "i2", PublicKey: key(1)}, "failed to allocate IP address for client: WireGuard public key is already registered to another instance", ErrKeyInUse},
		{"other app", Request{AppID: "bb", InstanceID: "i1", PublicKey: key(1)}, "failed to allocate IP address for client: instance_id is already registered to a different app", ErrOtherApp},
		{"other app, new key", Request{AppID: "bb", InstanceID: "i1", PublicKey: key(3)}, "failed to allocate IP address for client: instance_id is already registered to a different app", ErrOtherApp},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, version := r.List(), r.Version()
			_, err := r.Register(tt.q)
			if err == nil {
				t.Fatal("accepted")
			}
			if want, prefix := strings.CutSuffix(tt.want, "..."); err.Error() != want && !(prefix && strings.HasPrefix(err.Error(), want)) {
				t.Errorf("error %q, want %q", err, tt.want)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v is not %v", err, tt.is)
			}
			// A guest takes this text for a gateway of before 0.5.6.
			if strings.Contains(err.Error(), "no attestation provided") {
				t.Error("the text makes guests fall back")
			}
			check(t, r)
			if r.Version() != version || !slices.EqualFunc(before, r.List(), Instance.Equal) {
				t.Error("a refused registration changed the state")
			}
		})
	}
}

func TestRegisterSteps(t *testing.T) {
	open, tight := &PortPolicy{}, &PortPolicy{Ports: map[uint16]PortFlags{443: {PP: true}}, Restrict: true}
	r, c := mustNew(t, defaults())
	q := Request{AppID: "aa", InstanceID: "i1", ComposeHash: "h1", PublicKey: key(1)}

	// 11: new.
	res := mustRegister(t, r, q)
	if !res.Created || !res.Record || !res.Peer || res.Prev != nil || res.Instance.IP.String() != "10.0.0.2" ||
		res.Instance.RegTime != uint64(t0.Unix()) || res.Instance.PolicyHash != "h1" || res.Instance.Policy != nil {
		t.Fatalf("new: %+v", res)
	}
	if second := mustRegister(t, r, Request{AppID: "aa", InstanceID: "i0", PublicKey: key(2)}); second.Instance.IP.String() != "10.0.0.3" {
		t.Fatalf("second client got %s", second.Instance.IP)
	}

	// Nothing changed: same answer, no write, no apply.
	c.t = c.t.Add(3 * time.Minute)
	version := r.Version()
	res = mustRegister(t, r, q)
	if res.Record || res.Peer || res.Created || r.Version() != version || res.Instance.RegTime != uint64(t0.Unix()) || res.Prev == nil {
		t.Fatalf("refresh: %+v", res)
	}

	// 10d: a policy is reported.
	q.Policy = tight
	res = mustRegister(t, r, q)
	if !res.Record || res.Peer || !res.Instance.Policy.Equal(tight) {
		t.Fatalf("policy: %+v", res)
	}
	if res = mustRegister(t, r, q); res.Record {
		t.Fatalf("same policy again: %+v", res)
	}
	// An absent policy does not erase the reported one.
	q.Policy = nil
	if res = mustRegister(t, r, q); res.Record || !res.Instance.Policy.Equal(tight) {
		t.Fatalf("absent policy: %+v", res)
	}

	// 10c: another compose file forgets the report, the override stays.
	if _, _, err := r.SetAdminPolicy("i1", open); err != nil {
		t.Fatal(err)
	}
	q.ComposeHash = "h2"
	res = mustRegister(t, r, q)
	if !res.Record || res.Peer || res.Instance.Policy != nil || res.Instance.PolicyHash != "h2" || !res.Instance.AdminPolicy.Equal(open) {
		t.Fatalf("compose change: %+v", res)
	}
	// Both at once: the new report counts.
	q.ComposeHash, q.Policy = "h3", tight
	if res = mustRegister(t, r, q); !res.Instance.Policy.Equal(tight) || res.Instance.PolicyHash != "h3" {
		t.Fatalf("compose change with report: %+v", res)
	}

	// 10b: new key, new time, same address; the old key is free again.
	c.t = c.t.Add(time.Minute)
	q.PublicKey = key(10)
	res = mustRegister(t, r, q)
	if !res.Record || !res.Peer || res.Created || res.Instance.RegTime != uint64(c.t.Unix()) || res.Instance.IP.String() != "10.0.0.2" || res.Prev.PublicKey != key(1) {
		t.Fatalf("re-key: %+v", res)
	}
	if res := mustRegister(t, r, Request{AppID: "aa", InstanceID: "i9", PublicKey: key(1)}); res.Instance.IP.String() != "10.0.0.4" {
		t.Fatalf("old key: %+v", res)
	}

	// The caller's map is not the registry's.
	tight.Ports[1] = PortFlags{}
	if i, _ := r.Instance("i1"); len(i.Policy.Ports) != 1 {
		t.Error("the registry shares the caller's map")
	}
}

// TestRegisterReaddress: step 10f, an instance that comes from another node's range.
func TestRegisterReaddress(t *testing.T) {
	r, c := mustNew(t, defaults())
	tight := &PortPolicy{Restrict: true}
	for _, ip := range []string{"10.0.0.200", "10.7.0.9"} {
		old := Instance{ID: "i1", AppID: "aa", IP: netip.MustParseAddr(ip), PublicKey: key(1), RegTime: 5, PolicyHash: "h", Policy: tight, AdminPolicy: tight}
		if rejected := r.Load([]Instance{old}); len(rejected) != 0 {
			t.Fatal(rejected)
		}
		c.t = c.t.Add(time.Second)
		res := mustRegister(t, r, Request{AppID: "aa", InstanceID: "i1", ComposeHash: "h", PublicKey: key(1)})
		if !res.Record || !res.Peer || res.Created || res.Instance.IP.String() != "10.0.0.2" || res.Instance.RegTime != uint64(c.t.Unix()) ||
			!res.Prev.Equal(old) || !res.Instance.AdminPolicy.Equal(tight) || !res.Instance.Policy.Equal(tight) {
			t.Fatalf("from %s: %+v", ip, res)
		}
	}
}

func TestPoolRanges(t *testing.T) {
	tests := []struct {
		name                   string
		network, rng, reserved string
		want                   []string // all addresses in the order they are given out
		size                   uint64
	}{
		{"/30", "10.0.0.1/24", "10.0.0.8/30", "10.0.0.1/32", []string{"10.0.0.9", "10.0.0.10"}, 2},
		{"/31 has both", "10.0.0.1/24", "10.0.0.8/31", "10.0.0.1/32", []string{"10.0.0.8", "10.0.0.9"}, 2},
		{"/32 has one", "10.0.0.1/24", "10.0.0.8/32", "10.0.0.1/32", []string{"10.0.0.8"}, 1},
		{"own address skipped", "10.0.0.2/24", "10.0.0.0/29", "10.0.0.5/32 10.0.0.6/32", []string{"10.0.0.1", "10.0.0.3", "10.0.0.4"}, 3},
		{"reserved net skipped", "10.0.0.1/24", "10.0.0.0/28", "10.0.0.0/30 10.0.0.2/31 10.0.0.8/29", []string{"10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.7"}, 4},
		{"overlay broadcast skipped", "10.0.0.1/24", "10.0.0.254/31", "10.0.0.1/32", []string{"10.0.0.254"}, 1},
		{"host bits in the range", "10.0.0.1/24", "10.0.0.11/30", "10.0.0.1/32", []string{"10.0.0.9", "10.0.0.10"}, 2},
		{"nothing left", "10.0.0.1/24", "10.0.0.0/30", "10.0.0.0/24", nil, 0},
		{"not unicast", "239.255.255.254/8", "224.0.0.0/4", "", nil, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := Config{Network: netip.MustParsePrefix(tt.network), ClientRange: netip.MustParsePrefix(tt.rng)}
			for _, p := range strings.Fields(tt.reserved) {
				cfg.Reserved = append(cfg.Reserved, netip.MustParsePrefix(p))
			}
			r, _ := mustNew(t, cfg)
			var got []string
			for n := 0; ; n++ {
				res, err := r.Register(Request{AppID: "aa", InstanceID: fmt.Sprint(n), PublicKey: key(n)})
				if err != nil {
					if want := "failed to allocate IP address for client: IP pool exhausted, no available addresses in client_ip_range"; err.Error() != want {
						t.Errorf("error %q, want %q", err, want)
					}
					break
				}
				got = append(got, res.Instance.IP.String())
			}
			check(t, r)
			if !slices.Equal(got, tt.want) {
				t.Errorf("given out %v, want %v", got, tt.want)
			}
			if used, size := r.PoolUsage(); size != tt.size || used != uint64(len(tt.want)) {
				t.Errorf("usage %d of %d, want %d of %d", used, size, len(tt.want), tt.size)
			}
		})
	}
}

// TestValidIP is the rule of gateway spec 3.2; unlike hosts() it does not exclude the ends of the range.
func TestValidIP(t *testing.T) {
	cfg := defaults()
	cfg.Reserved = append(cfg.Reserved, netip.MustParsePrefix("10.0.0.64/28"))
	p := newPool(cfg)
	for ip, want := range map[string]bool{
		"10.0.0.0": true, "10.0.0.1": false, "10.0.0.2": true, "10.0.0.63": true, "10.0.0.64": false, "10.0.0.79": false,
		"10.0.0.80": true, "10.0.0.127": true, "10.0.0.128": false, "10.0.0.255": false, "10.0.1.2": false, "::1": false, "::ffff:10.0.0.2": false,
	} {
		if got := p.valid(netip.MustParseAddr(ip)); got != want {
			t.Errorf("valid(%s) = %v, want %v", ip, got, want)
		}
	}
	cfg.ClientRange = netip.MustParsePrefix("10.0.0.0/24")
	if newPool(cfg).valid(netip.MustParseAddr("10.0.0.255")) {
		t.Error("the broadcast of the overlay is valid")
	}
}

func TestLowestFreeFirst(t *testing.T) {
	r, _ := mustNew(t, defaults())
	for n := range 10 {
		mustRegister(t, r, Request{AppID: "aa", InstanceID: fmt.Sprint(n), PublicKey: key(n)})
	}
	for _, id := range []string{"7", "3", "5"} {
		if _, ok := r.Remove(id); !ok {
			t.Fatal("not removed")
		}
		check(t, r)
	}
	// A record from elsewhere takes one of the freed addresses.
	if changed, err := r.Apply(Instance{ID: "x", AppID: "aa", IP: netip.MustParseAddr("10.0.0.5"), PublicKey: key(50), RegTime: 1}); !changed || err != nil {
		t.Fatal(changed, err)
	}
	for n, want := range []string{"10.0.0.7", "10.0.0.9", "10.0.0.12"} {
		if res := mustRegister(t, r, Request{AppID: "aa", InstanceID: fmt.Sprint(20 + n), PublicKey: key(20 + n)}); res.Instance.IP.String() != want {
			t.Errorf("got %s, want %s", res.Instance.IP, want)
		}
	}
}

func record(id string, ip string, k int, reg uint64) Instance {
	return Instance{ID: id, AppID: "aa", IP: netip.MustParseAddr(ip), PublicKey: key(k), RegTime: reg}
}

func TestLoadRules(t *testing.T) {
	now := uint64(t0.Unix())
	edit := func(f func(*Instance)) Instance { i := record("i1", "10.0.0.9", 1, now); f(&i); return i }
	tests := []struct {
		name string
		rec  Instance
		want string // part of the reason; empty = accepted
	}{
		{"good", edit(func(*Instance) {}), ""},
		{"other node's network", edit(func(i *Instance) { i.IP = netip.MustParseAddr("172.20.1.9") }), ""},
		{"128 byte id", edit(func(i *Instance) { i.ID = strings.Repeat("i", 128) }), ""},
		{"5 min ahead", edit(func(i *Instance) { i.RegTime += 300 }), ""},
		{"empty id", edit(func(i *Instance) { i.ID = "" }), "instance id is empty"},
		{"empty app", edit(func(i *Instance) { i.AppID = "" }), "app id is empty"},
		{"129 byte id", edit(func(i *Instance) { i.ID = strings.Repeat("i", 129) }), "129 bytes"},
		{"129 byte app", edit(func(i *Instance) { i.AppID = strings.Repeat("i", 129) }), "129 bytes"},
		{"tab in id", edit(func(i *Instance) { i.ID = "a\tb" }), "white space"},
		{"nbsp in id", edit(func(i *Instance) { i.ID = "a\u00a0b" }), "white space"},
		{"DEL in app", edit(func(i *Instance) { i.AppID = "a\x7f" }), "control characters"},
		{"bad utf-8", edit(func(i *Instance) { i.ID = "a\xff" }), "invalid UTF-8"},
		{"empty key", edit(func(i *Instance) { i.PublicKey = "" }), "44 characters"},
		{"text key", edit(func(i *Instance) { i.PublicKey = "test-pubkey-0" }), "44 characters"},
		{"31 byte key", edit(func(i *Instance) { i.PublicKey = base64.StdEncoding.EncodeToString(make([]byte, 31)) }), "32 bytes"},
		{"own key", edit(func(i *Instance) { i.PublicKey = defaults().OwnKey }), "own WireGuard key"},
		{"no address", edit(func(i *Instance) { i.IP = netip.Addr{} }), "not IPv4"},
		{"IPv6", edit(func(i *Instance) { i.IP = netip.MustParseAddr("fd00::1") }), "not IPv4"},
		{"mapped", edit(func(i *Instance) { i.IP = netip.MustParseAddr("::ffff:10.0.0.9") }), "not IPv4"},
		{"own address", edit(func(i *Instance) { i.IP = netip.MustParseAddr("10.0.0.1") }), "own"},
		{"reserved", edit(func(i *Instance) { i.IP = netip.MustParseAddr("10.0.0.65") }), "reserved net 10.0.0.64/30"},
		{"unspecified", edit(func(i *Instance) { i.IP = netip.MustParseAddr("0.0.0.0") }), "unicast"},
		{"loopback", edit(func(i *Instance) { i.IP = netip.MustParseAddr("127.0.0.1") }), "unicast"},
		{"metadata service", edit(func(i *Instance) { i.IP = netip.MustParseAddr("169.254.169.254") }), "unicast"},
		{"multicast", edit(func(i *Instance) { i.IP = netip.MustParseAddr("224.0.0.1") }), "unicast"},
		{"broadcast", edit(func(i *Instance) { i.IP = netip.MustParseAddr("255.255.255.255") }), "unicast"},
		{"301 s ahead", edit(func(i *Instance) { i.RegTime += 301 }), "301 s in the future"},
		{"end of time", edit(func(i *Instance) { i.RegTime = 1<<64 - 1 }), "in the future"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := defaults()
			cfg.Reserved = append(cfg.Reserved, netip.MustParsePrefix("10.0.0.64/30"))
			r, _ := mustNew(t, cfg)
			neighbour := record("n", "10.0.0.30", 2, 1)
			rejected := r.Load([]Instance{tt.rec, neighbour})
			check(t, r)
			changed, err := r.Apply(tt.rec)
			if tt.want == "" {
				if len(rejected) != 0 || err != nil || changed || r.Len() != 2 {
					t.Fatalf("rejected %v, %v; changed %v", rejected, err, changed)
				}
				return
			}
			if len(rejected) != 1 || rejected[0].ID != tt.rec.ID || !strings.Contains(rejected[0].Err.Error(), tt.want) {
				t.Errorf("rejected %v, want %q", rejected, tt.want)
			}
			if err == nil || err.Error() != rejected[0].Err.Error() || changed {
				t.Errorf("Apply: %v, %v", changed, err)
			}
			if _, ok := r.Instance("n"); !ok || r.Len() != 1 {
				t.Error("a bad record took a good one with it")
			}
		})
	}
}

func TestLoadConflicts(t *testing.T) {
	tests := []struct {
		name    string
		records []Instance
		active  []string
		losers  []string
	}{
		{"older wins the key", []Instance{record("a", "10.0.0.9", 1, 20), record("b", "10.0.0.10", 1, 10)}, []string{"b"}, []string{"a"}},
		{"older wins the address", []Instance{record("a", "10.0.0.9", 1, 20), record("b", "10.0.0.9", 2, 10)}, []string{"b"}, []string{"a"}},
		{"smaller id at the same age", []Instance{record("b", "10.0.0.9", 1, 10), record("a", "10.0.0.9", 2, 10)}, []string{"a"}, []string{"b"}},
		// b loses to a, therefore c may keep the address that only b contests.
		{"a loser takes nothing along", []Instance{record("a", "10.0.0.9", 1, 1), record("b", "10.0.0.10", 1, 2), record("c", "10.0.0.10", 3, 3)}, []string{"a", "c"}, []string{"b"}},
		{"same id twice", []Instance{record("a", "10.0.0.9", 1, 2), record("a", "10.0.0.10", 2, 1)}, []string{"a"}, []string{"a"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for range 2 {
				r, _ := mustNew(t, defaults())
				rejected := r.Load(tt.records)
				check(t, r)
				var active, losers []string
				for _, i := range r.List() {
					active = append(active, i.ID)
				}
				for _, l := range rejected {
					losers = append(losers, l.ID)
				}
				if !slices.Equal(active, tt.active) || !slices.Equal(losers, tt.losers) {
					t.Errorf("active %v, want %v; losers %v, want %v", active, tt.active, losers, tt.losers)
				}
				slices.Reverse(tt.records)
			}
		})
	}
}

// TestConflictLife follows one conflict from its appearance to its end.
func TestConflictLife(t *testing.T) {
	r, c := mustNew(t, defaults())
	r.Load([]Instance{record("a", "10.0.0.2", 1, 10)})
	changed, err := r.Apply(record("b", "10.0.0.2", 2, 20))
	if changed || !errors.Is(err, ErrConflict) {
		t.Fatal(changed, err)
	}
	check(t, r)
	// Neither the address nor the key of the loser may be given away: it is older than anything registered now.
	if _, err := r.Register(Request{AppID: "aa", InstanceID: "c", PublicKey: key(2)}); !errors.Is(err, ErrKeyInUse) {
		t.Fatal(err)
	}
	if res := mustRegister(t, r, Request{AppID: "aa", InstanceID: "c", PublicKey: key(3)}); res.Instance.IP.String() != "10.0.0.3" {
		t.Fatal(res.Instance.IP)
	}
	// An even older record ousts the winner.
	if changed, err := r.Apply(record("d", "10.0.0.2", 4, 5)); !changed || err != nil {
		t.Fatal(changed, err)
	}
	check(t, r)
	if _, ok := r.Instance("a"); ok {
		t.Fatal("a is still there")
	}
	// a asks again and gets another address; b waits.
	c.t = c.t.Add(time.Second)
	res := mustRegister(t, r, Request{AppID: "aa", InstanceID: "a", PublicKey: key(1)})
	if !res.Created || !res.Peer || !res.Record || res.Prev != nil || res.Instance.IP.String() != "10.0.0.4" {
		t.Fatalf("%+v", res)
	}
	if _, err := r.Register(Request{AppID: "zz", InstanceID: "b", PublicKey: key(2)}); !errors.Is(err, ErrOtherApp) {
		t.Fatalf("a record kept aside does not protect its app: %v", err)
	}
	// The winner goes, b comes in its place.
	if _, ok := r.Remove("d"); !ok {
		t.Fatal("d not removed")
	}
	check(t, r)
	if b, ok := r.Instance("b"); !ok || b.IP.String() != "10.0.0.2" {
		t.Fatal("b did not take over")
	}
	// A record kept aside can be removed too.
	r.Apply(record("e", "10.0.0.2", 5, 30))
	if _, ok := r.Remove("e"); !ok {
		t.Fatal("e not removed")
	}
	check(t, r)
}

// TestRekeyContested: a new key makes a registration the youngest; it moves rather than lose its address to a record
// that was kept aside.
func TestRekeyContested(t *testing.T) {
	r, c := mustNew(t, defaults())
	r.Load([]Instance{record("a", "10.0.0.9", 1, 10), record("b", "10.0.0.9", 2, 20)})
	c.t = c.t.Add(time.Second)
	res := mustRegister(t, r, Request{AppID: "aa", InstanceID: "a", PublicKey: key(3)})
	if res.Instance.IP.String() != "10.0.0.2" || !res.Peer || res.Created {
		t.Fatalf("%+v", res)
	}
	if b, ok := r.Instance("b"); !ok || b.IP.String() != "10.0.0.9" {
		t.Fatal("the address was not passed on")
	}
}

func TestApply(t *testing.T) {
	r, _ := mustNew(t, defaults())
	i := record("a", "10.0.0.9", 1, 10)
	if changed, err := r.Apply(i); !changed || err != nil {
		t.Fatal(changed, err)
	}
	version := r.Version()
	if changed, err := r.Apply(i); changed || err != nil || r.Version() != version {
		t.Fatal("an equal record changed something", changed, err)
	}
	// Same registration time, other policy: upstream ignores it, the store's word counts here.
	i.AdminPolicy = &PortPolicy{Restrict: true}
	if changed, err := r.Apply(i); !changed || err != nil {
		t.Fatal(changed, err)
	}
	// Older registration time: still the store's word.
	i.RegTime, i.PublicKey = 5, key(7)
	if changed, err := r.Apply(i); !changed || err != nil {
		t.Fatal(changed, err)
	}
	check(t, r)
	got, _ := r.Instance("a")
	if !got.Equal(i) {
		t.Fatalf("%+v", got)
	}
	i.AppID = "bb"
	if changed, err := r.Apply(i); changed || !errors.Is(err, ErrOtherApp) {
		t.Fatal("another app took the instance over", changed, err)
	}
}

func TestPolicies(t *testing.T) {
	r, _ := mustNew(t, defaults())
	mustRegister(t, r, Request{AppID: "aa", InstanceID: "i1", ComposeHash: "h1", PublicKey: key(1)})
	reported := &PortPolicy{Ports: map[uint16]PortFlags{8080: {}, 443: {PP: true}}, Restrict: true}
	override := &PortPolicy{}

	source := func(want PolicySource, p *PortPolicy) {
		t.Helper()
		i, _ := r.Instance("i1")
		if got, s := i.Effective(); s != want || !got.Equal(p) {
			t.Fatalf("effective %+v from %s, want %+v from %s", got, s, p, want)
		}
	}
	source(SourceNone, nil)
	if _, changed, err := r.SetReportedPolicy("i1", "h0", reported); changed || err != nil {
		t.Fatal("a fetch for an older compose file counted", changed, err)
	}
	source(SourceNone, nil)
	if _, changed, err := r.SetReportedPolicy("i1", "h1", reported); !changed || err != nil {
		t.Fatal(changed, err)
	}
	source(SourceInstance, reported)
	if _, changed, _ := r.SetReportedPolicy("i1", "h1", override); changed {
		t.Fatal("a late fetch replaced a report")
	}
	if i, changed, err := r.SetAdminPolicy("i1", override); !changed || err != nil || !i.AdminPolicy.Equal(override) {
		t.Fatal(i, changed, err)
	}
	source(SourceAdmin, override)
	if _, changed, err := r.SetAdminPolicy("i1", override); changed || err != nil {
		t.Fatal(changed, err)
	}
	if _, changed, err := r.ClearAdminPolicy("i1"); !changed || err != nil {
		t.Fatal(changed, err)
	}
	if _, changed, err := r.ClearAdminPolicy("i1"); changed || err != nil {
		t.Fatal("clearing nothing must succeed", changed, err)
	}
	source(SourceInstance, reported)
	check(t, r)

	if _, _, err := r.SetAdminPolicy("i1", nil); err == nil || err.Error() != "port policy is required" {
		t.Error(err)
	}
	for name, call := range map[string]func() error{
		"SetReportedPolicy": func() error { _, _, err := r.SetReportedPolicy("zz", "", override); return err },
		"SetAdminPolicy":    func() error { _, _, err := r.SetAdminPolicy("zz", override); return err },
		"ClearAdminPolicy":  func() error { _, _, err := r.ClearAdminPolicy("zz"); return err },
	} {
		if err := call(); !errors.Is(err, ErrNotFound) || err.Error() != "instance zz not found" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParsePolicy(t *testing.T) {
	tests := []struct {
		name          string
		ports         []PortAttr
		strict, admin string // error texts
		want          []PortAttr
	}{
		{"empty", nil, "", "", []PortAttr{}},
		{"ascending answer", []PortAttr{{8080, false}, {443, true}}, "", "", []PortAttr{{443, true}, {8080, false}}},
		{"last wins", []PortAttr{{443, true}, {443, false}}, "", "", []PortAttr{{443, false}}},
		{"limits", []PortAttr{{1, false}, {65535, true}}, "", "", []PortAttr{{1, false}, {65535, true}}},
		{"zero", []PortAttr{{0, true}}, "port must be between 1 and 65535", "", []PortAttr{{0, true}}},
		{"too large", []PortAttr{{65536, false}}, "port 65536 out of u16 range", "port 65536 out of u16 range", nil},
		{"largest", []PortAttr{{1<<32 - 1, false}}, "port 4294967295 out of u16 range", "port 4294967295 out of u16 range", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, v := range []struct {
				parse func([]PortAttr, bool) (*PortPolicy, error)
				err   string
			}{{ParsePolicy, tt.strict}, {ParseAdminPolicy, tt.admin}} {
				p, err := v.parse(tt.ports, true)
				if v.err != "" {
					if err == nil || err.Error() != v.err {
						t.Errorf("error %v, want %s", err, v.err)
					}
					continue
				}
				if err != nil || !p.Restrict || !slices.Equal(p.List(), tt.want) {
					t.Errorf("%+v, %v; want %v", p, err, tt.want)
				}
			}
		})
	}
}

// TestPolicyDecision is the table of gateway spec 5.9.
func TestPolicyDecision(t *testing.T) {
	listed := map[uint16]PortFlags{443: {PP: true}}
	tests := []struct {
		p    *PortPolicy
		port uint16
		want bool
		pp   bool
	}{
		{nil, 443, false, false},
		{&PortPolicy{}, 443, true, false},
		{&PortPolicy{Ports: listed}, 80, true, false},
		{&PortPolicy{Ports: listed}, 443, true, true},
		{&PortPolicy{Ports: listed, Restrict: true}, 443, true, true},
		{&PortPolicy{Ports: listed, Restrict: true}, 80, false, false},
		{&PortPolicy{Restrict: true}, 443, false, false},
	}
	for _, tt := range tests {
		if got := tt.p.Allows(tt.port); got != tt.want {
			t.Errorf("%+v allows %d: %v, want %v", tt.p, tt.port, got, tt.want)
		}
		if got := tt.p.Flags(tt.port).PP; got != tt.pp {
			t.Errorf("%+v PP of %d: %v, want %v", tt.p, tt.port, got, tt.pp)
		}
	}
}

func TestRecycle(t *testing.T) {
	const timeout = 10 * time.Hour
	ago := func(d time.Duration) time.Time { return t0.Add(-d) }
	tests := []struct {
		name      string
		reg, seen time.Time // seen zero = no handshake known
		started   time.Time
		want      bool // recycled
	}{
		{"fresh", ago(time.Hour), time.Time{}, ago(100 * time.Hour), false},
		{"exactly the timeout", ago(timeout), time.Time{}, ago(100 * time.Hour), false},
		{"silent", ago(timeout + time.Second), time.Time{}, ago(100 * time.Hour), true},
		{"old but talking", ago(1000 * time.Hour), ago(time.Minute), ago(100 * time.Hour), false},
		{"talked long ago", ago(1000 * time.Hour), ago(timeout + time.Second), ago(100 * time.Hour), true},
		{"talked at the edge", ago(1000 * time.Hour), ago(timeout), ago(100 * time.Hour), false},
		{"clock of the observer ahead", ago(1000 * time.Hour), t0.Add(time.Hour), ago(100 * time.Hour), false},
		{"new registration, old handshake", ago(time.Hour), ago(100 * time.Hour), ago(100 * time.Hour), false},
		{"restart trap", ago(1000 * time.Hour), time.Time{}, ago(time.Minute), false},
		{"restart trap at the edge", ago(1000 * time.Hour), time.Time{}, ago(timeout), false},
		{"restart long enough ago", ago(1000 * time.Hour), time.Time{}, ago(timeout + time.Second), true},
		{"restarted, known to be silent", ago(1000 * time.Hour), ago(timeout + time.Second), ago(time.Minute), true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, _ := mustNew(t, defaults())
			if rejected := r.Load([]Instance{record("a", "10.0.0.2", 1, uint64(tt.reg.Unix())), record("b", "10.0.0.3", 2, uint64(t0.Unix()))}); len(rejected) > 0 {
				t.Fatal(rejected)
			}
			version := r.Version()
			gone := r.Recycle(func(id string) time.Time {
				r.Len() // must not be called under the lock
				if id == "b" {
					t.Error("asked for an instance that cannot be stale")
				}
				return tt.seen
			}, timeout, tt.started)
			check(t, r)
			_, there := r.Instance("a")
			if tt.want != (len(gone) == 1 && gone[0].ID == "a") || tt.want == there || tt.want == (r.Version() == version) {
				t.Errorf("recycled %v, still there %v; want %v", gone, there, tt.want)
			}
			if len(r.ByApp("aa")) != r.Len() {
				t.Error("the app's set disagrees")
			}
		})
	}
}

// TestRecycleRace: an instance that registers while the handshakes are being asked for is alive.
func TestRecycleRace(t *testing.T) {
	r, _ := mustNew(t, defaults())
	r.Load([]Instance{record("a", "10.0.0.2", 1, 1), record("b", "10.0.0.3", 2, 1), record("c", "10.0.0.2", 3, 2)})
	gone := r.Recycle(func(id string) time.Time {
		if id == "a" {
			mustRegister(t, r, Request{AppID: "aa", InstanceID: "a", PublicKey: key(9)})
		}
		return time.Time{}
	}, time.Hour, time.Time{})
	check(t, r)
	// c was kept aside and is as silent as b.
	if len(gone) != 2 || gone[0].ID != "b" || gone[1].ID != "c" || r.Len() != 1 {
		t.Errorf("recycled %v, %d left", gone, r.Len())
	}
	if never := r.Recycle(func(string) time.Time { return time.Time{} }, 1<<63-1, time.Time{}); len(never) != 0 {
		t.Error(`timeout "never" recycled`, never)
	}
}

func TestSubscribe(t *testing.T) {
	r, _ := mustNew(t, defaults())
	changes, cancel := r.Subscribe()
	notices := func() (n int) {
		for {
			select {
			case <-changes:
				n++
			default:
				return n
			}
		}
	}
	q := Request{AppID: "aa", InstanceID: "i1", PublicKey: key(1)}
	mustRegister(t, r, q)
	mustRegister(t, r, Request{AppID: "aa", InstanceID: "i2", PublicKey: key(2)})
	if n := notices(); n != 1 {
		t.Errorf("%d notices for two changes, want 1", n)
	}
	mustRegister(t, r, q)
	if n := notices(); n != 0 {
		t.Errorf("%d notices for no change", n)
	}
	r.Remove("i1")
	if n := notices(); n != 1 {
		t.Errorf("%d notices for a removal", n)
	}
	version, list := r.Snapshot()
	if version != r.Version() || len(list) != 1 {
		t.Errorf("snapshot %d %v", version, list)
	}
	cancel()
	r.Remove("i2")
	if n := notices(); n != 0 {
		t.Error("notice after cancel")
	}
}

func TestViews(t *testing.T) {
	r, _ := mustNew(t, defaults())
	for n, app := range []string{"bb", "aa", "bb"} {
		mustRegister(t, r, Request{AppID: app, InstanceID: fmt.Sprint(9 - n), PublicKey: key(n)})
	}
	ids := func(list []Instance) (out []string) {
		for _, i := range list {
			out = append(out, i.ID)
		}
		return out
	}
	if got := ids(r.List()); !slices.Equal(got, []string{"7", "8", "9"}) {
		t.Error(got)
	}
	if got := ids(r.ByApp("bb")); !slices.Equal(got, []string{"7", "9"}) {
		t.Error(got)
	}
	if got := r.ByApp("cc"); len(got) != 0 {
		t.Error(got)
	}
	if got := r.Apps(); !slices.Equal(got, []string{"aa", "bb"}) {
		t.Error(got)
	}
	if got := r.Allocated(); fmt.Sprint(got) != "[10.0.0.2 10.0.0.3 10.0.0.4]" {
		t.Error(got)
	}
	r.Remove("8")
	if got := r.Apps(); !slices.Equal(got, []string{"bb"}) {
		t.Error("an app without instances stayed", got)
	}
	if _, ok := r.Remove("8"); ok {
		t.Error("removed twice")
	}
}

func TestNewRefuses(t *testing.T) {
	for _, cfg := range []Config{
		{},
		{Network: netip.MustParsePrefix("fd00::1/64"), ClientRange: netip.MustParsePrefix("10.0.0.0/24")},
		{Network: netip.MustParsePrefix("10.0.0.1/24"), ClientRange: netip.MustParsePrefix("fd00::/64")},
		{Network: netip.MustParsePrefix("10.0.0.1/24"), ClientRange: netip.MustParsePrefix("10.0.0.0/24"), Reserved: []netip.Prefix{{}}},
	} {
		if _, err := New(cfg, time.Now); err == nil {
			t.Errorf("New(%+v) accepted", cfg)
		}
	}
}
