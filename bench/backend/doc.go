// Package backend is the application behind the gateway: it acknowledges ClientHellos, answers 64-byte requests and
// sends or verifies bulk data.
//
// Four listeners, as some gateways choose the port by name: requests and bulk, each once for passthrough (a
// connection starts with the ClientHello the gateway peeked at) and once for terminated TLS (plaintext from the
// first byte). Guarantee: it never answers bytes that fail verification; the reason is kept for Errors.
package backend
