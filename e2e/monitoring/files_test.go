package monitoring

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/dstack-gw/dstack-gw/deploy/grafana"
)

const (
	rulesFile     = "../../deploy/prometheus/dstack-gw.rules.yml"
	exampleFile   = "../../deploy/prometheus/prometheus.example.yml"
	dashboardFile = "../../deploy/grafana/dstack-gw.json"
	runbookFile   = "../../docs/operations.md"
	runbookURL    = "https://github.com/dstack-gw/dstack-gw/blob/main/docs/operations.md"
)

// rule is an alert.
type rule struct {
	Alert       string            `json:"alert"`
	Record      string            `json:"record"`
	Expr        string            `json:"expr"`
	For         string            `json:"for,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type ruleFile struct {
	Groups []struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	} `json:"groups"`
}

func loadRules(t *testing.T) (f ruleFile) {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict(text, &f); err != nil {
		t.Fatalf("%s: %v", rulesFile, err)
	}
	return f
}

func alerts(t *testing.T) (all []rule) {
	t.Helper()
	for _, g := range loadRules(t).Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		t.Fatalf("%s has no rules", rulesFile)
	}
	return all
}

// dashboard is the part of a Grafana dashboard that is looked at.
type dashboard struct {
	SchemaVersion int     `json:"schemaVersion"`
	UID           string  `json:"uid"`
	Panels        []panel `json:"panels"`
	Templating    struct {
		List []menu `json:"list"`
	} `json:"templating"`
	Annotations struct {
		List []struct {
			Name string `json:"name"`
			Expr string `json:"expr"`
		} `json:"list"`
	} `json:"annotations"`
}

// menu is a variable that the viewer chooses.
type menu struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	Definition string `json:"definition"`
}

type panel struct {
	ID          int                                      `json:"id"`
	Type        string                                   `json:"type"`
	Title       string                                   `json:"title"`
	Description string                                   `json:"description"`
	GridPos     struct{ X, Y, W, H int }                 `json:"gridPos"`
	Datasource  struct{ Type, UID string }               `json:"datasource"`
	Panels      []panel                                  `json:"panels"`
	FieldConfig struct{ Defaults struct{ Unit string } } `json:"fieldConfig"`
	Targets     []struct {
		RefID        string `json:"refId"`
		Expr         string `json:"expr"`
		LegendFormat string `json:"legendFormat"`
		Range        bool   `json:"range"`
		Instant      bool   `json:"instant"`
		Format       string `json:"format"`
	} `json:"targets"`
}

func loadDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	return d
}

// variable stands for what Grafana replaces.
var variable = regexp.MustCompile(`\$\{?[a-zA-Z_]+\}?`)

// filledIn is an expression of the dashboard as Grafana would send it.
func filledIn(t *testing.T, expr, interval string) string {
	t.Helper()
	return variable.ReplaceAllStringFunc(expr, func(v string) string {
		switch strings.Trim(v, "${}") {
		case "job":
			return "dstack-gw"
		case "node":
			return ".+"
		case "__rate_interval":
			return interval
		}
		t.Errorf("unknown variable %s in %s", v, expr)
		return v
	})
}

// expression is one that has to work, and where it stands.
type expression struct{ where, expr string }

// dashboardExpressions are all queries of the dashboard.
func dashboardExpressions(t *testing.T, interval string) (all []expression) {
	t.Helper()
	d := loadDashboard(t)
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			all = append(all, expression{fmt.Sprintf("panel %d %q %s", p.ID, p.Title, q.RefID), filledIn(t, q.Expr, interval)})
		}
	}
	for _, a := range d.Annotations.List {
		if a.Expr != "" {
			all = append(all, expression{"annotation " + a.Name, filledIn(t, a.Expr, interval)})
		}
	}
	values := regexp.MustCompile(`^label_values\((.+), (\w+)\)$`)
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		m := values.FindStringSubmatch(v.Definition)
		if m == nil {
			t.Errorf("variable %s: %s is no label_values", v.Name, v.Definition)
			continue
		}
		// The values of the menu are those of the label.
		all = append(all, expression{"variable " + v.Name, fmt.Sprintf("count by (%s) (%s)", m[2], filledIn(t, m[1], interval))})
	}
	return all
}

func TestDashboard(t *testing.T) {
	d := loadDashboard(t)
	if d.SchemaVersion < 36 || d.UID == "" {
		t.Errorf("schema %d, uid %q", d.SchemaVersion, d.UID)
	}
	known := words("row timeseries stat heatmap bargauge table")
	ids := map[int]string{}
	cells := map[[2]int]string{}
	for _, p := range d.Panels {
		name := fmt.Sprintf("panel %d %q", p.ID, p.Title)
		if other, taken := ids[p.ID]; taken || p.ID <= 0 {
			t.Errorf("%s: id is taken by %q or not positive", name, other)
		}
		ids[p.ID] = p.Title
		g := p.GridPos
		if g.X < 0 || g.Y < 0 || g.W < 1 || g.H < 1 || g.X+g.W > 24 {
			t.Errorf("%s lies outside of the grid: %+v", name, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken {
					t.Errorf("%s overlaps %s at %d,%d", name, other, x, y)
				}
				cells[[2]int{x, y}] = name
			}
		}
		if !known[p.Type] || p.Title == "" {
			t.Errorf("%s: type %q", name, p.Type)
		}
		if p.Type == "row" {
			if len(p.Panels)+len(p.Targets) > 0 {
				t.Errorf("%s holds panels, which the other tests do not look into", name)
			}
			continue
		}
		if len(p.Description) < 5 || p.FieldConfig.Defaults.Unit == "" || p.Datasource.UID != "${datasource}" {
			t.Errorf("%s: description %q, unit %q, data source %+v", name, p.Description, p.FieldConfig.Defaults.Unit, p.Datasource)
		}
		if len(p.Targets) == 0 {
			t.Errorf("%s shows nothing", name)
		}
		refs := map[string]bool{}
		for _, q := range p.Targets {
			if refs[q.RefID] || q.RefID == "" {
				t.Errorf("%s: refId %q twice", name, q.RefID)
			}
			refs[q.RefID] = true
			if q.Range == q.Instant {
				t.Errorf("%s %s: neither range nor instant, or both", name, q.RefID)
			}
			if q.Instant == (p.Type == "timeseries" || p.Type == "heatmap") {
				t.Errorf("%s %s: instant is %v", name, q.RefID, q.Instant)
			}
			if (p.Type == "heatmap") != (q.Format == "heatmap") {
				t.Errorf("%s %s: format %q", name, q.RefID, q.Format)
			}
			if p.Type == "timeseries" && q.LegendFormat == "" {
				t.Errorf("%s %s has no legend", name, q.RefID)
			}
		}
	}
	for _, want := range []string{"datasource", "job", "node"} {
		if !slices.ContainsFunc(d.Templating.List, func(v menu) bool { return v.Name == want }) {
			t.Errorf("no variable %s", want)
		}
	}
}

// TestDashboardLegends: a legend can only name labels that the expression leaves.
func TestDashboardLegends(t *testing.T) {
	label := regexp.MustCompile(`{{(\w+)}}`)
	aggregated := regexp.MustCompile(`^(?:[0-9]+ \* )?(?:topk\(10, )?(?:histogram_quantile\([0-9.]+, )?(?:sum|min|max|avg|count)\b`)
	for _, p := range loadDashboard(t).Panels {
		for _, q := range p.Targets {
			_, groups, err := parse(filledIn(t, q.Expr, "1m"))
			if err != nil {
				t.Errorf("panel %q: %v", p.Title, err)
				continue
			}
			var by []string
			for _, g := range groups {
				by = append(by, g.labels...)
			}
			for _, m := range label.FindAllStringSubmatch(q.LegendFormat, -1) {
				if aggregated.MatchString(q.Expr) && !slices.Contains(by, m[1]) {
					t.Errorf("panel %q: legend %q, but %s leaves only %v", p.Title, q.LegendFormat, q.Expr, by)
				}
			}
		}
	}
}

// TestDashboardIsGenerated: the JSON is what the generator prints.
func TestDashboardIsGenerated(t *testing.T) {
	var want bytes.Buffer
	if err := grafana.Write(&want); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("deploy/grafana/dstack-gw.json is not what package grafana writes: run\n\tgo generate ./deploy/grafana")
	}
}

func TestRules(t *testing.T) {
	sections := runbook(t)
	seen := map[string]bool{}
	for _, r := range alerts(t) {
		name := r.Alert
		if name == "" || !strings.HasPrefix(name, "DstackGateway") || seen[name] {
			t.Errorf("alert %q %q: no name of its own that begins with DstackGateway", name, r.Record)
		}
		seen[name] = true
		if s := r.Labels["severity"]; s != "critical" && s != "warning" {
			t.Errorf("%s: severity %q", name, s)
		}
		for _, a := range []string{"summary", "description"} {
			if len(r.Annotations[a]) < 20 {
				t.Errorf("%s: %s %q", name, a, r.Annotations[a])
			}
		}
		if want := runbookURL + "#" + strings.ToLower(name); r.Annotations["runbook_url"] != want {
			t.Errorf("%s: runbook_url %q, want %q", name, r.Annotations["runbook_url"], want)
		}
		s, ok := sections[name]
		if !ok {
			t.Errorf("%s has no section in docs/operations.md", name)
			continue
		}
		// The section begins with severity and patience, so that they cannot drift.
		wait := "at once"
		if r.For != "" {
			wait = "after " + r.For
		}
		if want := fmt.Sprintf("*%s, %s.*", r.Labels["severity"], wait); !strings.HasPrefix(s, want) {
			t.Errorf("%s: its section in docs/operations.md begins %.40q, want %q", name, s, want)
		}
		for _, want := range []string{"**Means**", "**Look**", "**Do**"} {
			if !strings.Contains(s, want) {
				t.Errorf("%s: its section in docs/operations.md has no %s", name, want)
			}
		}
	}
	for name := range sections {
		if strings.HasPrefix(name, "DstackGateway") && !seen[name] {
			t.Errorf("docs/operations.md explains %s, which is no alert", name)
		}
	}
}

// runbook splits docs/operations.md at its headings.
func runbook(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(runbookFile)
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, part := range strings.Split("\n"+string(text), "\n#")[1:] {
		title, body, _ := strings.Cut(part, "\n")
		title = strings.TrimSpace(strings.TrimLeft(title, "#"))
		if _, twice := sections[title]; twice {
			t.Errorf("docs/operations.md has two headings %q: links to the second go to the first", title)
		}
		sections[title] = strings.TrimSpace(body)
	}
	return sections
}

// TestRunbookLinks: links within docs/operations.md lead to headings.
func TestRunbookLinks(t *testing.T) {
	text, err := os.ReadFile(runbookFile)
	if err != nil {
		t.Fatal(err)
	}
	anchors := map[string]bool{}
	for title := range runbook(t) {
		a := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(title), "")
		anchors[strings.ReplaceAll(a, " ", "-")] = true
	}
	for _, m := range regexp.MustCompile(`\]\(([^)]*)\)`).FindAllStringSubmatch(string(text), -1) {
		switch target := m[1]; {
		case strings.HasPrefix(target, "#"):
			if !anchors[target[1:]] {
				t.Errorf("no heading for %s", target)
			}
		case strings.HasPrefix(target, "https://"):
		default:
			if _, err := os.Stat("../../docs/" + target); err != nil {
				t.Errorf("link %s: %v", target, err)
			}
		}
	}
}
