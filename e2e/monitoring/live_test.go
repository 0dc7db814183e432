package monitoring

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const (
	prometheusURL  = "http://127.0.0.1:9090"
	scrapeInterval = 500 * time.Millisecond
	// rateInterval stands for Grafana's, which is at least four scrapes.
	rateInterval = "10s"
)

// TestLive runs all that is shipped against a gateway and a Prometheus.
func TestLive(t *testing.T) {
	if os.Getenv(netnsEnv) == "" {
		need(t, "prometheus") // before a namespace is made for nothing
	}
	if !inNetns(t) {
		return
	}
	r := startRig(t)
	ctx, stop := context.WithCancel(context.Background())
	r.traffic(ctx)
	defer stop()
	startPrometheus(t, r)

	t.Run("exported", func(t *testing.T) { checkExported(t, r) })
	// Rates and quantiles need scrapes, and between them one of all that rarely happens.
	for _, rare := range []string{"dstack_gateway_splice_engaged_total", "dstack_gateway_auth_seconds_count", "dstack_gateway_custom_domain_lookup_seconds_count", "dstack_gateway_handshake_seconds_count"} {
		waitFor(t, 15*time.Second, "Prometheus to see "+rare+" grow", func() error {
			n, err := query(fmt.Sprintf(`count_over_time(%s[1h]) >= 4 and rate(%s[%s]) > 0`, rare, rare, rateInterval))
			if err == nil && len(n) == 0 {
				err = fmt.Errorf("not yet")
			}
			return err
		})
	}
	t.Run("dashboard", func(t *testing.T) {
		for _, e := range dashboardExpressions(t, rateInterval) {
			checkData(t, e.where, e.expr)
		}
	})
	t.Run("alerts", func(t *testing.T) {
		for _, a := range alerts(t) {
			loud, err := asBool(a.Expr)
			if err != nil {
				t.Errorf("%s: %v", a.Alert, err)
				continue
			}
			checkData(t, a.Alert, loud)
			if got, err := query(a.Expr); err != nil || len(got) > 0 {
				t.Errorf("%s: a healthy gateway fires it: %v %v", a.Alert, got, err)
			}
		}
	})
	t.Run("rules are loaded", func(t *testing.T) {
		var answer struct {
			Data struct {
				Groups []struct {
					Rules []struct{ Name, State, LastError, Health string }
				}
			}
		}
		if err := get("/api/v1/rules", &answer); err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, g := range answer.Data.Groups {
			for _, rule := range g.Rules {
				n++
				if rule.Health != "ok" || rule.State != "inactive" {
					t.Errorf("%s: state %s, health %s %s", rule.Name, rule.State, rule.Health, rule.LastError)
				}
			}
		}
		if want := len(alerts(t)); n != want {
			t.Errorf("Prometheus runs %d rules, want %d", n, want)
		}
	})
}

// checkData runs one expression. There are no exceptions: what a healthy gateway shows
// nothing for cannot be told from a mistake.
func checkData(t *testing.T, where, expr string) {
	t.Helper()
	got, err := query(expr)
	if err != nil {
		t.Errorf("%s: %v\n\t%s", where, err, expr)
		return
	}
	if !slices.ContainsFunc(got, func(s sample) bool { return s.Value[1] != "NaN" }) {
		t.Errorf("%s: no data, or only NaN: %v\n\t%s", where, got, expr)
	}
}

// checkExported compares what is asked for with what the gateway exports.
func checkExported(t *testing.T, r *rig) {
	inv := exported(t, r)
	rules := map[string]bool{}
	for _, a := range alerts(t) {
		rules[a.Alert] = true
		for _, c := range inv.check(a.Expr) {
			t.Errorf("%s: %s", a.Alert, c)
		}
	}
	// Prometheus' own.
	inv["ALERTS"] = map[string]map[string]bool{"alertname": rules, "alertstate": words("firing pending"), "job": words("dstack-gw")}
	for _, e := range dashboardExpressions(t, rateInterval) {
		for _, c := range inv.check(e.expr) {
			t.Errorf("%s: %s", e.where, c)
		}
	}
}

// exported is what one scrape brings.
func exported(t *testing.T, r *rig) inventory {
	t.Helper()
	status, body, err := r.call("/metrics", adminToken)
	if err != nil || status != http.StatusOK {
		t.Fatalf("GET /metrics: HTTP %d, %v", status, err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		t.Fatalf("GET /metrics: %v", err)
	}
	inv := inventory{}
	add := func(name string, m *dto.Metric, extra ...string) {
		labels := inv[name]
		if labels == nil {
			labels = map[string]map[string]bool{"job": words("dstack-gw"), "instance": words(adminAddr)}
			inv[name] = labels
		}
		note := func(label, value string) {
			if labels[label] == nil {
				labels[label] = map[string]bool{}
			}
			labels[label][value] = true
		}
		for _, l := range m.GetLabel() {
			note(l.GetName(), l.GetValue())
		}
		for _, label := range extra {
			note(label, "")
		}
	}
	for name, f := range families {
		for _, m := range f.GetMetric() {
			switch f.GetType() {
			case dto.MetricType_HISTOGRAM:
				add(name+"_bucket", m, "le")
				add(name+"_sum", m)
				add(name+"_count", m)
			case dto.MetricType_SUMMARY:
				add(name+"_sum", m)
				add(name+"_count", m)
				for _, q := range m.GetSummary().GetQuantile() {
					add(name, m)
					if inv[name]["quantile"] == nil {
						inv[name]["quantile"] = map[string]bool{}
					}
					inv[name]["quantile"][fmt.Sprint(q.GetQuantile())] = true
				}
			default:
				add(name, m)
			}
		}
	}
	inv["up"] = map[string]map[string]bool{"job": words("dstack-gw"), "instance": words(adminAddr)}
	return inv
}

// startPrometheus scrapes the admin server as the shipped example says.
func startPrometheus(t *testing.T, r *rig) {
	t.Helper()
	example, err := os.ReadFile(exampleFile)
	r.check(err)
	rules, err := os.ReadFile(rulesFile)
	r.check(err)
	conf := string(example)
	for from, to := range map[string]string{
		"interval: 15s":                   "interval: " + scrapeInterval.String(),
		"/etc/prometheus/dstack-gw.token": r.path("token"),
		"- gateway-1.example.com:8001":    "- " + adminAddr,
		"- gateway-2.example.com:8001":    "",
	} {
		if !strings.Contains(conf, from) {
			t.Fatalf("%s has no %q", exampleFile, from)
		}
		conf = strings.ReplaceAll(conf, from, to)
	}
	r.write("prometheus.yml", []byte(conf))
	r.write("dstack-gw.rules.yml", rules)
	r.write("token", []byte(adminToken+"\n"))
	cmd := exec.Command(need(t, "prometheus"), "--config.file="+r.path("prometheus.yml"), "--storage.tsdb.path="+r.path("tsdb"),
		"--web.listen-address="+strings.TrimPrefix(prometheusURL, "http://"), "--log.level=warn")
	log := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	r.check(cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("Prometheus: %v\n%s", err, log)
		}
	})
	waitFor(t, 20*time.Second, "Prometheus", func() error {
		got, err := query(`up{job="dstack-gw"} == 1`)
		if err == nil && len(got) != 1 {
			err = fmt.Errorf("the gateway was not scraped yet")
		}
		return err
	})
}

type sample struct {
	Metric map[string]string
	Value  [2]any
}

// query is an instant query that gives a vector or, made into one, a scalar.
func query(expr string) ([]sample, error) {
	var answer struct {
		Data struct {
			ResultType string
			Result     json.RawMessage
		}
	}
	if err := get("/api/v1/query?query="+url.QueryEscape(expr), &answer); err != nil {
		return nil, err
	}
	if answer.Data.ResultType != "vector" {
		return nil, fmt.Errorf("a %s, want a vector", answer.Data.ResultType)
	}
	var result []sample
	err := json.Unmarshal(answer.Data.Result, &result)
	return result, err
}

func get(path string, into any) error {
	client := http.Client{Timeout: 5 * time.Second}
	res, err := client.Get(prometheusURL + path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var status struct{ Status, Error string }
	var body bytes.Buffer
	if _, err := body.ReadFrom(res.Body); err != nil {
		return err
	}
	if err := json.Unmarshal(body.Bytes(), &status); err != nil {
		return fmt.Errorf("HTTP %d: %.200s", res.StatusCode, body.String())
	}
	if status.Status != "success" {
		return fmt.Errorf("%s", status.Error)
	}
	return json.Unmarshal(body.Bytes(), into)
}
