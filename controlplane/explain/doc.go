// Package explain says what the gateway would do with a connection to a host name,
// step by step in the order in which the data plane decides, and which rule refuses
// it. "dstack-gw explain app.example.com" is its command line.
//
// Guarantees: it decides by the snapshot, selection and resolver that connections
// use, and names a refusal as rejected_total{reason} and the access log do; a report
// is bounded in time and in connections to apps; apps see at most one short
// connection an instance, and none on a port that their policy closes.
//
// Non-goals: changing anything, and following a connection that exists (flows).
package explain
