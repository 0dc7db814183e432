// Package agent runs the bench's client and backend as processes of their own inside the rig's namespaces: the
// harness starts itself again there and talks with the copy in JSON lines over standard input and output.
//
// Processes of their own, because a network namespace belongs to a thread and because their CPU time must be told
// from everybody else's. The kernel ends agents with the harness (see rig.Start).
package agent
