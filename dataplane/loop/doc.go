// Package loop is the event loop of the user-space data plane: one edge-triggered
// epoll instance, one timer wheel and one mailbox per worker.
//
// Everything a connection does happens on the loop that owns it, so connection
// state needs no locks. Other goroutines reach a loop only through Post.
// Handlers must not block; slow work (DNS, HTTP) belongs to a goroutine that
// posts its result back. Sockets report readiness through Sock, which remembers
// the edges it has seen so that no system call is made only to learn EAGAIN.
//
// Non-goals: portability (Linux only) and general networking; control-plane
// servers use package net.
package loop
