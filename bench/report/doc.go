// Package report holds the results of a bench run and renders them: JSON with everything, Markdown tables, SVG bar
// charts.
//
// Medians are printed with the smallest and largest round, ratios are taken round by round and compare arms of the
// same run only. Rendering is pure: the same Report gives the same bytes.
package report
