package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

// Durability says where an acknowledged write is.
type Durability int

const (
	// Stored: etcd has it, on the disks of a majority of its members.
	Stored Durability = iota + 1
	// Journaled: it is in the local journal, on disk, and goes to etcd when etcd can be written.
	Journaled
	// Volatile: neither took it. It is kept in memory and tried again; it is lost if the process ends before.
	Volatile
)

func (d Durability) String() string {
	switch d {
	case Stored:
		return "stored"
	case Journaled:
		return "journaled"
	case Volatile:
		return "volatile"
	}
	return "unknown"
}

const (
	// maxBatch is how many writes share one transaction; etcd's own default limit is 128.
	maxBatch = 100
	// maxBatchBytes and maxValueBytes keep a transaction below etcd's default limit of 1.5 MiB.
	maxBatchBytes = 1 << 20
	maxValueBytes = 1400 << 10
)

// ErrTooLarge: a record does not fit into etcd. It is not stored anywhere.
var ErrTooLarge = errors.New("record is too large")

// chunks cuts ops into what fits into one transaction.
func chunks(ops []op) iter.Seq[[]op] {
	return func(yield func([]op) bool) {
		for len(ops) > 0 {
			n, size := 1, len(ops[0].key)+len(ops[0].value)
			for n < min(len(ops), maxBatch) {
				if size += len(ops[n].key) + len(ops[n].value); size > maxBatchBytes {
					break
				}
				n++
			}
			if !yield(ops[:n]) {
				return
			}
			ops = ops[n:]
		}
	}
}

// request is one write on its way to the writer.
type request struct {
	key    string
	record any // nil deletes
	done   chan outcome
}

type outcome struct {
	d   Durability
	err error
}

// PutInstance stores a registration. It returns when the record is as durable as it will get now: Stored, Journaled
// (etcd cannot be written; no error), or Volatile with the reason. After another error - ErrBusy, ErrClosed, or ctx's own
// while the write was under way - it is not known whether the record is stored.
func (s *Store) PutInstance(ctx context.Context, i registry.Instance) (Durability, error) {
	if i.ID == "" {
		return 0, errors.New("store: an instance without id cannot be stored")
	}
	return s.submit(ctx, instanceKey(i.ID), toInstanceRecord(i))
}

// DeleteInstance removes a registration, with the guarantees of PutInstance.
func (s *Store) DeleteInstance(ctx context.Context, id string) (Durability, error) {
	return s.submit(ctx, instanceKey(id), nil)
}

// PutNode publishes a node, with the guarantees of PutInstance.
func (s *Store) PutNode(ctx context.Context, n Node) (Durability, error) {
	return s.submit(ctx, nodeInfoKey(n.ID), n)
}

// SetNodeStatus marks a node up or down, with the guarantees of PutInstance.
func (s *Store) SetNodeStatus(ctx context.Context, id uint32, status NodeStatus) (Durability, error) {
	if status != NodeUp && status != NodeDown {
		return 0, fmt.Errorf("store: node status %q is neither %q nor %q", status, NodeUp, NodeDown)
	}
	return s.submit(ctx, nodeStatusKey(id), nodeStatusRecord{status})
}

// SetPeerAddr publishes the RPC URL of a node, with the guarantees of PutInstance.
func (s *Store) SetPeerAddr(ctx context.Context, id uint32, url string) (Durability, error) {
	return s.submit(ctx, peerAddrKey(id), peerAddrRecord{url})
}

func (s *Store) submit(ctx context.Context, key string, record any) (Durability, error) {
	r := &request{key: key, record: record, done: make(chan outcome, 1)}
	select {
	case <-s.closing:
		return 0, ErrClosed
	default:
	}
	select {
	case s.queue <- r:
	case <-ctx.Done():
		return 0, fmt.Errorf("store: writing %s: %w (%d): %w", key, ErrBusy, cap(s.queue), ctx.Err())
	case <-s.closing:
		return 0, ErrClosed
	}
	select {
	case o := <-r.done:
		return o.d, o.err
	case <-ctx.Done():
		return 0, fmt.Errorf("store: waiting for the write of %s: %w", key, ctx.Err())
	case <-s.writer:
	}
	select {
	case o := <-r.done:
		return o.d, o.err
	default:
		return 0, ErrClosed
	}
}

// write is the only goroutine that writes registrations, and the only one that touches the journal: the order of writes
// to a key is the order of the queue. What arrives while a transaction is under way shares the next one.
func (s *Store) write() {
	defer close(s.writer)
	const minRetry, maxRetry = time.Second, 15 * time.Second
	retry := time.NewTimer(minRetry)
	defer retry.Stop()
	delay := minRetry
	again := func() {
		if s.recover() {
			delay = minRetry
		} else {
			delay = min(2*delay, maxRetry)
		}
		retry.Reset(delay)
	}
	for {
		select {
		case r := <-s.queue:
			s.commit(s.collect(r))
		case <-s.kick:
			delay = minRetry
			again()
		case <-retry.C:
			again()
		case <-s.closing:
			for {
				select {
				case r := <-s.queue:
					s.commit(s.collect(r))
					continue
				default:
				}
				return
			}
		}
	}
}

// collect takes what is queued behind r, as far as one transaction goes.
func (s *Store) collect(r *request) []*request {
	batch := []*request{r}
	for len(batch) < maxBatch {
		select {
		case r := <-s.queue:
			batch = append(batch, r)
		default:
			return batch
		}
	}
	return batch
}

// commit brings a batch to etcd or to the journal and answers the callers.
func (s *Store) commit(batch []*request) {
	// Of several writes to one key only the last one counts; etcd refuses a transaction that has two.
	last := make(map[string]int, len(batch))
	for n, r := range batch {
		last[r.key] = n
	}
	ops := make([]op, 0, len(last))
	result := make(map[string]outcome, len(last))
	for n, r := range batch {
		if last[r.key] != n {
			continue
		}
		o := op{key: r.key, at: s.stamp(r.key)}
		if r.record != nil {
			var err error
			if o.value, err = s.codec.encode(o.key, o.at, r.record); err == nil && len(o.value) > maxValueBytes {
				err = fmt.Errorf("store: %s: %w: %d bytes, at most %d are accepted", o.key, ErrTooLarge, len(o.value), maxValueBytes)
			}
			if err != nil {
				result[r.key] = outcome{0, err}
				continue
			}
		}
		ops = append(ops, o)
	}
	for chunk := range chunks(ops) {
		o := s.place(chunk)
		for _, c := range chunk {
			result[c.key] = o
		}
	}
	for _, r := range batch {
		r.done <- result[r.key]
	}
}

// stamp returns the time for a write of key: now, but later than any earlier write.
func (s *Store) stamp(key string) int64 {
	at := max(s.opts.Now().UnixMilli(), s.lastAt+1)
	if value, ok := s.mirror.get(key); ok {
		at = max(at, writtenAt(value)+1)
	}
	s.lastAt = at
	return at
}

func (s *Store) place(ops []op) outcome {
	b, err := s.writableBackend()
	if err == nil {
		var rev int64
		if rev, err = s.putAll(b, ops); err == nil {
			s.mirror.committed(ops, rev)
			return outcome{Stored, nil}
		}
		s.setDown(err)
		s.log.Error("etcd does not take writes: registrations go to the journal, admin changes and issuance are refused until it does", "err", err)
	}
	// etcd may have taken the writes after all (a timeout); replaying them later does no harm.
	if jerr := s.toJournal(ops); jerr != nil {
		s.mirror.wait(ops)
		return outcome{Volatile, fmt.Errorf("store: the record is only in memory: %w; %w", err, jerr)}
	}
	return outcome{Journaled, nil}
}

// putAll writes ops in one transaction.
func (s *Store) putAll(b *backend, ops []op) (int64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.opts.WriteTimeout)
	defer cancel()
	puts := etcdOps(ops) // not in the call, which may be given up and go on: ops are ours
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return b.kv.Txn(ctx).Then(puts...).Commit()
	})
	if err != nil {
		return 0, fmt.Errorf("writing %d records to etcd: %w", len(ops), err)
	}
	return resp.Header.Revision, nil
}

func etcdOps(ops []op) []clientv3.Op {
	out := make([]clientv3.Op, len(ops))
	for n, o := range ops {
		if o.value == nil {
			out[n] = clientv3.OpDelete(o.key)
		} else {
			out[n] = clientv3.OpPut(o.key, string(o.value))
		}
	}
	return out
}

// toJournal makes ops durable locally and covers the mirror with them.
func (s *Store) toJournal(ops []op) error {
	var waiting []op
	whole, err := s.journal.append(ops, func() []op {
		replaced := make(map[string]bool, len(ops))
		for _, o := range ops {
			replaced[o.key] = true
		}
		for _, o := range s.mirror.waiting() {
			if !replaced[o.key] {
				waiting = append(waiting, o)
			}
		}
		return slices.Clone(waiting)
	})
	if err != nil {
		s.noteError(err)
		return err
	}
	if whole {
		ops = append(waiting, ops...)
	}
	for n := range ops {
		ops[n].journaled = true
	}
	s.mirror.wait(ops)
	s.noteJournal()
	return nil
}

func (s *Store) noteJournal() {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	s.state.journal = s.journal.tail
}

func (s *Store) noteError(err error) {
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	s.state.lastErr, s.state.lastAt = err, s.opts.Now()
}

// recover makes waiting writes durable and, once a probe has found etcd able to work, replays them. It reports whether
// all is well. The writer does not wait for an etcd that does not answer: registrations come in all the time.
func (s *Store) recover() bool {
	s.stateMu.Lock()
	b, writable, full, probed := s.state.backend, s.state.writable, s.state.diskFull, s.state.probed
	s.state.probed = false
	s.stateMu.Unlock()
	if writable && full == "" {
		return true
	}
	if b != nil && full == "" {
		if !probed {
			s.probe(b)
		} else if err := s.replay(b); err != nil {
			s.setDown(err)
		} else {
			if since, first := s.setWritable(); first {
				s.log.Info("etcd is open", "mode", s.opts.Mode, "took", s.opts.Now().Sub(since).Round(time.Millisecond))
			} else if !since.IsZero() {
				s.log.Info("etcd takes writes again", "not_writable_for", s.opts.Now().Sub(since).Round(time.Millisecond))
			}
			return true
		}
	}
	var loose []op
	for _, o := range s.mirror.waiting() {
		if !o.journaled {
			loose = append(loose, o)
		}
	}
	if len(loose) > 0 && s.toJournal(loose) == nil {
		s.log.Info("registrations that were only in memory are in the journal now", "records", len(loose))
	}
	return false
}

// probe finds out in the background whether etcd can work, and wakes the writer if so. There is one at a time.
func (s *Store) probe(b *backend) {
	s.stateMu.Lock()
	busy, lastErr := s.state.probing, s.state.lastErr
	s.state.probing = true
	s.stateMu.Unlock()
	if busy {
		return
	}
	s.tasks.Go(func() {
		err := func() error {
			if b.embedded && errors.Is(lastErr, rpctypes.ErrNoSpace) {
				if err := s.makeRoom(b); err != nil {
					return err
				}
			}
			ctx, cancel := context.WithTimeout(s.ctx, s.opts.WriteTimeout)
			defer cancel()
			// A linearizable read needs the quorum.
			if _, err := call(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) { return b.kv.Get(ctx, "quorum") }); err != nil {
				return fmt.Errorf("reading from etcd: %w", err)
			}
			return nil
		}()
		s.stateMu.Lock()
		s.state.probing, s.state.probed = false, err == nil && s.state.backend == b
		s.stateMu.Unlock()
		if err == nil {
			s.wake()
		} else if s.currentBackend() == b && s.ctx.Err() == nil {
			s.setDown(err)
		}
	})
}

// makeRoom is the answer to a database that has reached its quota.
func (s *Store) makeRoom(b *backend) error {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) { return b.kv.Get(ctx, "quorum") })
	if err != nil {
		return fmt.Errorf("reading from etcd: %w", err)
	}
	if err := repairQuota(ctx, b, resp.Header.Revision); err != nil {
		return fmt.Errorf("making room in the database: %w", err)
	}
	s.log.Warn("the etcd database had reached its quota and was compacted. If this repeats, raise the quota", "quota_bytes", s.opts.QuotaBytes)
	return nil
}

// replay brings the waiting writes to etcd. A key that etcd holds with a later time stamp keeps its value: another node
// wrote it while this one could not.
func (s *Store) replay(b *backend) error {
	written, dropped := 0, 0
	for chunk := range chunks(s.mirror.waiting()) {
		w, d, err := s.replaySome(b, chunk)
		if err != nil {
			return fmt.Errorf("replaying the journal: %w", err)
		}
		written, dropped = written+w, dropped+d
	}
	if err := s.journal.reset(); err != nil {
		// The records are replayed once more after a restart, which does no harm.
		s.noteError(err)
		s.log.Warn("the journal cannot be emptied", "err", err)
	}
	s.noteJournal()
	if written+dropped > 0 {
		s.log.Info("writes that had waited are in etcd", "written", written, "superseded_by_other_nodes", dropped)
	}
	return nil
}

// replaySome replays a chunk until no other node interferes. A record that etcd refuses for its size would block all
// others for ever: it is given up.
func (s *Store) replaySome(b *backend, chunk []op) (written, dropped int, err error) {
	for range 5 {
		w, d, clash, err := s.replayChunk(b, chunk)
		switch {
		case errors.Is(err, rpctypes.ErrRequestTooLarge) && len(chunk) > 1:
			for n := range chunk {
				w, d, err := s.replaySome(b, chunk[n:n+1])
				if err != nil {
					return 0, 0, err
				}
				written, dropped = written+w, dropped+d
			}
			return written, dropped, nil
		case errors.Is(err, rpctypes.ErrRequestTooLarge):
			s.log.Error("etcd refuses a record for its size and it is given up; raise the server's --max-request-bytes", "key", chunk[0].key, "bytes", len(chunk[0].value))
			s.mirror.abandon(chunk[0].key)
			return 0, 1, nil
		case err != nil:
			return 0, 0, err
		case !clash:
			return w, d, nil
		}
	}
	return 0, 0, errors.New("other nodes keep changing the same records")
}

func (s *Store) replayChunk(b *backend, chunk []op) (written, dropped int, clash bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.opts.WriteTimeout)
	defer cancel()
	gets := make([]clientv3.Op, len(chunk))
	for n, o := range chunk {
		gets[n] = clientv3.OpGet(o.key)
	}
	now, err := call(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) { return b.kv.Txn(ctx).Then(gets...).Commit() })
	if err != nil {
		return 0, 0, false, err
	}
	var (
		puts, late []op
		values     [][]byte
		revs       []int64
		unchanged  []clientv3.Cmp
	)
	for n, o := range chunk {
		var value []byte
		var rev int64
		if kvs := now.Responses[n].GetResponseRange().GetKvs(); len(kvs) > 0 {
			value, rev = kvs[0].GetValue(), kvs[0].GetModRevision()
		}
		if value != nil && writtenAt(value) >= o.at || value == nil && o.value == nil {
			late, values, revs = append(late, o), append(values, value), append(revs, rev)
			continue
		}
		puts = append(puts, o)
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(o.key), "=", rev))
	}
	if len(puts) > 0 {
		then := etcdOps(puts)
		resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
			return b.kv.Txn(ctx).If(unchanged...).Then(then...).Commit()
		})
		if err != nil {
			return 0, 0, false, err
		}
		if !resp.Succeeded {
			return 0, 0, true, nil
		}
		s.mirror.committed(puts, resp.Header.Revision)
	}
	s.mirror.superseded(late, values, revs)
	return len(puts), len(late), false, nil
}
