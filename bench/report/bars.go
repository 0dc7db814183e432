package report

import (
	"fmt"
	"strings"
)

// Bar is a goal: a metric of one arm against that of another, or against a number.
type Bar struct {
	Case   string `json:"case"`
	Arm    string `json:"arm"`
	Metric string `json:"metric"`
	// Base is the arm the ratio is taken to; "" compares the metric itself.
	Base string `json:"base,omitempty"`
	// Above makes the median of Arm minus that of Base count instead of the ratio.
	Above  bool    `json:"above,omitempty"`
	Limit  float64 `json:"limit"`
	AtMost bool    `json:"at_most,omitempty"` // otherwise at least
}

// Verdict on a bar.
type Verdict string

// Verdicts. Close says that the median and one of the rounds fall on different sides of the limit.
const (
	Met       Verdict = "met"
	MetClose  Verdict = "met, not in all rounds"
	Missed    Verdict = "MISSED"
	MissClose Verdict = "missed, not in all rounds"
	Unknown   Verdict = "not measured"
)

// Judge returns the measured value of a bar, as text, and the verdict.
func (r *Report) Judge(b Bar) (string, Verdict) {
	s := r.Summary(b.Case, b.Arm, b.Metric)
	switch {
	case b.Base == "":
	case b.Above:
		base := r.Summary(b.Case, b.Base, b.Metric)
		if base.N == 0 {
			s.N = 0
		}
		s.Median -= base.Median
		s.Min -= base.Max
		s.Max -= base.Min
	default:
		s = r.Ratio(b.Case, b.Arm, b.Base, b.Metric)
	}
	if s.N == 0 {
		return "-", Unknown
	}
	ok := func(v float64) bool { return v == b.Limit || (v < b.Limit) == b.AtMost }
	text := summary(s)
	switch {
	case ok(s.Median) && ok(s.Min) && ok(s.Max):
		return text, Met
	case ok(s.Median):
		return text, MetClose
	case !ok(s.Min) && !ok(s.Max):
		return text, Missed
	}
	return text, MissClose
}

// bars renders the table of goals whose arms took part.
func (r *Report) bars(b *strings.Builder) {
	if len(r.Bars) == 0 {
		return
	}
	b.WriteString("\n## Goals\n\n| case | arm | metric | goal | measured | |\n|---|---|---|---|---|---|\n")
	for _, bar := range r.Bars {
		goal := "at least "
		if bar.AtMost {
			goal = "at most "
		}
		switch {
		case bar.Base == "":
			goal += number(bar.Limit)
		case bar.Above:
			goal += number(bar.Limit) + " above " + bar.Base
		default:
			goal += fmt.Sprintf("%.2f x %s", bar.Limit, bar.Base)
		}
		value, verdict := r.Judge(bar)
		fmt.Fprintf(b, "| %s | %s | %s | %s | %s | %s |\n", bar.Case, bar.Arm, r.title(bar.Case, bar.Metric), goal, value, verdict)
	}
}

func (r *Report) title(name, key string) string {
	for _, c := range r.Cases {
		for _, m := range c.Metrics {
			if c.Name == name && m.Key == key {
				return m.Title
			}
		}
	}
	return key
}
