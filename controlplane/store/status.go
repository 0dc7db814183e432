package store

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Status is the state of a store, at most a few seconds old. Asking costs nothing.
type Status struct {
	Mode Mode
	// Connected: etcd is open. Writable: it takes writes; if not, Reason says why. Since is the time of the last change.
	Connected, Writable bool
	Reason              string
	Since               time.Time
	// LastError is the most recent trouble, also if it is over.
	LastError   string
	LastErrorAt time.Time
	// Keys is the number of keys in memory, Undecodable how many of them this release cannot read.
	Keys, Undecodable int
	// Pending are the writes that wait for etcd, Volatile those of them that are not in the journal either.
	Pending, Volatile int
	// JournalBytes is the used part of the journal. Queued are registrations not yet handed to either.
	JournalBytes int64
	Queued       int
	// The rest is etcd's own account.
	HasLeader, IsLeader  bool
	MemberID, LeaderID   uint64
	Term, Index          uint64
	Revision             int64
	DBBytes, DBUsedBytes int64
	Alarms               []string
	// BackupAt is the time of the last backup, BackupError why the last attempt failed.
	BackupAt    time.Time
	BackupError string
	// MovedAside are the damaged databases that are kept.
	MovedAside []string
}

type serverStatus struct {
	member, leader, term, index uint64
	revision                    int64
	dbSize, dbInUse             int64
	alarms                      []string
}

// askServer refreshes etcd's account of itself.
func (s *Store) askServer(ctx context.Context, b *backend) {
	st, err := call(ctx, b, func(ctx context.Context) (*clientv3.StatusResponse, error) { return b.maint.Status(ctx, b.endpoint) })
	if err != nil {
		return // checkHealth has noted why
	}
	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	s.state.server = serverStatus{
		member: st.Header.GetMemberId(), leader: st.Leader, term: st.RaftTerm, index: st.RaftIndex,
		revision: st.Header.GetRevision(), dbSize: st.DbSize, dbInUse: st.DbSizeInUse, alarms: st.Errors,
	}
}

// Status returns the state of the store.
func (s *Store) Status() Status {
	out := Status{Mode: s.opts.Mode, Queued: len(s.queue), Undecodable: s.undecodable()}
	s.mirror.mu.Lock()
	out.Keys, out.Pending, out.Revision = s.mirror.count, len(s.mirror.overlay), s.mirror.seen
	for _, o := range s.mirror.overlay {
		if !o.journaled {
			out.Volatile++
		}
	}
	s.mirror.mu.Unlock()
	out.MovedAside = listAside(s.etcdDir())

	s.stateMu.Lock()
	defer s.stateMu.Unlock()
	st := &s.state
	out.Connected, out.Writable, out.Reason, out.Since = st.backend != nil, st.writable && st.diskFull == "", st.reason, st.since
	if st.diskFull != "" {
		out.Reason = st.diskFull
	}
	if st.lastErr != nil {
		out.LastError, out.LastErrorAt = st.lastErr.Error(), st.lastAt
	}
	out.JournalBytes = st.journal
	out.BackupAt = st.backedUp
	if st.backupErr != nil {
		out.BackupError = st.backupErr.Error()
	}
	out.MemberID, out.LeaderID, out.Term, out.Index = st.server.member, st.server.leader, st.server.term, st.server.index
	out.DBBytes, out.DBUsedBytes, out.Alarms = st.server.dbSize, st.server.dbInUse, st.server.alarms
	out.HasLeader = out.Connected && out.LeaderID != 0
	out.IsLeader = out.HasLeader && out.LeaderID == out.MemberID
	return out
}

// collector exports Status.
type collector struct{ s *Store }

func (collector) desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("dstack_gateway_store_"+name, help, nil, nil)
}

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c collector) Collect(ch chan<- prometheus.Metric) {
	st := c.s.Status()
	gauge := func(name, help string, v float64) {
		ch <- prometheus.MustNewConstMetric(c.desc(name, help), prometheus.GaugeValue, v)
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge("writable", "1 if etcd takes writes; 0: registrations go to the journal, admin changes are refused.", truth(st.Writable))
	gauge("has_leader", "1 if etcd has a leader.", truth(st.HasLeader))
	gauge("is_leader", "1 if the etcd member this node talks to is the leader.", truth(st.IsLeader))
	gauge("keys", "Keys in the store.", float64(st.Keys))
	gauge("undecodable_keys", "Keys whose value this release cannot read.", float64(st.Undecodable))
	gauge("pending_writes", "Writes that wait for etcd.", float64(st.Pending))
	gauge("volatile_writes", "Writes that wait for etcd and could not be journaled: lost if the process ends.", float64(st.Volatile))
	gauge("queued_writes", "Registrations on their way to etcd.", float64(st.Queued))
	gauge("journal_bytes", "Used part of the journal.", float64(st.JournalBytes))
	gauge("db_bytes", "Size of the etcd database.", float64(st.DBBytes))
	gauge("db_used_bytes", "Used part of the etcd database.", float64(st.DBUsedBytes))
	gauge("revision", "Revision of etcd up to which this node has followed.", float64(st.Revision))
	gauge("damaged_databases", "Damaged databases that were moved aside and are kept.", float64(len(st.MovedAside)))
	gauge("backup_failed", "1 if the last backup failed.", truth(st.BackupError != ""))
	var last float64
	if !st.BackupAt.IsZero() {
		last = float64(st.BackupAt.Unix())
	}
	gauge("backup_timestamp_seconds", "Time of the last backup, 0 if there was none since the start.", last)
}
