// Package doctor finds out what is wrong with a gateway and its machine.
// "dstack-gw doctor" is its command line.
//
// Offline checks look at the configuration and at what the gateway needs from the
// machine; they work when it does not start. Online checks run inside the gateway,
// with its privileges, and report the state of its parts. The command merges both:
// what the running process says about a thing counts.
//
// Guarantees: every finding names the thing, the cause and the remedy; a check
// changes nothing but a temporary file in the data directory, is bounded in time and
// cannot take the others down; secrets are not read into findings.
//
// Non-goals: computing kernel limits for a load (package kernel, preflight), and
// repairing anything.
package doctor
