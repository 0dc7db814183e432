package report

import (
	"fmt"
	"math"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/stats"
)

// Chart is a bar chart: one cluster a case, one bar an arm, the median with a whisker from the smallest to the
// largest round.
type Chart struct {
	Name  string // file name without suffix
	Title string
	Arms  []string
	Cases []string
	Bars  map[string]map[string]stats.Summary // by case, then arm
}

// Charts returns the charts of all groups and compared metrics that have values.
func (r *Report) Charts() []Chart {
	var out []Chart
	index := map[string]int{}
	for _, c := range r.Cases {
		for _, m := range c.Metrics {
			if !m.Compare {
				continue
			}
			bars := map[string]stats.Summary{}
			for _, a := range r.Arms {
				if s := r.Summary(c.Name, a.Name, m.Key); s.N > 0 {
					bars[a.Name] = s
				}
			}
			if len(bars) == 0 {
				continue
			}
			id := c.Group + " " + m.Key
			i, ok := index[id]
			if !ok {
				i = len(out)
				index[id] = i
				better := "less is better"
				if m.Higher {
					better = "more is better"
				}
				out = append(out, Chart{
					Name:  slug(id),
					Title: fmt.Sprintf("%s: %s (%s)", c.Group, m.Title, better),
					Bars:  map[string]map[string]stats.Summary{},
				})
			}
			out[i].Cases = append(out[i].Cases, c.Name)
			out[i].Bars[c.Name] = bars
		}
	}
	for i := range out {
		for _, a := range r.Arms {
			for _, bars := range out[i].Bars {
				if _, ok := bars[a.Name]; ok {
					out[i].Arms = append(out[i].Arms, a.Name)
					break
				}
			}
		}
	}
	return out
}

// slug makes a file name of a text.
func slug(s string) string {
	return strings.Join(strings.FieldsFunc(strings.ToLower(s), func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9')
	}), "-")
}

// Sizes of a chart in pixels.
const (
	barHeight = 16
	barGap    = 3
	groupGap  = 16
	labelLeft = 190
	plotWidth = 480
	valueRoom = 130
	headRoom  = 46
	footRoom  = 14
)

// palette holds one colour an arm, readable on white and on dark backgrounds and for most colour-blind eyes.
var palette = []string{"#7f7f7f", "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#b0a000"}

// SVG draws the chart.
func (c Chart) SVG() string {
	most := 0.0
	for _, bars := range c.Bars {
		for _, s := range bars {
			most = math.Max(most, s.Max)
		}
	}
	if most <= 0 {
		most = 1
	}
	x := func(v float64) float64 { return labelLeft + math.Max(0, v)/most*plotWidth }
	colour := map[string]string{}
	for i, a := range c.Arms {
		colour[a] = palette[i%len(palette)]
	}

	var body strings.Builder
	y := headRoom
	for _, name := range c.Cases {
		rows := 0
		for _, a := range c.Arms {
			if _, ok := c.Bars[name][a]; ok {
				rows++
			}
		}
		fmt.Fprintf(&body, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n",
			labelLeft-8, y+(rows*(barHeight+barGap)-barGap)/2+4, markup(name))
		for _, a := range c.Arms {
			s, ok := c.Bars[name][a]
			if !ok {
				continue
			}
			mid := float64(y) + barHeight/2
			fmt.Fprintf(&body, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"><title>%s, %s: %s</title></rect>`+"\n",
				labelLeft, y, x(s.Median)-labelLeft, barHeight, colour[a], markup(name), markup(a), markup(summary(s)))
			if s.N > 1 {
				fmt.Fprintf(&body, `<path d="M%.1f %.1fH%.1fM%.1f %.1fv6M%.1f %.1fv6" stroke="#333" fill="none"/>`+"\n",
					x(s.Min), mid, x(s.Max), x(s.Min), mid-3, x(s.Max), mid-3)
			}
			fmt.Fprintf(&body, `<text x="%.1f" y="%.1f">%s</text>`+"\n", x(s.Max)+6, mid+4, number(s.Median))
			y += barHeight + barGap
		}
		y += groupGap
	}
	height, width := y-groupGap+footRoom, labelLeft+plotWidth+valueRoom

	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n",
		width, height, width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	fmt.Fprintf(&b, `<text x="8" y="16" font-size="14" font-weight="bold">%s</text>`+"\n", markup(c.Title))
	at := 8
	for _, a := range c.Arms {
		fmt.Fprintf(&b, `<rect x="%d" y="25" width="11" height="11" fill="%s"/><text x="%d" y="35">%s</text>`+"\n", at, colour[a], at+15, markup(a))
		at += 30 + 7*len(a)
	}
	b.WriteString(body.String())
	b.WriteString("</svg>\n")
	return b.String()
}

var markupEscapes = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;")

func markup(s string) string { return markupEscapes.Replace(s) }
