// Package dev brings up a whole platform on one machine for trying and testing:
// the gateway, CVMs in network namespaces with real WireGuard tunnels, a DNS
// zone for custom domains, and certificates that curl can check.
//
// Guarantees: Up may be repeated and repairs what is missing; every line that Up
// prints was run by Up; Down removes everything that Up made; interfaces,
// namespaces and processes of others are never touched, and firewall rules not
// at all.
//
// Non-goals: security against users of this machine, evidence, production.
package dev
