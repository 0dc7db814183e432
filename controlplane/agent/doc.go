// Package agent talks to guest agents: to the one of the gateway's own CVM for
// its RPC certificate, its identity and evidence about its keys, and to those of
// app CVMs for the port policy of guests that do not report one.
//
// Guarantees: answers are bounded, redirects are not followed, files that hold
// keys are mode 0600 and replaced as a whole, and only after they were found to
// fit together. Non-goals: retries and caching, which need to know more than
// one call does.
package agent
