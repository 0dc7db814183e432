// Package prpc is the RPC transport of the daemons: unary calls over HTTP/1.1
// or HTTP/2, one path segment a method, messages in protobuf or in JSON.
//
// Guarantees: what Service answers is byte-compatible with released clients
// (gateway spec 2, KMS spec 3): selection of the encoding, error shapes with
// the whole chain of causes, a Content-Length on every answer, and a JSON
// mapping that emits every field under its proto name. A panic in a method
// becomes an error answer. Inputs are bounded.
//
// Non-goals: streaming, deadlines (they are the http.Server's), compression,
// authentication (Options.Identify attaches whoever the caller is), and
// canonical proto3 JSON, which differs.
package prpc
