package config

import (
	"fmt"
	"math"
	"strconv"
	"time"
)

// Duration is a time span in whole seconds, as configuration files and stored records write it (gateway spec 1.3).
type Duration uint64

// Never is the word "never": a limit that does not fire.
const Never Duration = math.MaxUint64

// Units, for writing constants: 5*Minute.
const (
	Second Duration = 1
	Minute          = 60 * Second
	Hour            = 60 * Minute
	Day             = 24 * Hour
)

// durationUnits goes from the largest to the smallest, the order in which String tries them.
var durationUnits = []struct {
	suffix byte
	size   Duration
}{{'d', Day}, {'h', Hour}, {'m', Minute}, {'s', Second}}

// ParseDuration reads a decimal number with one unit of s, m, h, d, or "never". There are no fractions, no smaller units,
// no spaces and no combinations; a span of more seconds than 64 bits hold is an error.
func ParseDuration(s string) (Duration, error) {
	if s == "never" {
		return Never, nil
	}
	fail := func(why string) (Duration, error) {
		return 0, fmt.Errorf("invalid duration %q: %s (write a whole number and one of s, m, h, d, as in \"30s\", or \"never\")", s, why)
	}
	if s == "" {
		return fail("it is empty")
	}
	number, suffix := s[:len(s)-1], s[len(s)-1]
	for _, u := range durationUnits {
		if u.suffix != suffix {
			continue
		}
		if !isDecimal(number) {
			return fail("the part before the unit is not a whole number")
		}
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil || n > uint64(Never/u.size) {
			return fail("it is too long")
		}
		return Duration(n) * u.size, nil
	}
	return fail("it has no known unit")
}

// String renders the span in the largest unit that divides it: 300 s is "5m", zero is "0d".
func (d Duration) String() string {
	if d == Never {
		return "never"
	}
	for _, u := range durationUnits {
		if d%u.size == 0 {
			return strconv.FormatUint(uint64(d/u.size), 10) + string(u.suffix)
		}
	}
	panic("unreachable: every span is divisible by one second")
}

// Std is the span for package time. What does not fit (292 years) becomes the longest time.Duration.
func (d Duration) Std() time.Duration {
	if d > math.MaxInt64/Duration(time.Second) {
		return math.MaxInt64
	}
	return time.Duration(d) * time.Second
}

// MarshalText renders like String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads like ParseDuration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := ParseDuration(string(text))
	if err == nil {
		*d = v
	}
	return err
}

// isDecimal says that s is one or more ASCII digits. strconv alone would let a sign through.
func isDecimal(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}
