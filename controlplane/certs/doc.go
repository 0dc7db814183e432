// Package certs holds the certificates the gateway shows: those of the proxied
// base domains (issued, or static from files) and its own on the RPC listener,
// and the ticket keys that let clients resume sessions.
//
// Guarantees: looking a certificate up takes no lock and allocates nothing; a
// swap is atomic and disturbs no connection; a certificate that is expired,
// broken or does not fit its key is never installed, and never costs another
// domain its own; key files are written with mode 0600 and keys are not logged.
//
// Non-goals: obtaining certificates (ACME), replicating records (store),
// choosing TLS versions and suites of the proxy (dataplane).
package certs
