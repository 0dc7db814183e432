// Package dataplane serves the proxy port: it accepts connections, reads the name a
// client asks for, picks an instance and moves bytes.
//
// A Server runs one event loop a worker; each connection lives on one loop from
// accept to close. Routing reads an immutable snapshot through one atomic pointer.
// No connection takes a lock that another connection or the control plane could
// hold, none reads the store, none forks.
//
// The package reports what happened through Hooks and counters; it never imports
// the control plane. Passthrough bytes are moved by package relay, terminated ones
// by package terminate.
package dataplane
