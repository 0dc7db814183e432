package monitoring

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// selector is one series selector of an expression.
type selector struct {
	name     string
	text     string // as written, without range and offset
	matchers []matcher
}

type matcher struct{ label, op, value string }

// grouping is a list of labels after by, on, group_left and the like.
type grouping struct {
	keyword string
	labels  []string
}

var (
	aggregators = words("sum min max avg group stddev stdvar count count_values bottomk topk quantile")
	groupings   = words("by without on ignoring group_left group_right")
	operators   = words("and or unless atan2 bool offset")
	constants   = words("inf nan")

	token = regexp.MustCompile(`(?s)^(?:` + strings.Join([]string{
		`(?P<space>\s+)`,
		`(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|` + "`[^`]*`" + `)`,
		`(?P<number>[0-9][0-9a-zA-Z_.]*)`, // durations too
		`(?P<word>[a-zA-Z_:][a-zA-Z0-9_:]*)`,
		`(?P<compare>==|!=|>=|<=|>|<)`,
		`(?P<match>=~|!~|=)`,
		`(?P<other>[-+*/%^(){}\[\],@])`,
	}, "|") + `)`)
)

func words(list string) map[string]bool {
	m := map[string]bool{}
	for w := range strings.FieldsSeq(list) {
		m[w] = true
	}
	return m
}

type lexeme struct{ kind, text string }

// lex splits an expression. It knows what the expressions of this repository need.
func lex(expr string) (all []lexeme, err error) {
	for rest := expr; rest != ""; {
		m := token.FindStringSubmatch(rest)
		if m == nil {
			return nil, fmt.Errorf("no token at %q in %s", rest, expr)
		}
		for i, name := range token.SubexpNames() {
			if i > 0 && m[i] != "" {
				all = append(all, lexeme{name, m[i]})
			}
		}
		rest = rest[len(m[0]):]
	}
	return all, nil
}

// parse finds the selectors and label lists of an expression.
func parse(expr string) (selectors []selector, groups []grouping, err error) {
	all, err := lex(expr)
	if err != nil {
		return nil, nil, err
	}
	all = slices.DeleteFunc(all, func(l lexeme) bool { return l.kind == "space" })
	at := func(i int) string {
		if i < len(all) {
			return all[i].text
		}
		return ""
	}
	for i := 0; i < len(all); i++ {
		l := all[i]
		switch {
		case l.text == "{":
			return nil, nil, fmt.Errorf("a selector without a name in %s", expr)
		case l.text == "[":
			for at(i) != "]" {
				i++
			}
		case l.kind != "word":
		case groupings[l.text]:
			if at(i+1) != "(" { // group_left without labels
				continue
			}
			g := grouping{keyword: l.text}
			for i += 2; at(i) != ")"; i++ {
				if all[i].kind == "word" {
					g.labels = append(g.labels, at(i))
				}
			}
			groups = append(groups, g)
		case aggregators[l.text] || operators[l.text] || constants[strings.ToLower(l.text)] || at(i+1) == "(":
		default:
			s := selector{name: l.text, text: l.text}
			if at(i+1) == "{" {
				s.text += "{"
				for i += 2; at(i) != "}"; i++ {
					if at(i) == "," {
						s.text += ","
						continue
					}
					m := matcher{at(i), at(i + 1), strings.Trim(at(i+2), `"'`+"`")}
					s.matchers = append(s.matchers, m)
					s.text += at(i) + at(i+1) + at(i+2)
					i += 2
				}
				s.text += "}"
			}
			selectors = append(selectors, s)
		}
	}
	return selectors, groups, nil
}

// asBool makes comparisons answer 0 or 1 instead of dropping series, so that an alert
// that is quiet still returns data.
func asBool(expr string) (string, error) {
	all, err := lex(expr)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	depth := 0
	for i, l := range all {
		switch l.text {
		case "{":
			depth++
		case "}":
			depth--
		}
		b.WriteString(l.text)
		if depth == 0 && l.kind == "compare" && !(i+2 < len(all) && all[i+2].text == "bool") {
			b.WriteString(" bool")
		}
	}
	return b.String(), nil
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		expr   string
		names  []string
		groups []string
		isBool string // "" = unchanged
	}{
		{`up`, []string{`up`}, nil, ""},
		{`up{job=~"a|b",x!="}{"} == 0`, []string{`up{job=~"a|b",x!="}{"}`}, nil, `up{job=~"a|b",x!="}{"} == bool 0`},
		{`sum by (a, b) (rate(x_total{}[5m])) / sum without(c) (y:z:rate5m offset 5m) >= 1e3`, []string{`x_total{}`, `y:z:rate5m`}, []string{"by a,b", "without c"},
			`sum by (a, b) (rate(x_total{}[5m])) / sum without(c) (y:z:rate5m offset 5m) >= bool 1e3`},
		{`a * on (job) group_left (n) b and on() c or vector(0)`, []string{"a", "b", "c"}, []string{"on job", "group_left n", "on "}, ""},
		{`histogram_quantile(0.9, sum by (le) (rate(h_bucket[$__rate_interval])))`, nil, nil, "error"},
		{`topk(10, sum(x)) - time() < 7 * 86400`, []string{"x"}, nil, `topk(10, sum(x)) - time() < bool 7 * 86400`},
		{`x > bool 1`, []string{"x"}, nil, ""},
		{`changes(x[30m]) != Inf`, []string{"x"}, nil, `changes(x[30m]) != bool Inf`},
	} {
		selectors, groups, err := parse(tt.expr)
		if tt.isBool == "error" {
			if err == nil {
				t.Errorf("%s: no error", tt.expr)
			}
			continue
		}
		var names, gs []string
		for _, s := range selectors {
			names = append(names, s.text)
		}
		for _, g := range groups {
			gs = append(gs, g.keyword+" "+strings.Join(g.labels, ","))
		}
		if err != nil || !reflect.DeepEqual(names, tt.names) || !reflect.DeepEqual(gs, tt.groups) {
			t.Errorf("%s: selectors %q, groups %q, error %v; want %q, %q", tt.expr, names, gs, err, tt.names, tt.groups)
		}
		want := tt.isBool
		if want == "" {
			want = tt.expr
		}
		if got, err := asBool(tt.expr); err != nil || got != want {
			t.Errorf("%s as bool: %s, error %v", tt.expr, got, err)
		}
	}
}

// inventory is what a gateway exports: labels and their values by series name.
type inventory map[string]map[string]map[string]bool

// check says what an expression asks for that nothing exports.
func (inv inventory) check(expr string) (complaints []string) {
	selectors, groups, err := parse(expr)
	if err != nil {
		return []string{err.Error()}
	}
	complain := func(format string, a ...any) { complaints = append(complaints, fmt.Sprintf(format, a...)) }
	known := map[string]bool{}
	for _, s := range selectors {
		labels, ok := inv[s.name]
		if !ok {
			complain("nothing exports %s", s.name)
			continue
		}
		for l := range labels {
			known[l] = true
		}
		for _, m := range s.matchers {
			values, ok := labels[m.label]
			switch {
			case !ok:
				complain("%s has no label %s, only %v", s.name, m.label, slices.Sorted(maps.Keys(labels)))
			case m.op == "=" && !values[m.value]:
				complain("%s has no %s=%q, only %v", s.name, m.label, m.value, slices.Sorted(maps.Keys(values)))
			case m.op == "=~":
				// Each alternative has to exist, or a renamed one would go unnoticed.
				for alternative := range strings.SplitSeq(m.value, "|") {
					re, err := regexp.Compile("^(?:" + alternative + ")$")
					if err != nil {
						complain("%s: %v", s.text, err)
					} else if !slices.ContainsFunc(slices.Collect(maps.Keys(values)), re.MatchString) {
						complain("%s has no %s=~%q, only %v", s.name, m.label, alternative, slices.Sorted(maps.Keys(values)))
					}
				}
			}
		}
	}
	for _, g := range groups {
		for _, l := range g.labels {
			if !known[l] {
				complain("%s (%s): no series of the expression has label %s", g.keyword, strings.Join(g.labels, ","), l)
			}
		}
	}
	return complaints
}

func TestInventoryCheck(t *testing.T) {
	set := func(values ...string) map[string]bool {
		m := map[string]bool{}
		for _, v := range values {
			m[v] = true
		}
		return m
	}
	inv := inventory{"x": {"job": set("j"), "reason": set("tls", "dns")}}
	for expr, want := range map[string]string{
		`x`:                              "",
		`x{reason="tls"}`:                "",
		`x{reason=~"tls|dns"}`:           "",
		`sum by (job, reason) (x)`:       "",
		`x{reason!="none"}`:              "",
		`y`:                              "nothing exports y",
		`x{cause="tls"}`:                 "no label cause",
		`x{reason="dsn"}`:                "no reason",
		`x{reason=~"tls|dsn"}`:           "no reason",
		`sum by (cause) (x)`:             "has label cause",
		`x * on (job) group_left (no) x`: "has label no",
		`x / y`:                          "nothing exports y",
	} {
		got := strings.Join(inv.check(expr), "; ")
		if want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
}
