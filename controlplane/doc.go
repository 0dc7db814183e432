// Package controlplane assembles the gateway: it opens the store, the registry, the
// WireGuard device, the certificates and the data plane in the right order, keeps
// them consistent, and serves the RPC, admin, debug and control endpoints.
//
// The sub-packages do the work and know nothing of each other's owners; this one
// only wires, mirrors (registry to routing and WireGuard) and watches. A failure of
// the store, of DNS or of a certificate never stops traffic that can flow.
package controlplane
