// Package soak runs a short form of `bench soak` against the gateway built from this tree: hundreds of connections of
// every temper for some seconds in network namespaces, no byte wrong, nothing left behind.
//
// It needs root (network namespaces) and the ip program, and skips itself otherwise. The long form and its report are
// the bench's.
package soak
