// Package suite is what the bench measures and in which order: the cases, the interleaving of arms, the waiting for a
// quiet machine, and the translation of raw windows into metrics.
//
// Every cell (one case of one arm in one round) gets a rig of its own, built and removed around it, so that no
// connection, port in TIME_WAIT, cached route or warmed-up gateway is carried from one arm into the next.
package suite
