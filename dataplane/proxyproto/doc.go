// Package proxyproto reads and writes the header of the PROXY protocol,
// versions 1 and 2, by which a load balancer tells the addresses of the client.
// (Format: "The PROXY protocol", haproxy.org, revision 2020/03/05.)
//
// Guarantees: Parse works on any prefix of a stream, refuses as soon as the
// bytes so far rule a header out and looks at no more than [MaxSize] bytes; what
// Parse accepts, Append writes back with the same meaning, without the
// type-length-value vectors of version 2.
//
// Non-goals: it does not decide from whom a header may be believed.
package proxyproto
