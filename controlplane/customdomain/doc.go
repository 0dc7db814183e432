// Package customdomain finds out which app a host name outside the platform's
// base domains belongs to, by the TXT records its owner publishes (gateway spec
// 4.5).
//
// Guarantees: an answer in memory is given without I/O or a contended lock;
// identical lookups share one query; lookups in progress and memory are bounded;
// a name that was known outlives an outage of the resolvers, for a while.
//
// Non-goals: TXT data is not authenticated and not interpreted. Whether an id
// exists, is reserved, or may be reached on a port is for the caller to decide.
package customdomain
