package config

import "strings"

// nearest finds the known path that a mistyped one most likely meant; "" when nothing is close.
// A name in the same table counts before the same name in another table, and that before a misspelt one elsewhere.
func nearest(path string, known []string) string {
	parent, name := split(path)
	best, bestDistance := "", max(1, len(name)/3)+1
	for _, k := range known {
		if p, n := split(k); p == parent {
			if d := distance(name, n); d < bestDistance {
				best, bestDistance = k, d
			}
		}
	}
	if best != "" {
		return best
	}
	for _, k := range known {
		if _, n := split(k); n == name {
			if best != "" {
				best = ""
				break
			}
			best = k
		}
	}
	if best != "" {
		return best
	}
	bestDistance = max(1, len(path)/6) + 1
	for _, k := range known {
		if d := distance(path, k); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// split parts a dotted path before its last name.
func split(path string) (parent, name string) {
	i := strings.LastIndexByte(path, '.')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}

// distance counts the insertions, deletions, replacements and swaps of neighbours between two strings
// (optimal string alignment). Case and the choice of "-" or "_" cost nothing.
func distance(a, b string) int {
	fold := strings.NewReplacer("-", "_")
	a, b = fold.Replace(strings.ToLower(a)), fold.Replace(strings.ToLower(b))
	before, above, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range above {
		above[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			replace := above[j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			row[j] = min(above[j]+1, row[j-1]+1, replace)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, above, row = above, row, before
	}
	return above[len(b)]
}
