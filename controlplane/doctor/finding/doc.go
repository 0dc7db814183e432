// Package finding is how the gateway's diagnostic tools say things: a status, a text
// that names the thing, the cause and the fix, facts, and a table where there are
// several of a kind. It also carries them over HTTP and the control socket.
//
// Guarantees: text output is aligned, wrapped and free of control characters,
// whatever peers and DNS put into it; there is no colour unless asked for; JSON
// keeps everything that the text shows.
//
// Non-goals: deciding what is wrong (packages doctor and explain).
package finding
