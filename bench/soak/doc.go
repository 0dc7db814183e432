// Package soak keeps thousands of connections of every temper open through a gateway and checks that nothing is lost:
// no byte, no descriptor, no goroutine. It also measures what an idle relayed connection costs, and whether accepting
// goes on while directions stall in splice(2).
//
// Guarantees: every byte is compared with what must stand at its offset of its stream, so a stream that was reset is
// still proven to be a prefix; streams that end in order also carry their length and SHA-256, and both ends must count
// the same streams. Anything unexpected is a line in Report.Problems.
// Non-goals: rates and latencies (package suite measures those); the load is throttled on purpose.
package soak
