// Package monitoring tests what operators see of a gateway: the alerts of
// deploy/prometheus and the dashboard of deploy/grafana against a gateway that serves
// traffic and a Prometheus that scrapes it.
//
// Guarantees: every expression parses, finds its series and returns data; no alert
// fires for a healthy gateway; each alert fires for the trouble it is named after and
// is explained in docs/operations.md; a series that is renamed or loses a label breaks
// the build.
//
// Non-goals: how Grafana draws, and the numbers themselves (their packages test them).
package monitoring
