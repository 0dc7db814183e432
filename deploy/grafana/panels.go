package grafana

import (
	"fmt"
	"slices"
	"strings"
)

// sel puts the viewer's choice of job and node into every empty pair of braces, and
// before what stands in others.
func sel(expr string) string {
	const chosen = `job=~"$job",node_id=~"$node"`
	expr = strings.ReplaceAll(expr, "{}", "{"+chosen+"}")
	return strings.ReplaceAll(expr, "{,", "{"+chosen+",")
}

// process restricts a series of the process itself, which has no node_id, to the nodes chosen.
func process(name string) string {
	return name + `{job=~"$job"} * on (job, instance) group_left (node_id) ` + sel(`dstack_gateway_build_info{}`)
}

func q(legend, expr string) query { return query{sel(expr), legend} }

// quantiles are three lines through a histogram.
func quantiles(name string) (qs []query) {
	for _, f := range []struct{ label, q string }{{"p50", "0.5"}, {"p90", "0.9"}, {"p99", "0.99"}} {
		qs = append(qs, q(f.label, fmt.Sprintf(`histogram_quantile(%s, sum by (le) (rate(%s_bucket{}[$__rate_interval])))`, f.q, name)))
	}
	return qs
}

// buckets are the cells of a heatmap: how many observations fell into each.
func buckets(name string) []query {
	return []query{q("{{le}}", fmt.Sprintf(`sum by (le) (increase(%s_bucket{}[$__rate_interval]))`, name))}
}

func graph(title, unit string, width int, about string, qs ...query) panel {
	return panel{kind: "timeseries", title: title, unit: unit, width: width, height: 8, about: about, queries: qs}
}

func stacked(p panel) panel { p.stack = true; return p }

func colored(p panel, colors map[string]string) panel { p.colors = colors; return p }

func number(title, unit, about, expr string, steps ...step) panel {
	if steps == nil {
		steps = []step{{nil, "blue"}}
	}
	return panel{kind: "stat", title: title, unit: unit, width: 3, height: 4, about: about, queries: []query{q("", expr)}, steps: steps}
}

func heat(title, about, name string) panel {
	return panel{kind: "heatmap", title: title, unit: "s", width: 8, height: 8, about: about, queries: buckets(name)}
}

var resultColors = map[string]string{"ok": "green", "error": "orange", "rejected": "red", "full": "blue", "resumed": "green", "failed": "red"}

func rows() []row {
	return []row{
		{"Overview", []panel{
			number("Nodes up", "none", "Gateways that answer the scrape.", `sum(up{job=~"$job"})`, step{nil, "red"}, step{1, "green"}),
			number("Nodes down", "none", "Gateways that do not.", `count(up{job=~"$job"}) - sum(up{job=~"$job"})`, step{nil, "green"}, step{1, "red"}),
			number("Alerts", "none", "Firing alerts of these nodes, if the rules of deploy/prometheus are loaded.",
				`count(ALERTS{alertname=~"DstackGateway.+",alertstate="firing",job=~"$job"}) or vector(0)`, step{nil, "green"}, step{1, "red"}),
			number("Open connections", "short", "Client connections open now, over all nodes.", `sum(dstack_gateway_connections{})`),
			number("Refused", "percentunit", "Share of the ended connections that did not reach an app: scans and wrong names, but also dead apps. See Refusals.",
				`sum(rate(dstack_gateway_connections_total{,result="rejected"}[$__rate_interval])) / sum(rate(dstack_gateway_connections_total{}[$__rate_interval]))`,
				step{nil, "green"}, step{0.2, "orange"}, step{0.5, "red"}),
			number("Instances online", "percentunit", "Share of the registered instances with a recent WireGuard handshake, on the node that sees the fewest.",
				`min(sum by (job, instance) (dstack_gateway_instances{,state="online"}) / sum by (job, instance) (dstack_gateway_instances{}))`,
				step{nil, "red"}, step{0.5, "orange"}, step{0.8, "green"}),
			number("First certificate expires", "s", "Time until the first certificate in use expires.",
				`min(dstack_gateway_cert_not_after_timestamp_seconds{}) - time()`, step{nil, "red"}, step{86400, "orange"}, step{7 * 86400, "green"}),
			number("Stores writable", "percentunit", "Share of the nodes whose store takes writes. Traffic does not need it; certificates and settings do.",
				`avg(dstack_gateway_store_writable{})`, step{nil, "red"}, step{1, "green"}),
		}},
		{"Traffic", []panel{
			stacked(graph("Open connections", "short", 8, "Client connections by how TLS is handled: terminate = here, passthrough = in the app, unknown = no server name read yet.",
				q("{{mode}}", `sum by (mode) (dstack_gateway_connections_active{})`))),
			colored(stacked(graph("Connections ended", "cps", 8, "Connections a second by result: ok; error = cut off after bytes flowed; rejected = never reached an app.",
				q("{{result}}", `sum by (result) (rate(dstack_gateway_connections_total{}[$__rate_interval]))`))), resultColors),
			stacked(graph("Throughput", "bps", 8, "Relayed bits a second by direction and by who moves them: userspace, or splice = the kernel.",
				q("{{direction}} {{path}}", `8 * sum by (direction, path) (rate(dstack_gateway_bytes_total{}[$__rate_interval]))`))),
			graph("Connections by node", "short", 8, "Open connections of each node: an even load balancer draws even lines.",
				q("node {{node_id}}", `sum by (node_id) (dstack_gateway_connections{})`)),
			graph("Without a server name", "short", 8, "Connections that have not sent a complete ClientHello. At core.proxy.max_half_open new ones are refused.",
				q("node {{node_id}}", `dstack_gateway_connections_half_open{}`)),
			{kind: "bargauge", title: "Busiest apps", unit: "short", width: 8, height: 8, about: "Open connections of the ten busiest apps.",
				queries: []query{q("{{app}}", `topk(10, sum by (app) (dstack_gateway_app_connections{,app!="other"}))`)}},
			graph("Moved to splice", "cps", 12, "Connections a second that the kernel took over, and how often it gave no pipe for it.",
				q("engaged", `sum(rate(dstack_gateway_splice_engaged_total{}[$__rate_interval]))`),
				q("no pipe", `sum(rate(dstack_gateway_splice_no_pipe_total{}[$__rate_interval]))`)),
			colored(stacked(graph("TLS handshakes", "cps", 12, "Handshakes of connections whose TLS ends here.",
				q("{{result}}", `sum by (result) (rate(dstack_gateway_tls_handshakes_total{}[$__rate_interval]))`))), resultColors),
		}},
		{"Refusals", []panel{
			stacked(graph("Refused by reason", "cps", 12, "Connections closed before they reached an app. no_sni, unknown_app, dns and tls are mostly the internet's scans; no_instance, dial and app_limit are apps; overload and internal are the gateway.",
				q("{{reason}}", `sum by (reason) (rate(dstack_gateway_rejected_total{}[$__rate_interval])) > 0`))),
			graph("Share refused", "percentunit", 6, "Share of the ended connections that were refused, by node.",
				q("node {{node_id}}", `sum by (node_id) (rate(dstack_gateway_rejected_total{}[$__rate_interval])) / sum by (node_id) (rate(dstack_gateway_connections_total{}[$__rate_interval]))`)),
			stacked(graph("Failed dials", "cps", 6, "Failed connections to instances. refused = nothing listens there; timeout and unreachable = no tunnel; ports_exhausted = this node has no ports left.",
				q("{{reason}}", `sum by (reason) (rate(dstack_gateway_dial_failures_total{}[$__rate_interval]))`))),
			graph("Should be zero", "short", 12, "Trouble of the gateway itself, per 5 minutes: connections shed for want of descriptors, contained panics, internal errors, overload.",
				q("shed", `sum(increase(dstack_gateway_accept_shed_total{}[5m]))`),
				q("panics", `sum(increase(dstack_gateway_handler_panics_total{}[5m]))`),
				q("internal", `sum(increase(dstack_gateway_rejected_total{,reason="internal"}[5m]))`),
				q("overload", `sum(increase(dstack_gateway_rejected_total{,reason="overload"}[5m]))`)),
			graph("Port policies not learnt", "short", 12, "Instances, per 5 minutes, whose port policy could not be fetched: their ports stay closed.",
				q("node {{node_id}}", `increase(dstack_gateway_policy_fetch_failures_total{}[5m])`)),
		}},
		{"Latency", []panel{
			graph("First byte", "s", 8, "From accepting a connection to the first byte towards the client: handshake, dial and the app's own time.", quantiles("dstack_gateway_first_byte_seconds")...),
			graph("Connect", "s", 8, "From the first dial to an established connection to an instance.", quantiles("dstack_gateway_connect_seconds")...),
			graph("TLS handshake", "s", 8, "Handshakes at the gateway; the client's round trips count.", quantiles("dstack_gateway_handshake_seconds")...),
			heat("First byte", "How many connections took how long.", "dstack_gateway_first_byte_seconds"),
			heat("Connect", "A second band a round trip above the first is a second region; one at 200 ms is a dead instance tried first.", "dstack_gateway_connect_seconds"),
			heat("TLS handshake", "How many handshakes took how long.", "dstack_gateway_handshake_seconds"),
		}},
		{"Backends and WireGuard", []panel{
			colored(stacked(graph("Instances", "short", 8, "Registered instances as the node sees them that sees most of each; online = handshake younger than core.proxy.timeouts.handshake_stale.",
				q("{{state}}", `max by (state) (dstack_gateway_instances{})`))), map[string]string{"online": "green", "stale": "orange"}),
			graph("Age of handshakes", "s", 8, "Live tunnels make a handshake every two minutes; a median above three is trouble on the path.",
				q("p50", `histogram_quantile(0.5, sum by (le) (dstack_gateway_instance_handshake_age_seconds_bucket{}))`),
				q("p99", `histogram_quantile(0.99, sum by (le) (dstack_gateway_instance_handshake_age_seconds_bucket{}))`)),
			{kind: "heatmap", title: "Age of handshakes", unit: "s", width: 8, height: 8, about: "How many instances have a handshake of which age.",
				queries: []query{q("{{le}}", `sum by (le) (dstack_gateway_instance_handshake_age_seconds_bucket{})`)}},
			graph("WireGuard traffic", "bps", 8, "Encrypted bits a second in the tunnels.",
				q("received", `8 * sum(rate(dstack_gateway_wg_rx_bytes_total{}[$__rate_interval]))`),
				q("sent", `8 * sum(rate(dstack_gateway_wg_tx_bytes_total{}[$__rate_interval]))`)),
			graph("WireGuard peers", "short", 8, "Peers on the interface of each node. Fewer than instances: the log says why.",
				q("node {{node_id}}", `dstack_gateway_wg_peers{}`)),
			graph("WireGuard drops", "pps", 8, "Packets that the interface dropped.",
				q("{{direction}}", `sum by (direction) (rate(dstack_gateway_wg_device_dropped_total{}[$__rate_interval]))`)),
			graph("WireGuard changes", "short", 12, "Reconfigurations per 5 minutes, and those that failed.",
				q("changes", `sum(increase(dstack_gateway_wg_reconfigure_total{}[5m]))`),
				q("failed", `sum(increase(dstack_gateway_wg_reconfigure_failures_total{}[5m]))`)),
			graph("WireGuard trouble", "short", 6, "Per 5 minutes. Each should be zero.",
				q("handshakes not read", `sum(increase(dstack_gateway_wg_refresh_failures_total{}[5m]))`),
				q("invalid peers", `sum(increase(dstack_gateway_wg_invalid_peers_total{}[5m]))`),
				q("evicted peers", `sum(increase(dstack_gateway_wg_evicted_peers_total{}[5m]))`),
				q("repairs", `sum(increase(dstack_gateway_wg_repairs_total{}[5m]))`),
				q("peer file not written", `sum(increase(dstack_gateway_wg_peer_file_failures_total{}[5m]))`)),
			panel{kind: "timeseries", title: "Addresses in use", unit: "percentunit", width: 6, height: 8, max: 1, about: "Share of core.wg.client_ip_range that is given out. Full: new CVMs are refused.",
				queries: []query{q("node {{node_id}}", `dstack_gateway_ip_pool_used{} / dstack_gateway_ip_pool_size{}`)}, steps: []step{{nil, "transparent"}, {0.9, "red"}}},
		}},
		{"Registrations and administration", []panel{
			stacked(graph("Registrations", "cps", 8, "Guests register every three minutes, so most are unchanged. unauthorized = the webhook said no or nothing.",
				q("{{result}}", `sum by (result) (rate(dstack_gateway_registrations_total{}[$__rate_interval]))`))),
			graph("Authorization webhook", "s", 8, "Time that core.auth.url takes to answer.", quantiles("dstack_gateway_auth_seconds")...),
			stacked(graph("Admin calls", "cps", 8, "Calls of the admin API by method and HTTP status.",
				q("{{method}} {{code}}", `sum by (method, code) (rate(dstack_gateway_admin_requests_total{}[$__rate_interval]))`))),
			stacked(graph("Refused at the admin server", "cpm", 12, "Requests a minute without valid credentials, by the credential that decided; none = there was none.",
				q("{{credential}}", `60 * sum by (credential) (rate(dstack_gateway_admin_auth_refused_total{}[$__rate_interval]))`))),
			graph("Cluster as each node sees it", "short", 12, "Instances and gateway nodes in the store. The nodes should agree.",
				q("instances, node {{node_id}}", `dstack_gateway_cluster_instances{}`),
				q("nodes, node {{node_id}}", `dstack_gateway_cluster_nodes{}`)),
		}},
		{"Certificates and custom domains", []panel{
			{kind: "table", title: "Certificates", unit: "s", width: 8, height: 8, about: "Time until the certificate of *.domain expires, the shortest over all nodes.",
				queries: []query{q("", `sort(min by (domain) (dstack_gateway_cert_not_after_timestamp_seconds{}) - time())`)},
				steps:   []step{{nil, "red"}, {86400, "orange"}, {7 * 86400, "green"}}, extra: certificateTable},
			graph("Certificates rejected", "short", 4, "Per 5 minutes: certificates not installed because they are expired, broken or do not fit their key.",
				q("node {{node_id}}", `increase(dstack_gateway_cert_rejections_total{}[5m])`)),
			stacked(graph("Lookups of custom domains", "cps", 6, "DNS lookups by result. failed = the resolvers did not answer.",
				q("{{result}}", `sum by (result) (rate(dstack_gateway_custom_domain_lookups_total{}[$__rate_interval]))`))),
			graph("Lookup time", "s", 6, "Duration of a lookup with its retries.", quantiles("dstack_gateway_custom_domain_lookup_seconds")...),
			panel{kind: "timeseries", title: "Answered from memory", unit: "percentunit", width: 8, height: 8, max: 1, about: "Share of the names that needed no lookup.",
				queries: []query{q("hit ratio", `sum(rate(dstack_gateway_custom_domain_cache_hits_total{}[$__rate_interval])) / (sum(rate(dstack_gateway_custom_domain_cache_hits_total{}[$__rate_interval])) + sum(rate(dstack_gateway_custom_domain_cache_misses_total{}[$__rate_interval])))`)}},
			graph("Lookups saved and stretched", "cps", 8, "coalesced = shared with one in progress; stale = an expired record used because resolvers failed; refused = too many in progress.",
				q("coalesced", `sum(rate(dstack_gateway_custom_domain_coalesced_total{}[$__rate_interval]))`),
				q("stale", `sum(rate(dstack_gateway_custom_domain_stale_total{}[$__rate_interval]))`),
				q("refused", `sum(rate(dstack_gateway_custom_domain_refused_total{}[$__rate_interval]))`)),
			graph("Records and lookups in progress", "short", 8, "Records remembered, and lookups under way.",
				q("records", `sum(dstack_gateway_custom_domain_cache_entries{})`),
				q("in progress", `sum(dstack_gateway_custom_domain_lookups_in_progress{})`)),
		}},
		{"Store", []panel{
			panel{kind: "timeseries", title: "Writable", unit: "short", width: 6, height: 8, max: 1, about: "1 = etcd takes writes. 0: registrations go to the journal, admin changes are refused.",
				queries: []query{q("node {{node_id}}", `dstack_gateway_store_writable{}`)}},
			panel{kind: "timeseries", title: "Leader", unit: "short", width: 6, height: 8, max: 1, about: "1 = etcd has a leader; the second line shows which node's member it is.",
				queries: []query{q("has one, node {{node_id}}", `dstack_gateway_store_has_leader{}`), q("is it, node {{node_id}}", `dstack_gateway_store_is_leader{}`)}},
			graph("Waiting writes", "short", 6, "queued = on their way to etcd; pending = etcd cannot take them now; volatile = not even in the journal: lost when the process ends.",
				q("queued", `sum(dstack_gateway_store_queued_writes{})`),
				q("pending", `sum(dstack_gateway_store_pending_writes{})`),
				q("volatile", `sum(dstack_gateway_store_volatile_writes{})`)),
			graph("Size", "bytes", 6, "Database, the used part of it, and the journal. The quota is core.store.quota_bytes.",
				q("database, node {{node_id}}", `dstack_gateway_store_db_bytes{}`),
				q("used, node {{node_id}}", `dstack_gateway_store_db_used_bytes{}`),
				q("journal, node {{node_id}}", `dstack_gateway_store_journal_bytes{}`)),
			graph("Keys", "short", 6, "Keys in the store, and those that this release cannot read.",
				q("node {{node_id}}", `dstack_gateway_store_keys{}`),
				q("undecodable, node {{node_id}}", `dstack_gateway_store_undecodable_keys{}`)),
			graph("Changes", "cps", 6, "Revisions of etcd a second, as each node follows them. Lines part when a node lags.",
				q("node {{node_id}}", `deriv(dstack_gateway_store_revision{}[5m])`)),
			graph("Age of the backup", "s", 6, "Time since backup.json was written. It follows changes, so an old one is normal when nothing changes.",
				q("node {{node_id}}", `time() - dstack_gateway_store_backup_timestamp_seconds{}`)),
			graph("Should be zero", "short", 6, "Failed backups, and damaged databases that were moved aside.",
				q("backup failed, node {{node_id}}", `dstack_gateway_store_backup_failed{}`),
				q("damaged, node {{node_id}}", `dstack_gateway_store_damaged_databases{}`)),
		}},
		{"Process", []panel{
			graph("CPU", "none", 6, "Processors in use, user and system.", query{`rate(process_cpu_seconds_total{job=~"$job"}[$__rate_interval]) * on (job, instance) group_left (node_id) ` + sel(`dstack_gateway_build_info{}`), "node {{node_id}}"}),
			graph("Memory", "bytes", 6, "Resident memory, and the heap of Go in it.",
				query{process("process_resident_memory_bytes"), "resident, node {{node_id}}"}, query{process("go_memstats_heap_inuse_bytes"), "heap, node {{node_id}}"}),
			panel{kind: "timeseries", title: "File descriptors", unit: "percentunit", width: 6, height: 8, max: 1, about: "Share of the descriptor limit in use: two a connection, six while spliced.",
				queries: []query{{`process_open_fds{job=~"$job"} / process_max_fds{job=~"$job"} * on (job, instance) group_left (node_id) ` + sel(`dstack_gateway_build_info{}`), "node {{node_id}}"}},
				steps:   []step{{nil, "transparent"}, {0.8, "red"}}},
			graph("Goroutines", "short", 6, "They do not grow with relayed connections; a steady climb is a leak.", query{process("go_goroutines"), "node {{node_id}}"}),
			graph("Longest garbage collection pause", "s", 6, "Of the recent ones.", query{`go_gc_duration_seconds{job=~"$job",quantile="1"} * on (job, instance) group_left (node_id) ` + sel(`dstack_gateway_build_info{}`), "node {{node_id}}"}),
			graph("Uptime", "s", 6, "Since the process began to serve.", q("node {{node_id}}", `time() - dstack_gateway_start_time_seconds{}`)),
			{kind: "table", title: "Versions", unit: "none", width: 6, height: 8, about: "What each node runs.",
				queries: []query{q("", `dstack_gateway_build_info{}`)}, extra: columnsOnly("node_id", "instance", "version", "revision")},
			{kind: "table", title: "Acceleration", unit: "none", width: 6, height: 8, about: "How each feature runs, and why not better.",
				queries: []query{q("", `dstack_gateway_accel_info{}`)}, extra: columnsOnly("node_id", "feature", "mode", "reason")},
		}},
	}
}

// columnsOnly shows these labels of a table and nothing else.
func columnsOnly(names ...string) func(object) {
	return func(p object) {
		keep, order := []string{}, object{}
		for i, n := range names {
			keep = append(keep, n)
			order[n] = i
		}
		p["transformations"] = []object{
			{"id": "filterFieldsByName", "options": object{"include": object{"names": keep}}},
			{"id": "organize", "options": object{"indexByName": order, "excludeByName": object{}, "renameByName": object{}}},
		}
	}
}

// certificateTable shows domain and time left, coloured.
func certificateTable(p object) {
	p["transformations"] = []object{
		{"id": "organize", "options": object{"excludeByName": object{"Time": true}, "indexByName": object{"domain": 0, "Value": 1}, "renameByName": object{"Value": "expires in"}}},
	}
	field := p["fieldConfig"].(object)
	field["overrides"] = []object{{
		"matcher": object{"id": "byName", "options": "expires in"},
		"properties": []object{
			{"id": "color", "value": object{"mode": "thresholds"}},
			{"id": "custom.cellOptions", "value": object{"type": "color-text"}},
		},
	}}
}

// sortByName makes the order of overrides, which come from a map, stable.
func sortByName(overrides []object) {
	name := func(o object) string { return o["matcher"].(object)["options"].(string) }
	slices.SortFunc(overrides, func(a, b object) int { return strings.Compare(name(a), name(b)) })
}
