// Package registry decides who is a registered CVM and which overlay address it has.
//
// It is a state machine in memory: no I/O, no goroutines, time injected. One internal mutex guards it and is held for
// memory work only; no caller's function ever runs under it. The same set of records gives the same state on every
// node, in whatever order they arrived: addresses and WireGuard keys are unique, an older registration wins over a
// younger one, then the smaller instance id.
//
// Non-goals: durability (package store), applying peers (package wireguard), picking an instance for a connection.
package registry
