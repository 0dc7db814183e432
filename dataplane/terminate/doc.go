// Package terminate ends TLS for an app and relays plaintext to it, inside the
// event loop of the connection.
//
// The handshake of crypto/tls is a blocking call. It runs in a coroutine
// (iter.Pull) that a worker keeps warm: when the handshake needs bytes that have
// not arrived, it yields to the loop, and the next edge resumes it. Nothing is
// scheduled, locked or parked. After the handshake the loop itself calls Read and
// Write of the tls.Conn; Read resumes after ErrWouldBlock because crypto/tls keeps
// partial records, and Write never blocks because one step writes at most one
// buffer and takes no more from the app before that has left.
//
// Guarantees: close_notify before FIN when the app closes; a client's FIN without
// close_notify counts as its end of stream; at most one buffer a direction is held.
// Non-goals: certificate choice and renewal (controlplane/certs), kTLS.
package terminate
