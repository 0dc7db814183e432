// Package relay moves the bytes of a passthrough connection between two sockets.
//
// It is byte-exact and order-preserving; both directions are independent and a
// half-close is passed on. Small exchanges are copied through one buffer a
// worker (an idle connection holds none); a direction that proves to be bulk
// moves to splice(2), so its bytes never enter user space. At most one buffer or
// one pipe a direction is ever held for a slow reader, then TCP back pressure
// stops the sender. A pipe is given back as soon as it is empty.
//
// Non-goals: TLS (package terminate) and timeouts (the connection's owner).
package relay
