// Package hostname reads meaning out of host names: the grammar by which a
// label under a base domain names an app, a port and a mode, the words that are
// reserved for the gateway itself, and the normal form of a base domain.
//
// Guarantees: pure functions, no allocation when they succeed on normalised
// input, error texts that operators of existing gateways know.
//
// Non-goals: it does not know which apps or base domains exist.
package hostname
