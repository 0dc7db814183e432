package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

func TestParseKey(t *testing.T) {
	tests := []struct {
		key  string
		kind Kind
		id   string
	}{
		{instanceKey("a/b"), KindInstance, "a/b"},
		{nodeInfoKey(7), KindNodeInfo, "7"},
		{nodeStatusKey(4294967295), KindNodeStatus, "4294967295"},
		{peerAddrKey(1), KindPeerAddr, "1"},
		{"__peer_addr/2", KindPeerAddr, "2"},
		{dnsCredentialKey("18c"), KindDNSCredential, "18c"},
		{"dns_cred_default", KindDefaultDNSCred, ""},
		{"global/certbot_config", KindCertbotConfig, ""},
		{"global/acme_credentials", KindACMECredentials, ""},
		{"global/acme_attestation", KindACMEAttestation, ""},
		{"global/acme_rotation_lock", KindACMERotationLock, ""},
		{"cert/a.org/config", KindZTDomain, "a.org"},
		{"cert/a.org/data", KindCertData, "a.org"},
		{"cert/a.org/lock", KindCertLock, "a.org"},
		{"cert/a.org/attestation/latest", KindCertAttestation, "a.org"},
		{"cert/a.org/attestation/1700000000", KindCertAttestation, "a.org"},
		{"cert/a.org/other", KindOther, ""},
		{"cert//data", KindOther, ""},
		{"cert/", KindOther, ""},
		{"inst/", KindOther, ""},
		{"", KindOther, ""},
		{"conn/a/1", KindOther, ""},
	}
	for _, tt := range tests {
		if kind, id := parseKey(tt.key); kind != tt.kind || id != tt.id {
			t.Errorf("parseKey(%q) = %v, %q; want %v, %q", tt.key, kind, id, tt.kind, tt.id)
		}
	}
}

func val(at int64) []byte { return []byte(fmt.Sprintf(`{"v":1,"at":%d}`, at)) }

// TestMirrorRules: the cases in which news arrive in another order than they happened.
func TestMirrorRules(t *testing.T) {
	m := newMirror()
	shows := func(want int64) {
		t.Helper()
		v, ok := m.get("inst/a")
		if got := writtenAt(v); ok != (want > 0) || got != want {
			t.Fatalf("shows %d (%v), want %d", got, ok, want)
		}
	}
	watch := func(value []byte, rev int64) { m.watched([]op{{key: "inst/a", value: value}}, []int64{rev}, rev) }

	watch(val(1), 10)
	shows(1)
	m.committed([]op{{key: "inst/a", value: val(3)}}, 12)
	shows(3)
	watch(val(2), 11) // older news on the watch
	shows(3)
	watch(val(3), 12) // our own write comes back
	shows(3)
	m.committed([]op{{key: "inst/a"}}, 14)
	shows(0)
	watch(val(4), 13) // a put from before our deletion
	shows(0)
	watch(nil, 14)
	shows(0)
	if len(m.known) != 0 {
		t.Errorf("a deleted key stays known: %v", m.known)
	}
	m.wait([]op{{key: "inst/a", value: val(20), at: 20}})
	shows(20)
	watch(val(15), 15) // another node's, older than what waits here
	shows(20)
	watch(val(25), 16) // younger
	shows(25)
	m.superseded([]op{{key: "inst/a", at: 20}}, [][]byte{val(25)}, []int64{16})
	shows(25)
	m.committed([]op{{key: "inst/a", value: val(30)}}, 18)
	m.replace(map[string]known{"inst/a": {value: val(25), rev: 16}}, 17) // a list that was on its way
	shows(30)
	m.replace(map[string]known{"inst/a": {value: val(1), rev: 2}}, 3) // another database
	shows(1)
	m.wait([]op{{key: "inst/a", at: 50}}) // a deletion that waits
	shows(0)
	m.replace(map[string]known{}, 5)
	shows(0)
	if m.count != 0 {
		t.Errorf("count %d", m.count)
	}
}

// TestMirrorConverges: whatever the interleaving of own writes and the watch, the end is etcd's.
func TestMirrorConverges(t *testing.T) {
	for seed := range 200 {
		rng := rand.New(rand.NewPCG(uint64(seed), 5))
		m := newMirror()
		truth := map[string][]byte{}
		type change struct {
			o   op
			rev int64
		}
		var log []change
		told := 0
		w := (&Store{mirror: m}).Watch()
		seen := map[string]bool{}
		take := func() {
			for _, e := range w.Take() {
				seen[e.Key] = !e.Deleted
			}
		}
		rev := int64(1)
		for range 300 {
			switch rng.IntN(4) {
			case 0, 1:
				rev++
				o := op{key: fmt.Sprintf("inst/%d", rng.IntN(5)), at: rev}
				if rng.IntN(3) > 0 {
					o.value = val(rev)
				}
				truth[o.key] = o.value
				log = append(log, change{o, rev})
				if rng.IntN(2) == 0 { // a write of our own is known at once
					m.committed([]op{o}, rev)
				}
			case 2:
				if told < len(log) {
					c := log[told]
					m.watched([]op{c.o}, []int64{c.rev}, c.rev)
					told++
				}
			default:
				take()
			}
			if rng.IntN(60) == 0 { // the watch broke off
				content := map[string]known{}
				for n := range log {
					if log[n].o.value == nil {
						delete(content, log[n].o.key)
					} else {
						content[log[n].o.key] = known{value: log[n].o.value, rev: log[n].rev}
					}
				}
				m.replace(content, rev)
				told = len(log)
			}
		}
		for ; told < len(log); told++ {
			m.watched([]op{log[told].o}, []int64{log[told].rev}, log[told].rev)
		}
		take()
		n := 0
		for key, want := range truth {
			got, ok := m.get(key)
			if ok != (want != nil) || string(got) != string(want) || seen[key] != ok {
				t.Fatalf("seed %d: %s is %s, want %s (watcher: %v)", seed, key, got, want, seen[key])
			}
			if ok {
				n++
			}
		}
		if m.count != n || len(m.known) != n || len(m.list(PrefixInstances)) != n {
			t.Fatalf("seed %d: count %d, known %d, want %d", seed, m.count, len(m.known), n)
		}
	}
}

func TestWatch(t *testing.T) {
	s, _ := mustOpen(t, t.TempDir())
	put(t, s, instance(1), Stored)
	s.SetNodeStatus(context.Background(), 1, NodeUp)
	w := s.Watch(PrefixInstances, KeyCertbotConfig)
	defer w.Close()
	if events := w.Take(); len(events) != 1 || events[0] != (Event{KindInstance, instance(1).ID, instanceKey(instance(1).ID), false}) {
		t.Fatalf("first events %+v", events)
	}
	if events := w.Take(); len(events) != 0 {
		t.Fatalf("again %+v", events)
	}
	// Many changes of a key are one event; other prefixes are not seen.
	for n := range 20 {
		i := instance(2)
		i.RegTime = uint64(n)
		put(t, s, i, Stored)
	}
	s.SetNodeStatus(context.Background(), 1, NodeDown)
	s.DeleteInstance(context.Background(), instance(1).ID)
	if _, err := s.UpdateCertbotConfig(context.Background(), func(c *CertbotConfig) error { c.ACMEURL = "x"; return nil }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	events, err := w.Next(ctx)
	if err != nil || len(events) != 3 {
		t.Fatalf("%+v %v", events, err)
	}
	if events[0].Kind != KindCertbotConfig || !events[1].Deleted || events[2].ID != instance(2).ID {
		t.Errorf("%+v", events)
	}
	// A refresh that changes nothing is no event.
	time.Sleep(50 * time.Millisecond) // let the watch bring the writes back
	w.Take()
	short, cancel2 := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel2()
	if events, err := w.Next(short); err == nil {
		t.Errorf("own writes came back as events: %+v", events)
	}
	w.Close()
	put(t, s, instance(3), Stored)
	if events := w.Take(); len(events) != 0 {
		t.Errorf("events after Close: %+v", events)
	}
}

func TestBackup(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	opts, buf := testOptions(t, dir)
	opts.BackupInterval = 100 * time.Millisecond
	s := openWith(t, opts)
	path := s.backupPath()
	for n := range 40 {
		put(t, s, instance(n), Stored)
	}
	eventually(t, "a backup", func() bool { keys, _, err := readBackup(path); return err == nil && len(keys) == 40 })
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Error(st.Mode(), err)
	}
	// Settings are backed up at once, however long the interval is.
	if err := s.CreateZTDomain(context.Background(), ZTDomain{Domain: "a.org", Port: 443}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the domain in the backup", func() bool { keys, _, _ := readBackup(path); return keys["cert/a.org/config"] != nil })
	// A store that loses most of its content does not take the backup along.
	for n := range 39 {
		s.DeleteInstance(context.Background(), instance(n).ID)
	}
	keep := filepath.Join(s.dir, "backup.before-loss.json")
	eventually(t, "the larger backup to be kept", func() bool {
		old, _, err := readBackup(keep)
		now, _, _ := readBackup(path)
		return err == nil && len(old) > len(now) && len(now) >= 2
	})
	if !strings.Contains(buf.String(), "lost more than half") {
		t.Error("not said")
	}
	if st := s.Status(); st.BackupAt.IsZero() || st.BackupError != "" {
		t.Errorf("%+v", st)
	}
	data, _ := os.ReadFile(path)
	data[len(data)-5] ^= 1
	if _, _, err := parseBackup(data); err == nil {
		t.Error("an edited backup is accepted")
	}
	// Reformatted it is the same; edited on purpose it is accepted without the checksum.
	data, _ = os.ReadFile(path)
	var pretty bytes.Buffer
	json.Indent(&pretty, data, "", "  ")
	if keys, _, err := parseBackup(pretty.Bytes()); err != nil || len(keys) == 0 {
		t.Error(err)
	}
	var loose map[string]any
	json.Unmarshal(data, &loose)
	delete(loose, "crc32c")
	delete(loose["keys"].(map[string]any), "cert/a.org/config")
	edited, _ := json.Marshal(loose)
	if keys, _, err := parseBackup(edited); err != nil || len(keys) == 0 || keys["cert/a.org/config"] != nil {
		t.Error(err)
	}
	tmp, _ := filepath.Glob(path + ".tmp-*")
	if len(tmp) > 0 {
		t.Errorf("left behind: %v", tmp)
	}
}

func TestStatusAndMetrics(t *testing.T) {
	opts, _ := testOptions(t, t.TempDir())
	reg := prometheus.NewPedanticRegistry()
	opts.Registerer = reg
	s := openWith(t, opts)
	put(t, s, instance(1), Stored)
	eventually(t, "etcd's own account", func() bool { st := s.Status(); return st.HasLeader && st.IsLeader && st.DBBytes > 0 && st.Revision > 1 })
	st := s.Status()
	if st.Mode != Embedded || !st.Connected || !st.Writable || st.Reason != "" || st.Keys != 1 || st.Pending != 0 || st.Since.IsZero() || st.Term == 0 {
		t.Errorf("%+v", st)
	}
	s.stateMu.Lock()
	s.state.server.dbSize, s.state.server.dbInUse = 100<<20, 1
	s.stateMu.Unlock()
	s.defragment()
	put(t, s, instance(1), Stored)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		got[f.GetName()] = f.GetMetric()[0].GetGauge().GetValue()
	}
	for name, want := range map[string]float64{"writable": 1, "has_leader": 1, "keys": 1, "pending_writes": 0, "volatile_writes": 0, "undecodable_keys": 0} {
		if v, ok := got["dstack_gateway_store_"+name]; !ok || v != want {
			t.Errorf("%s = %v (%v), want %v", name, v, ok, want)
		}
	}
	s.Close()
	if families, _ := reg.Gather(); len(families) != 0 {
		t.Error("metrics stay after Close")
	}
}

// TestQuota: a database that has reached its quota recovers by itself, because the content is small and only the
// history is large.
func TestQuota(t *testing.T) {
	t.Parallel()
	opts, buf := testOptions(t, t.TempDir())
	opts.QuotaBytes = 4 << 20
	s := openWith(t, opts)
	i := instance(1)
	for n := range 40 {
		i.PolicyHash = strings.Repeat(string(rune('a'+n%26)), 400_000)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if _, err := s.PutInstance(ctx, i); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	eventually(t, "room", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	has(t, s, i)
	if !strings.Contains(buf.String(), "had reached its quota") {
		t.Errorf("the quota was not met:\n%.3000s", buf)
	}
}

// TestLargeRecords: the largest policy a guest can report is stored, many of them at once too; what etcd cannot hold is
// refused and blocks nothing.
func TestLargeRecords(t *testing.T) {
	t.Parallel()
	s, _ := mustOpen(t, t.TempDir())
	all := &registry.PortPolicy{Ports: map[uint16]registry.PortFlags{}, Restrict: true}
	for port := range 1 << 16 {
		all.Ports[uint16(port)] = registry.PortFlags{PP: true}
	}
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			i := instance(n)
			i.Policy = all
			put(t, s, i, Stored)
		})
	}
	wg.Wait()
	for n := range 8 {
		if i, ok := s.Instance(instance(n).ID); !ok || !i.Policy.Equal(all) {
			t.Errorf("instance %d: %v", n, ok)
		}
	}
	i := instance(9)
	i.Policy, i.AdminPolicy = all, all
	if d, err := s.PutInstance(context.Background(), i); !errors.Is(err, ErrTooLarge) || d != 0 {
		t.Errorf("%v, %v", d, err)
	}
	put(t, s, instance(10), Stored)
	if err := s.PutACMEAttestation(context.Background(), ACMEAttestation{Quote: strings.Repeat("x", 2<<20)}); err == nil || errors.Is(err, ErrNotWritable) {
		t.Error(err)
	}

	// A record that a server with a lower limit refuses must not block the others behind it.
	big := op{key: "inst/big", value: []byte(`{"v":1,"data":"` + strings.Repeat("x", 3<<20) + `"}`), at: 1}
	value, _ := s.codec.encode(instanceKey(instance(11).ID), 1, toInstanceRecord(instance(11)))
	s.mirror.wait([]op{big, {key: instanceKey(instance(11).ID), value: value, at: 1}})
	s.setDown(errors.New("invented"))
	s.wake()
	eventually(t, "the rest to be written", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	has(t, s, instance(11))
	if _, ok := s.mirror.get("inst/big"); ok {
		t.Error("the record that was given up is still shown")
	}
}

// TestOutageLatency: an etcd that hangs does not hold registrations up beyond the first.
func TestOutageLatency(t *testing.T) {
	t.Parallel()
	opts, _ := testOptions(t, t.TempDir())
	opts.WriteTimeout = time.Second
	s := openWith(t, opts)
	b := s.currentBackend()
	b2 := *b
	release := make(chan struct{})
	b2.kv = hungKV{b.kv, release}
	s.setBackend(&b2)
	put(t, s, instance(0), Journaled)
	for n := range 60 {
		start := time.Now()
		put(t, s, instance(n), Journaled)
		if d := time.Since(start); d > opts.WriteTimeout/2 {
			t.Fatalf("registration %d took %s", n, d)
		}
		time.Sleep(50 * time.Millisecond)
	}
	close(release)
	eventually(t, "etcd to be writable", func() bool { st := s.Status(); return st.Writable && st.Pending == 0 })
	put(t, s, instance(1), Stored)
	s.setBackend(b)
}

// TestQueueFull: a caller with a deadline is not kept beyond it.
func TestQueueFull(t *testing.T) {
	opts, _ := testOptions(t, t.TempDir())
	opts.QueueSize = 1
	s := openWith(t, opts)
	b := s.currentBackend()
	// Another fsync takes the journal's and etcd's place: block the writer inside a transaction.
	release := make(chan struct{})
	b2 := *b
	b2.kv = slowKV{b.kv, release}
	s.setBackend(&b2)
	var wg sync.WaitGroup
	for n := range 3 {
		wg.Go(func() {
			if _, err := s.PutInstance(context.Background(), instance(n)); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "a full queue", func() bool { return len(s.queue) == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	var err error
	eventually(t, "a refusal", func() bool {
		_, err = s.PutInstance(ctx, instance(9))
		return err != nil
	})
	if !strings.Contains(err.Error(), ErrBusy.Error()) && !strings.Contains(err.Error(), "deadline") {
		t.Error(err)
	}
	close(release)
	wg.Wait()
	s.setBackend(b)
}

// BenchmarkPut: acknowledged registrations from 64 guests at once.
func BenchmarkPut(b *testing.B) {
	opts, _ := testOptions(b, b.TempDir())
	s := openWith(b, opts)
	var mu sync.Mutex
	next := 0
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			mu.Lock()
			next++
			i := instance(next % 10_000)
			i.RegTime += uint64(next)
			mu.Unlock()
			if d, err := s.PutInstance(context.Background(), i); d != Stored || err != nil {
				b.Error(d, err)
			}
		}
	})
}

// slowKV holds transactions back until it is released.
type slowKV struct {
	clientv3.KV
	release chan struct{}
}

func (k slowKV) Txn(ctx context.Context) clientv3.Txn {
	<-k.release
	return k.KV.Txn(ctx)
}

// hungKV does not answer until it is released.
type hungKV struct {
	clientv3.KV
	release chan struct{}
}

func (k hungKV) hang(ctx context.Context) {
	select {
	case <-k.release:
	case <-ctx.Done():
	}
}

func (k hungKV) Txn(ctx context.Context) clientv3.Txn {
	k.hang(ctx)
	return k.KV.Txn(ctx)
}

func (k hungKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	k.hang(ctx)
	return k.KV.Get(ctx, key, opts...)
}
