package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes.
type Size uint64

// sizeUnits goes from the largest to the smallest; the binary ones come first so that String prefers them.
var sizeUnits = []struct {
	suffix string
	bytes  Size
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3},
	{"B", 1},
}

// ParseSize reads a whole number of bytes or one with a unit: "10MiB", "64 KiB", "2GB", "512". Upper and lower case mean the same.
func ParseSize(s string) (Size, error) {
	text := strings.TrimSpace(s)
	digits := strings.TrimLeft(text, "0123456789")
	number, unit := text[:len(text)-len(digits)], strings.TrimSpace(digits)
	if unit == "" {
		unit = "B"
	}
	for _, u := range sizeUnits {
		if !strings.EqualFold(u.suffix, unit) {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil || n > math.MaxUint64/uint64(u.bytes) {
			break
		}
		return Size(n) * u.bytes, nil
	}
	return 0, fmt.Errorf("invalid size %q: want a whole number of bytes or one with a unit, as in \"10MiB\"", s)
}

// String is the number in the largest binary unit that divides it, as in "10MiB"; "0" for zero.
func (s Size) String() string {
	if s == 0 {
		return "0"
	}
	for _, u := range sizeUnits[:4] {
		if s%u.bytes == 0 {
			return strconv.FormatUint(uint64(s/u.bytes), 10) + u.suffix
		}
	}
	return strconv.FormatUint(uint64(s), 10)
}

// Int64 is the size for interfaces that count in int64; what does not fit becomes the largest.
func (s Size) Int64() int64 {
	if s > math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(s)
}
