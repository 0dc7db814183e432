// Package grafana writes the Grafana dashboard of dstack-gw. The committed
// dstack-gw.json is its output; import that, do not edit it.
//
// panels.go says what is on the dashboard, dashboard.go knows how Grafana writes it
// down. Package e2e/monitoring tests every query against a gateway.
//
// Guarantees: the output is the same every time, panels do not overlap, and every one
// has a description. Non-goals: dashboards of other parts of dstack.
package grafana

//go:generate sh -c "go run ./gendashboard >dstack-gw.json"
