// Package store keeps what a gateway must not forget: registrations, nodes, DNS credentials, ACME account, certificates
// and their locks. It is etcd, embedded as a single node by default or an external cluster.
//
// Two kinds of writes. Registrations and node records always succeed in some way: in etcd, else in an fsynced local
// journal that is replayed later, and the caller is told which. Everything else is a transaction that is refused with
// the reason while etcd cannot be written. Reads come from memory and never wait for etcd. A full disk, a damaged
// database or a lost quorum never stops the process: Open starts from what the journal and the JSON backup hold.
//
// Non-goals: routing decisions (package registry), counters that may be lost (asked of the nodes), the peer protocol of
// upstream's cluster.
package store
