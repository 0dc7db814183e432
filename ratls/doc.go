// Package ratls is about certificates that say which app a TLS key belongs to:
// the extensions under 1.3.6.1.4.1.62397.1, the app info inside them, who a
// peer with such a certificate is, and a development CA that issues them.
//
// Guarantees: evidence in a certificate is never skipped, so a certificate
// whose evidence cannot be verified identifies nobody; parsers are bounded and
// strict about duplicates; issued certificates have the names, serials and order
// of extensions of released KMSs (but the shortest DER for the key usage).
//
// Non-goals: verifying quotes (see Verifier), certificate requests, and chains:
// extensions mean something only after TLS has verified the chain to the
// platform's root.
package ratls
