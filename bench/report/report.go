package report

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/dstack-gw/dstack-gw/bench/load"
	"github.com/dstack-gw/dstack-gw/bench/stats"
)

// Metric describes one number of a case.
type Metric struct {
	Key   string `json:"key"`
	Title string `json:"title"` // with its unit
	// Compare asks for ratios and a chart.
	Compare bool `json:"compare,omitempty"`
	// Higher says that more is better.
	Higher bool `json:"higher,omitempty"`
	// Signed metrics are differences and may be negative; ratios of them mean nothing.
	Signed bool `json:"signed,omitempty"`
}

// Case describes what was measured.
type Case struct {
	Name    string   `json:"name"`
	Group   string   `json:"group"` // cases of a group share a chart
	Title   string   `json:"title"`
	Metrics []Metric `json:"metrics"`
}

// Cell is one case of one arm in one round.
type Cell struct {
	Case  string `json:"case"`
	Arm   string `json:"arm"`
	Round int    `json:"round"`
	// Lacks says why the arm cannot do the case, Error why it failed.
	Lacks string `json:"lacks,omitempty"`
	Error string `json:"error,omitempty"`
	// Noisy says that processes outside the bench took more of the machine than the run allows.
	Noisy   bool               `json:"noisy,omitempty"`
	Metrics map[string]float64 `json:"metrics,omitempty"`
	Windows []load.Window      `json:"windows,omitempty"`
	Facts   map[string]string  `json:"facts,omitempty"`
}

// Set sets a metric. What is not a finite number was not measured and is left out: JSON has no word for it.
func (c *Cell) Set(key string, v float64) {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return
	}
	if c.Metrics == nil {
		c.Metrics = map[string]float64{}
	}
	c.Metrics[key] = v
}

// Arm describes a contestant.
type Arm struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Config  string `json:"config"`
}

// Report is a whole run.
type Report struct {
	Environment []Fact  `json:"environment"`
	Rounds      int     `json:"rounds"`
	Interrupted bool    `json:"interrupted,omitempty"`
	NoiseLimit  float64 `json:"noise_limit"` // share of the machine, 0 to 1
	Arms        []Arm   `json:"arms"`
	Cases       []Case  `json:"cases"`
	Bars        []Bar   `json:"bars,omitempty"`
	Cells       []Cell  `json:"cells"`
}

// Fact is a named line of the environment.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Failed returns the cells that failed.
func (r *Report) Failed() []Cell {
	var out []Cell
	for _, c := range r.Cells {
		if c.Error != "" {
			out = append(out, c)
		}
	}
	return out
}

// JSON renders everything.
func (r *Report) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return nil, fmt.Errorf("rendering the report: %w", err)
	}
	return append(b, '\n'), nil
}

// values returns a metric of one arm and case by round.
func (r *Report) values(name, arm, key string) map[int]float64 {
	out := map[int]float64{}
	for _, c := range r.Cells {
		if c.Case != name || c.Arm != arm || c.Error != "" || c.Lacks != "" {
			continue
		}
		if v, ok := c.Metrics[key]; ok {
			out[c.Round] = v
		}
	}
	return out
}

// Summary condenses a metric of one arm over the rounds.
func (r *Report) Summary(name, arm, key string) stats.Summary {
	var v []float64
	for _, x := range r.values(name, arm, key) {
		v = append(v, x)
	}
	return stats.Summarize(v)
}

// Ratio condenses a metric of arm divided by that of base, round by round.
func (r *Report) Ratio(name, arm, base, key string) stats.Summary {
	return stats.Ratio(r.values(name, arm, key), r.values(name, base, key))
}

// note says what happened to an arm in a case besides numbers: "" , why it lacks it, or how often it failed.
func (r *Report) note(name, arm string) string {
	failed, noisy, text := 0, 0, ""
	for _, c := range r.Cells {
		switch {
		case c.Case != name || c.Arm != arm:
		case c.Lacks != "":
			return "n/a: " + c.Lacks
		case c.Error != "":
			failed++
			text = c.Error
		case c.Noisy:
			noisy++
		}
	}
	switch {
	case failed > 0:
		return fmt.Sprintf("FAILED in %d rounds: %s", failed, text)
	case noisy > 0:
		return fmt.Sprintf("%d rounds disturbed", noisy)
	}
	return ""
}

// bases are the arms others are compared with, those of them that took part.
func (r *Report) bases() []string {
	var out []string
	for _, want := range []string{"l3", "haproxy", "haproxy-splice"} {
		if slices.ContainsFunc(r.Arms, func(a Arm) bool { return a.Name == want }) {
			out = append(out, want)
		}
	}
	return out
}
