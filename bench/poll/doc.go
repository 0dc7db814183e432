// Package poll is the bench's thin layer over epoll and non-blocking IPv4 sockets. The request/response and set-up
// cases run on one thread a side with it, so that the load's own share of the processors stays small and is the same
// for every arm; a goroutine a connection would cost several times as much.
// Non-goals: portability, fairness among connections, IPv6.
package poll
