package stats

import (
	"math"
	"slices"
)

// Percentile returns the value below or at which the share p (0 to 1) of sorted lies, by the nearest-rank method;
// NaN for no values. sorted must be ascending.
func Percentile[T ~int64 | ~uint32 | ~float64](sorted []T, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	i := int(math.Ceil(p*float64(len(sorted)))) - 1
	return float64(sorted[min(max(i, 0), len(sorted)-1)])
}

// Summary is the median of some runs with the smallest and the largest of them.
type Summary struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	N      int     `json:"n"`
}

// Summarize returns the summary of v; with an even count the median is the mean of the middle two. N is 0 and the
// rest NaN-free zero for no values. NaN values are left out.
func Summarize(v []float64) Summary {
	s := slices.DeleteFunc(slices.Clone(v), math.IsNaN)
	if len(s) == 0 {
		return Summary{}
	}
	slices.Sort(s)
	mid := len(s) / 2
	m := s[mid]
	if len(s)%2 == 0 {
		m = (s[mid-1] + s[mid]) / 2
	}
	return Summary{Median: m, Min: s[0], Max: s[len(s)-1], N: len(s)}
}

// Ratio returns the summary of a/b taken round by round: rounds that lie next to each other in time share the
// machine's mood. Rounds missing in either map, or with b at 0, are left out.
func Ratio(a, b map[int]float64) Summary {
	var r []float64
	for round, x := range a {
		if y, ok := b[round]; ok && y != 0 {
			r = append(r, x/y)
		}
	}
	return Summarize(r)
}
