// Package stats condenses measurements: percentiles of one run's samples, median and spread of several runs, and
// ratios of two arms paired by round.
//
// Medians and whole spreads are given, not means and deviations: with five rounds on a shared machine one disturbed
// round must neither move the result nor disappear.
package stats
