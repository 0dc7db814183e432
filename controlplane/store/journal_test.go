package store

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func testOps(from, to int) (ops []op) {
	for n := from; n < to; n++ {
		o := op{key: fmt.Sprintf("inst/%d", n), value: []byte(fmt.Sprintf(`{"v":1,"at":%d,"data":{"n":%d}}`, n, n)), at: int64(n)}
		if n%5 == 4 {
			o.value = nil
		}
		ops = append(ops, o)
	}
	return ops
}

func sameOps(a, b []op) bool {
	if len(a) != len(b) {
		return false
	}
	for n := range a {
		if a[n].key != b[n].key || a[n].at != b[n].at || !bytes.Equal(a[n].value, b[n].value) || (a[n].value == nil) != (b[n].value == nil) {
			return false
		}
	}
	return true
}

func none() []op { return nil }

func reopen(t *testing.T, j *journal) (*journal, journalContent) {
	t.Helper()
	j.close()
	next, c, err := openJournal(j.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(next.close)
	return next, c
}

func mustAppend(t *testing.T, j *journal, ops []op) {
	t.Helper()
	if _, err := j.append(ops, none); err != nil {
		t.Fatal(err)
	}
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, c, err := openJournal(path)
	if err != nil || len(c.ops) != 0 {
		t.Fatal(c, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 || st.Size() < journalReserve {
		t.Error(st.Mode(), st.Size(), err)
	}
	mustAppend(t, j, testOps(0, 3))
	mustAppend(t, j, testOps(3, 10))
	j, c = reopen(t, j)
	if !sameOps(c.ops, testOps(0, 10)) || c.damaged != 0 {
		t.Fatalf("%v", c)
	}
	mustAppend(t, j, testOps(10, 11))
	// Emptied: nothing of the old content counts, not even what the new frames do not cover.
	if err := j.reset(); err != nil {
		t.Fatal(err)
	}
	j, c = reopen(t, j)
	if len(c.ops) != 0 || c.damaged != 0 {
		t.Fatalf("%v", c)
	}
	mustAppend(t, j, testOps(20, 21))
	j, c = reopen(t, j)
	if !sameOps(c.ops, testOps(20, 21)) || c.damaged != 0 {
		t.Fatalf("%v", c)
	}
	// After a failed fsync a new file is started with everything that waits.
	j.broken = true
	whole, err := j.append(testOps(30, 31), func() []op { return testOps(20, 21) })
	if err != nil || !whole || j.broken {
		t.Fatal(whole, err)
	}
	mustAppend(t, j, testOps(31, 32))
	j, c = reopen(t, j)
	if !sameOps(c.ops, append(testOps(20, 21), testOps(30, 32)...)) {
		t.Fatalf("%v", c)
	}
	if exists(path + ".tmp") {
		t.Error("the temporary file stayed")
	}
	// Emptying an empty journal writes nothing.
	j.reset()
	tail := j.tail
	epoch := j.epoch
	for range 3 {
		j.reset()
	}
	if j.tail != tail || j.epoch < epoch {
		t.Error(j.tail, j.epoch)
	}
}

func TestJournalDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, _, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, j, testOps(0, 10))
	tail := j.tail
	j.close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	frame := int(tail) / 10
	tests := []struct {
		name    string
		edit    func([]byte) []byte
		want    int // records still read
		damaged bool
	}{
		{"torn tail: cut", func(b []byte) []byte { return b[:tail-1] }, 9, false},
		{"torn tail: zeroes", func(b []byte) []byte { clear(b[tail-10 : tail]); return b }, 9, false},
		{"torn tail: only the head", func(b []byte) []byte { return b[:int(tail)-frame+journalHeader] }, 9, false},
		{"bit flip in the middle", func(b []byte) []byte { b[tail/2] ^= 1; return b }, 9, true},
		{"first frame gone", func(b []byte) []byte { clear(b[:frame/2]); return b }, 9, true},
		{"length of the first frame wrong", func(b []byte) []byte { b[17] = 0xff; return b }, 9, true},
		{"empty", func(b []byte) []byte { return nil }, 0, false},
		{"garbage", func(b []byte) []byte { return bytes.Repeat([]byte("junk"), 1000) }, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := parseJournal(tt.edit(bytes.Clone(good)))
			if len(c.ops) != tt.want || (c.damaged > 0) != tt.damaged {
				t.Errorf("%d records, %d bytes damaged; want %d, %v", len(c.ops), c.damaged, tt.want, tt.damaged)
			}
		})
	}
}

// TestJournalDamageIsTold: Open reads around the damage, keeps a copy and says so.
func TestJournalDamageIsTold(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "store/journal")
	j, _, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	codec, _ := newCodec(1, nil)
	var ops []op
	for n := range 3 {
		v, _ := codec.encode("", int64(n+1), toInstanceRecord(instance(n)))
		ops = append(ops, op{key: instanceKey(instance(n).ID), value: v, at: int64(n + 1)})
	}
	// An older record of the same key that follows a younger one must not win.
	old, _ := codec.encode("", 1, toInstanceRecord(instance(7)))
	ops = append(ops, op{key: ops[2].key, value: old, at: 1})
	mustAppend(t, j, ops)
	j.close()
	data, _ := os.ReadFile(path)
	data[100] ^= 0xff
	os.WriteFile(path, data, 0o600)

	s, buf := mustOpen(t, dir)
	if got := s.Instances(); len(got) != 2 {
		t.Errorf("%d instances", len(got))
	}
	has(t, s, instance(2))
	if copies, _ := filepath.Glob(path + ".damaged-*"); len(copies) != 1 || !strings.Contains(buf.String(), "the journal is damaged") {
		t.Errorf("copies %v\n%s", copies, buf)
	}
}

func TestJournalLimit(t *testing.T) {
	j, _, err := openJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	// The same key over and over: the file must not grow without end.
	o := op{key: "inst/x", value: []byte(`{"v":1,"data":"` + strings.Repeat("x", 100_000) + `"}`)}
	rewrites := 0
	for n := range 400 {
		o.at = int64(n)
		whole, err := j.append([]op{o}, none)
		if err != nil {
			t.Fatal(err)
		}
		if whole {
			rewrites++
		}
	}
	if st, _ := j.file.Stat(); st.Size() > 3*journalReserve || rewrites == 0 || rewrites > 10 {
		t.Errorf("%d bytes, %d rewrites", st.Size(), rewrites)
	}
	_, c := reopen(t, j)
	if len(c.ops) == 0 || c.ops[len(c.ops)-1].at != 399 {
		t.Error("the last record is missing")
	}
}

func FuzzJournal(f *testing.F) {
	j := &journal{epoch: 3}
	frames, _ := j.frames(testOps(0, 6))
	f.Add(frames)
	f.Add(append(appendFrame(nil, 4, nil), frames...))
	f.Add(frames[:len(frames)-3])
	f.Fuzz(func(t *testing.T, data []byte) {
		c := parseJournal(data)
		if c.tail > int64(len(data)) || c.damaged < 0 {
			t.Fatalf("%+v", c)
		}
		// What was read can be written and read again.
		next := &journal{epoch: c.epoch + 1}
		for _, o := range c.ops {
			if o.key == "" {
				t.Fatal("a record without key")
			}
		}
		frames, err := next.frames(c.ops)
		if err != nil {
			t.Fatal(err)
		}
		if again := parseJournal(append(frames, data...)); len(again.ops) != len(c.ops) && c.epoch < 1<<64-1 {
			t.Fatalf("%d records, %d after a rewrite", len(c.ops), len(again.ops))
		}
	})
}

func FuzzBackup(f *testing.F) {
	f.Add([]byte(`{"v":1,"written_at":"2026-01-01T00:00:00Z","node":1,"crc32c":1,"keys":{"inst/a":{"v":1}}}`))
	f.Add([]byte(`{"v":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, _, err := parseBackup(data)
		if err == nil {
			for key, value := range keys {
				if value == nil {
					t.Fatalf("key %q without value", key)
				}
			}
		}
	})
}

// FuzzDecode: any value another writer may have left in etcd.
func FuzzDecode(f *testing.F) {
	c, _ := newCodec(1, bytes.Repeat([]byte{1}, 32))
	v, _ := c.encode(instanceKey("a"), 1, toInstanceRecord(instance(1)))
	f.Add(v)
	s, _ := c.encode(dnsCredentialKey("a"), 1, dnsCredentialRecord{})
	f.Add(s)
	f.Add([]byte(`{"v":1,"data":null}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		writtenAt(value)
		var i instanceRecord
		if c.decode(instanceKey("a"), value, &i) == nil {
			i.instance("a").Effective()
		}
		var d dnsCredentialRecord
		if c.decode(dnsCredentialKey("a"), value, &d) == nil {
			_ = d.credential("a").MaxWait
		}
		var z ZTDomain
		_ = c.decode(certKey("a", "config"), value, &z)
		var h LockHolder
		_ = c.decode(certKey("a", "lock"), value, &h)
	})
}
