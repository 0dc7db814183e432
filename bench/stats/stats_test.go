package stats

import (
	"math"
	"testing"
)

func TestPercentile(t *testing.T) {
	ten := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	for _, c := range []struct {
		v    []int64
		p    float64
		want float64
	}{
		{ten, 0, 1}, {ten, 0.1, 1}, {ten, 0.11, 2}, {ten, 0.5, 5}, {ten, 0.51, 6}, {ten, 0.99, 10}, {ten, 1, 10}, {[]int64{7}, 0.99, 7},
	} {
		if got := Percentile(c.v, c.p); got != c.want {
			t.Errorf("Percentile(%v, %v) = %v, want %v", c.v, c.p, got, c.want)
		}
	}
	if got := Percentile([]int64(nil), 0.5); !math.IsNaN(got) {
		t.Errorf("of nothing: %v", got)
	}
}

func TestSummarize(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want Summary
	}{
		{nil, Summary{}},
		{[]float64{math.NaN()}, Summary{}},
		{[]float64{3}, Summary{3, 3, 3, 1}},
		{[]float64{9, 1, 5}, Summary{5, 1, 9, 3}},
		{[]float64{4, 1, 3, 2, math.NaN()}, Summary{2.5, 1, 4, 4}},
	} {
		if got := Summarize(c.v); got != c.want {
			t.Errorf("Summarize(%v) = %+v, want %+v", c.v, got, c.want)
		}
	}
	v := []float64{3, 1, 2}
	Summarize(v)
	if v[0] != 3 {
		t.Error("input was reordered")
	}
}

// A machine that halves its speed in round 1 must not move the ratio.
func TestRatio(t *testing.T) {
	a := map[int]float64{0: 10, 1: 5, 2: 11, 5: 99}
	b := map[int]float64{0: 20, 1: 10, 2: 20, 3: 7, 5: 0}
	if got, want := Ratio(a, b), (Summary{0.5, 0.5, 0.55, 3}); math.Abs(got.Max-want.Max) > 1e-12 || got.Median != want.Median || got.Min != want.Min || got.N != want.N {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := Ratio(a, nil); got.N != 0 {
		t.Errorf("without reference: %+v", got)
	}
}
