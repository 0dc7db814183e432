// Package load is the client side of the bench: it drives one case against one address and measures it.
//
// A Spec describes the case, Run returns a Result whose windows hold counts, latency percentiles and the CPU time of
// everybody for exactly that window. Guarantees: every reply and every bulk byte is verified (see package wire), and
// any damage, lost byte or failed connection is an error, never a slower result. Loops are closed: each connection
// has one request in flight.
// Non-goals: open-loop arrival processes, more than one machine, more than about 19,000 connections in one process.
package load
