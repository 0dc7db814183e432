package monitoring

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// drill is one alert under trial. Series have a value a minute, in promtool's
// notation: "0x10" ten more of the same, "0+6x10" ten more, each 6 higher. The labels
// of a target are added to each.
type drill struct {
	alert  string
	series map[string]string
	quiet  []string // times at which it must not fire
	fires  string   // when it fires, at the latest
	labels string   // of the alert besides severity and, unless none, those of the target
}

const target = `job="dstack-gw",instance="gw:8001",node_id="1"`

// Every alert has its drill: trouble begins, and for as long as a short disturbance or
// the ordinary business of the internet could explain it, nobody is woken up.
var drills = []drill{
	{alert: "DstackGatewayDown", series: map[string]string{`up{job="dstack-gw",instance="gw:8001"}`: "1x4 0x10"},
		quiet: []string{"4m", "5m"}, fires: "6m", labels: `job="dstack-gw",instance="gw:8001"`},
	{alert: "DstackGatewayRestarting", series: map[string]string{"dstack_gateway_start_time_seconds": "100x9 700 760 760x9 820x20"},
		quiet: []string{"9m", "11m", "20m"}, fires: "25m"},
	{alert: "DstackGatewayPanics", series: map[string]string{"dstack_gateway_handler_panics_total": "3x9 4x30"},
		quiet: []string{"9m", "30m"}, fires: "11m"},
	{alert: "DstackGatewayDescriptorsLow", series: map[string]string{
		// Series of the process have no node_id.
		`process_open_fds{job="dstack-gw",instance="gw:8001"}`: "100x4 900x3 100x2 850x10", `process_max_fds{job="dstack-gw",instance="gw:8001"}`: "1000x20",
		`process_open_fds{job="other",instance="x:9100"}`: "999x20", `process_max_fds{job="other",instance="x:9100"}`: "1000x20",
		`dstack_gateway_build_info{version="1"}`: "1x20"},
		quiet: []string{"4m", "8m", "14m"}, fires: "18m"},

	{alert: "DstackGatewayConnectionsShed", series: map[string]string{"dstack_gateway_accept_shed_total": "7x9 8+5x20"}, quiet: []string{"9m", "11m"}, fires: "13m"},
	{alert: "DstackGatewayOverload", series: map[string]string{
		`dstack_gateway_rejected_total{reason="overload"}`: "0+30x9 300+600x20", // half a connection a second is the internet
		`dstack_gateway_rejected_total{reason="no_sni"}`:   "0+6000x30"},
		quiet: []string{"9m", "11m"}, fires: "17m", labels: `reason="overload"`},
	{alert: "DstackGatewayPortsExhausted", series: map[string]string{
		`dstack_gateway_dial_failures_total{reason="ports_exhausted"}`: "0x9 1x20",
		`dstack_gateway_dial_failures_total{reason="refused"}`:         "0+60x30"},
		quiet: []string{"9m", "20m"}, fires: "11m", labels: `reason="ports_exhausted"`},
	{alert: "DstackGatewayAppsUnreachable", series: map[string]string{
		`dstack_gateway_rejected_total{reason="dial"}`:                                            "0+30x9 300+300x30",
		`dstack_gateway_rejected_total{reason="no_instance"}`:                                     "0+30x9 300+300x30",
		`dstack_gateway_rejected_total{reason="unknown_app"}`:                                     "0+900x40",
		`dstack_gateway_connections_total{listener="proxy",mode="passthrough",result="ok"}`:       "0+60x40",
		`dstack_gateway_connections_total{listener="proxy",mode="passthrough",result="rejected"}`: "0+960x9 9600+1500x30"},
		quiet: []string{"9m", "15m"}, fires: "24m"},
	{alert: "DstackGatewayInternalErrors", series: map[string]string{`dstack_gateway_rejected_total{reason="internal"}`: "2x9 3+3x20"},
		quiet: []string{"9m", "14m"}, fires: "16m", labels: `reason="internal"`},
	{alert: "DstackGatewayHandshakesFailing", series: map[string]string{
		`dstack_gateway_tls_handshakes_total{result="full"}`:    "0+60x9 600+6x30",
		`dstack_gateway_tls_handshakes_total{result="resumed"}`: "0+60x9 600+6x30",
		`dstack_gateway_tls_handshakes_total{result="failed"}`:  "0+30x9 300+120x30"},
		quiet: []string{"9m", "16m"}, fires: "24m"},
	{alert: "DstackGatewaySpliceUnavailable", series: map[string]string{"dstack_gateway_splice_no_pipe_total": "0x9 1+1x30"}, quiet: []string{"9m", "20m"}, fires: "27m"},
	{alert: "DstackGatewayResolversFailing", series: map[string]string{
		`dstack_gateway_custom_domain_lookups_total{result="found"}`:  "0+60x9 600+1x30",
		`dstack_gateway_custom_domain_lookups_total{result="failed"}`: "0+6x9 60+60x30"},
		quiet: []string{"9m", "15m"}, fires: "24m"},

	{alert: "DstackGatewayInstancesOffline", series: map[string]string{
		`dstack_gateway_instances{state="online"}`: "9x9 7x20", `dstack_gateway_instances{state="stale"}`: "1x9 3x20"},
		quiet: []string{"9m", "19m"}, fires: "21m"},
	{alert: "DstackGatewayWireGuardFailing", series: map[string]string{"dstack_gateway_wg_reconfigure_failures_total": "1x9 2+2x20"}, quiet: []string{"9m", "13m"}, fires: "16m"},
	{alert: "DstackGatewayHandshakesUnknown", series: map[string]string{"dstack_gateway_wg_refresh_failures_total": "1x9 2+6x20"}, quiet: []string{"9m", "13m"}, fires: "16m"},
	{alert: "DstackGatewayWireGuardTampered", series: map[string]string{"dstack_gateway_wg_repairs_total": "0x9 1x30"}, quiet: []string{"9m", "30m"}, fires: "11m"},
	{alert: "DstackGatewayPeersRejected", series: map[string]string{
		"dstack_gateway_wg_invalid_peers_total": "0x30", "dstack_gateway_wg_evicted_peers_total": "0x9 1x30"}, quiet: []string{"9m", "30m"}, fires: "11m"},
	{alert: "DstackGatewayTunnelDrops", series: map[string]string{
		`dstack_gateway_wg_device_dropped_total{direction="rx"}`: "0+6x9 60+600x30", `dstack_gateway_wg_device_dropped_total{direction="tx"}`: "0+6x9 60+600x30"},
		quiet: []string{"9m", "15m"}, fires: "25m"},
	{alert: "DstackGatewayAddressesLow", series: map[string]string{"dstack_gateway_ip_pool_used": "90x9 95x20", "dstack_gateway_ip_pool_size": "100x30"},
		quiet: []string{"9m", "20m"}, fires: "26m"},
	{alert: "DstackGatewayPoliciesUnknown", series: map[string]string{"dstack_gateway_policy_fetch_failures_total": "0x4 1x15 2+1x40"}, quiet: []string{"10m", "22m"}, fires: "45m"},

	{alert: "DstackGatewayCertificateExpiresSoon", series: map[string]string{ // 8 days less half a day an hour from 0 on
		`dstack_gateway_cert_not_after_timestamp_seconds{domain="apps.test"}`:  "691200-720x600",
		`dstack_gateway_cert_not_after_timestamp_seconds{domain="other.test"}`: "9000000x600"},
		quiet: []string{"1h", "1h50m"}, fires: "3h", labels: `job="dstack-gw",domain="apps.test"`},
	{alert: "DstackGatewayCertificateExpiresNow", series: map[string]string{`dstack_gateway_cert_not_after_timestamp_seconds{domain="apps.test"}`: "90000x600"},
		quiet: []string{"30m"}, fires: "1h1m", labels: `job="dstack-gw",domain="apps.test"`},
	{alert: "DstackGatewayCertificateRejected", series: map[string]string{"dstack_gateway_cert_rejections_total": "2x9 3x30"}, quiet: []string{"9m", "30m"}, fires: "11m"},

	{alert: "DstackGatewayStoreNoLeader", series: map[string]string{"dstack_gateway_store_has_leader": "1x9 0x9"}, quiet: []string{"9m", "10m"}, fires: "11m"},
	{alert: "DstackGatewayStoreNotWritable", series: map[string]string{"dstack_gateway_store_writable": "1x9 0x30"}, quiet: []string{"9m", "19m"}, fires: "20m"},
	{alert: "DstackGatewayStoreWritesVolatile", series: map[string]string{"dstack_gateway_store_volatile_writes": "0x9 4x9"}, quiet: []string{"9m", "10m"}, fires: "11m"},
	{alert: "DstackGatewayStoreUndecodable", series: map[string]string{"dstack_gateway_store_undecodable_keys": "0x9 1x9"}, quiet: []string{"9m", "14m"}, fires: "15m"},
	{alert: "DstackGatewayStoreDamaged", series: map[string]string{"dstack_gateway_store_damaged_databases": "0x9 1x9"}, quiet: []string{"9m"}, fires: "10m"},
	{alert: "DstackGatewayStoreBackupFailing", series: map[string]string{"dstack_gateway_store_backup_failed": "0x9 1x20"}, quiet: []string{"9m", "19m"}, fires: "20m"},

	{alert: "DstackGatewayRegistrationsFailing", series: map[string]string{
		`dstack_gateway_registrations_total{result="unchanged"}`:    "0+60x9 600+6x30",
		`dstack_gateway_registrations_total{result="refused"}`:      "0+6x9 60+6x30",
		`dstack_gateway_registrations_total{result="unauthorized"}`: "0+6x9 60+60x30"},
		quiet: []string{"9m", "15m"}, fires: "25m"},
	{alert: "DstackGatewayAuthSlow", series: map[string]string{
		`dstack_gateway_auth_seconds_bucket{le="1"}`:    "0+60x9 600x30",
		`dstack_gateway_auth_seconds_bucket{le="5"}`:    "0+60x9 600+60x30",
		`dstack_gateway_auth_seconds_bucket{le="+Inf"}`: "0+60x9 600+60x30"},
		quiet: []string{"9m", "15m"}, fires: "35m"},
	{alert: "DstackGatewayAdminGuessing", series: map[string]string{
		`dstack_gateway_admin_auth_refused_total{credential="none"}`:   "0+600x40", // a health check without token
		`dstack_gateway_admin_auth_refused_total{credential="bearer"}`: "0+2x9 20+8x30",
		`dstack_gateway_admin_auth_refused_total{credential="basic"}`:  "0+2x9 20+8x30"},
		quiet: []string{"9m", "12m"}, fires: "25m"},
}

// TestAlertsFire gives the drills to promtool.
func TestAlertsFire(t *testing.T) {
	promtool := need(t, "promtool")
	rules := loadRules(t)
	byName := map[string]rule{}
	for gi := range rules.Groups {
		for ri := range rules.Groups[gi].Rules {
			r := &rules.Groups[gi].Rules[ri]
			byName[r.Alert] = *r
			r.Annotations = nil // promtool would want every text repeated
		}
	}
	dir := t.TempDir()
	write := func(name string, v any) string {
		text, err := yaml.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("rules.yml", rules)

	type object = map[string]any
	var tests []object
	drilled := map[string]bool{}
	for _, d := range drills {
		r, ok := byName[d.alert]
		if !ok {
			t.Errorf("drill for %s, which is no alert", d.alert)
			continue
		}
		drilled[d.alert] = true
		if len(d.quiet) == 0 {
			t.Errorf("the drill of %s never shows it quiet", d.alert)
		}
		labels := parseLabels(t, r, d)
		// The texts of an alert may only use labels that it has.
		for _, m := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(r.Annotations["summary"]+r.Annotations["description"], -1) {
			if _, ok := labels[m[1]]; !ok {
				t.Errorf("%s: its texts use label %s, it has only %v", d.alert, m[1], labels)
			}
		}
		var series []object
		for s, values := range d.series {
			if !strings.Contains(s, "job=") {
				name, rest, some := strings.Cut(s, "{")
				if !some {
					rest = "}"
				} else {
					rest = "," + rest
				}
				s = name + "{" + target + rest
			}
			series = append(series, object{"series": s, "values": values})
		}
		var trials []object
		for _, at := range d.quiet {
			trials = append(trials, object{"eval_time": at, "alertname": d.alert, "exp_alerts": []object{}})
		}
		trials = append(trials, object{"eval_time": d.fires, "alertname": d.alert, "exp_alerts": []object{{"exp_labels": labels}}})
		tests = append(tests, object{"name": d.alert, "interval": "1m", "input_series": series, "alert_rule_test": trials})
	}
	for name := range byName {
		if !drilled[name] {
			t.Errorf("no drill for %s", name)
		}
	}
	suite := write("test.yml", object{"rule_files": []string{"rules.yml"}, "evaluation_interval": "30s", "tests": tests})
	if out, err := exec.Command(promtool, "test", "rules", suite).CombinedOutput(); err != nil {
		t.Errorf("promtool test rules: %v\n%s", err, out)
	}
}

// parseLabels are the labels of the firing alert.
func parseLabels(t *testing.T, r rule, d drill) map[string]string {
	t.Helper()
	labels := map[string]string{"severity": r.Labels["severity"]}
	text := d.labels
	if !strings.Contains(text, "job=") {
		text += "," + target
	}
	for pair := range strings.SplitSeq(text, ",") {
		if name, value, ok := strings.Cut(pair, "="); ok {
			labels[name] = strings.Trim(value, `"`)
		}
	}
	return labels
}

// TestPromtoolCheck: the files as they are shipped.
func TestPromtoolCheck(t *testing.T) {
	promtool := need(t, "promtool")
	for _, args := range [][]string{
		{"check", "rules", "--lint=all", "--lint-fatal", rulesFile},
		{"check", "config", "--syntax-only", exampleFile},
	} {
		if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	// The example loads the rules that lie beside it.
	example, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(example, []byte("- "+filepath.Base(rulesFile)+"\n")) {
		t.Errorf("%s does not load %s", exampleFile, filepath.Base(rulesFile))
	}
}

// need is a program of Debian's package prometheus.
func need(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed (Debian package prometheus)", program)
	}
	return path
}
