// Package gateway tests the dstack-gw binary from outside, on a machine of its own (fresh network, mount and PID
// namespaces): bytes on real sockets against the wire the specification names, and what still works while backends,
// resolvers, disks, certificates, webhooks, descriptors and the process itself fail.
//
// Guarantees: nothing but the binary is under test, it gets no help that an operator or a guest would not give it;
// nothing is left on the machine. Bounds on time are an operator's ("not noticed", "within 5 s"), not a benchmark's.
//
// Non-goals: parsers and tables (tested where they live), load (bench), the platform as a person meets it (dev).
package gateway
