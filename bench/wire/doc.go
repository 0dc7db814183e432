// Package wire is the small protocol the bench's client and backend speak through a gateway, and the checks that
// make a benchmark of a gateway that corrupts, loses, repeats or mixes up bytes fail instead of winning.
//
// Guarantees: every 64-byte message carries a CRC-32C and the connection it belongs to; bulk data is compared byte
// by byte with the pattern both ends can compute, and with SHA-256 where the caller asks for it; a ClientHello is
// acknowledged with its length and CRC.
// Non-goals: secrecy, versioning, speed of the generic encoder (the hot path is one message or one memory compare).
package wire
