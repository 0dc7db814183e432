// Package wireguard owns the gateway's end of the overlay: it creates or
// adopts the interface, keeps its peer set equal to the registered instances
// and reports who is alive.
//
// Guarantees: a registration costs O(1) work on the device, never a rewrite of
// all peers; two peers never hold the same address; peers that were removed,
// re-keyed or added by a stranger are corrected; readers of the handshake table
// never wait; whatever the kernel cannot do is done in user space or reported
// in Status with the reason.
//
// Non-goals: deciding who may register and with which address (registry),
// addresses and routes of an adopted interface, tunnels between gateways.
package wireguard
