// Package routing is the data plane's view of the world: an immutable snapshot of
// instances, apps and base domains that connections read through one atomic
// pointer load.
//
// A snapshot never changes after it was published. What changes all the time
// (open connections, handshake ages, recent dial failures) lives in State
// objects that survive from one snapshot to the next and are plain atomics, so
// neither side ever waits for the other.
//
// Non-goals: deciding who may register (controlplane/registry) and I/O.
package routing
