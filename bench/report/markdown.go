package report

import (
	"fmt"
	"math"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/stats"
)

// Markdown renders the environment, one table a case, and the effective configurations.
func (r *Report) Markdown() string {
	var b strings.Builder
	b.WriteString("# Bench results\n\n")
	if r.Interrupted {
		b.WriteString("**Interrupted: not all rounds were run.**\n\n")
	}
	for _, f := range r.Environment {
		fmt.Fprintf(&b, "* %s: %s\n", f.Name, escape(f.Value))
	}
	fmt.Fprintf(&b, "\nMedian of %d interleaved rounds with [smallest, largest]; x = ratio within a round, median. CPU is the whole machine's\n"+
		"(client and backend included) without processes outside the bench; *process* CPU is the gateway's process tree.\n", r.Rounds)
	r.bars(&b)
	for _, c := range r.Cases {
		r.table(&b, c)
	}
	b.WriteString("\n## Contestants\n")
	for _, a := range r.Arms {
		fmt.Fprintf(&b, "\n### %s\n%s\n\n```\n%s\n```\n", a.Name, escape(a.Version), strings.TrimRight(a.Config, "\n"))
	}
	return b.String()
}

func (r *Report) table(b *strings.Builder, c Case) {
	head := []string{"arm"}
	for _, m := range c.Metrics {
		head = append(head, m.Title)
		for _, base := range r.columns(c, m) {
			if m.Signed {
				head = append(head, "above "+base)
			} else {
				head = append(head, "x "+base)
			}
		}
	}
	fmt.Fprintf(b, "\n## %s: %s\n\n| %s | |\n|%s---|\n", c.Name, c.Title, strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	for _, a := range r.Arms {
		row := []string{a.Name}
		for _, m := range c.Metrics {
			row = append(row, summary(r.Summary(c.Name, a.Name, m.Key)))
			for _, base := range r.columns(c, m) {
				if m.Signed {
					row = append(row, above(r.Summary(c.Name, a.Name, m.Key), r.Summary(c.Name, base, m.Key)))
				} else {
					row = append(row, ratio(r.Ratio(c.Name, a.Name, base, m.Key)))
				}
			}
		}
		fmt.Fprintf(b, "| %s | %s |\n", strings.Join(row, " | "), escape(r.note(c.Name, a.Name)))
	}
}

// columns returns the arms a metric of a case is compared with in the table. Differences are taken to L3 only.
func (r *Report) columns(c Case, m Metric) []string {
	var out []string
	for _, base := range r.bases() {
		if m.Compare && (!m.Signed || base == "l3") && len(r.values(c.Name, base, m.Key)) > 0 {
			out = append(out, base)
		}
	}
	return out
}

func above(a, base stats.Summary) string {
	if a.N == 0 || base.N == 0 {
		return "-"
	}
	return number(a.Median - base.Median)
}

func summary(s stats.Summary) string {
	switch {
	case s.N == 0:
		return "-"
	case s.N == 1 || s.Min == s.Max:
		return number(s.Median)
	}
	return fmt.Sprintf("%s [%s, %s]", number(s.Median), number(s.Min), number(s.Max))
}

func ratio(s stats.Summary) string {
	if s.N == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", s.Median)
}

// number prints three significant digits, and all digits left of the point.
func number(v float64) string {
	a := math.Abs(v)
	switch {
	case a >= 99.95 || v == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case a >= 0.9995:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// escape keeps a text inside one table cell.
func escape(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return strings.ReplaceAll(s, "|", "\\|")
}
