// Package cpu says who used the machine's processors between two moments: the whole machine, the gateway's process
// tree, the bench's own client and backend, and programs that have nothing to do with the bench.
//
// The machine's figure is wall time x processors minus idle time. The kernel measures idle time at every change of
// state, but only samples the other columns of /proc/stat at its tick, so that work done in interrupts of a
// sleeping processor (forwarding, eBPF, softirq) is nearly invisible in them; they are not used.
// Non-goals: time stolen by the hypervisor is taken off, not explained; no per-thread figures.
package cpu
