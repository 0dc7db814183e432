// Package clienthello finds the server name in the first bytes of a TLS
// connection, before anybody has decided who will terminate it.
//
// Guarantees: a name is returned as soon as its bytes are there, even when the
// rest of the hello is not; no input makes it panic, allocate or read more than
// [MaxSize] bytes; a stream that is not TLS is told apart from its first byte.
//
// Non-goals: it does not validate the hello. It is lenient wherever the real
// TLS endpoint will be strict, because its only product is a routing key.
package clienthello
