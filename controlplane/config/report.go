package config

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Kind says what a Warning is about, so that callers can be stricter about some.
type Kind string

const (
	// Unknown is a key that no version has ever known. `config check` treats it as an error.
	Unknown Kind = "unknown"
	// Legacy is a key of an older upstream version, or one that this gateway gives no meaning.
	Legacy Kind = "legacy"
	// Insecure is a setting that gives up protection.
	Insecure Kind = "insecure"
	// Suspicious is a setting that loads but probably does not do what was meant.
	Suspicious Kind = "suspicious"
	// Unavailable is a key of a later release.
	Unavailable Kind = "unavailable"
)

// Warning is something the operator should know about a configuration that nevertheless loads.
type Warning struct {
	Kind Kind
	Key  string // dotted path, "" for a whole file
	File string // "" when no file is to blame
	Line int    // 1-based, 0 = not known
	Text string
}

// String is one line: place, key, text.
func (w Warning) String() string { return place(w.File, w.Line, w.Key) + w.Text }

// Problem is a reason why a configuration does not load. Load returns all of them, joined.
type Problem struct {
	Key  string
	File string
	Line int
	Err  error
}

func (p *Problem) Error() string { return place(p.File, p.Line, p.Key) + p.Err.Error() }

func (p *Problem) Unwrap() error { return p.Err }

func place(file string, line int, key string) string {
	var b strings.Builder
	if file != "" {
		b.WriteString(file)
		if line > 0 {
			b.WriteString(":" + strconv.Itoa(line))
		}
		b.WriteString(": ")
	}
	if key != "" {
		b.WriteString(key + ": ")
	}
	return b.String()
}

// WriteCheck renders what Load returned for `config check`, one line each, and says whether the configuration passes.
// Unknown keys are warnings for a daemon, which must keep old files working; a check is there to find them, so they fail it.
func WriteCheck(w io.Writer, warnings []Warning, loadErr error) (ok bool, err error) {
	var b strings.Builder
	failed, warned := 0, 0
	for _, e := range problems(loadErr) {
		failed++
		fmt.Fprintf(&b, "error: %v\n", e)
	}
	for _, warning := range warnings {
		word := "warning"
		if warning.Kind == Unknown {
			word = "error"
			failed++
		} else {
			warned++
		}
		fmt.Fprintf(&b, "%s: %s [%s]\n", word, warning, warning.Kind)
	}
	verdict := "ok"
	if failed > 0 {
		verdict = "not ok"
	}
	fmt.Fprintf(&b, "configuration %s, errors: %d, warnings: %d\n", verdict, failed, warned)
	_, err = io.WriteString(w, b.String())
	return failed == 0, err
}

// problems takes a joined error apart again.
func problems(err error) []error {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var all []error
		for _, e := range joined.Unwrap() {
			all = append(all, problems(e)...)
		}
		return all
	}
	return []error{err}
}

// Errors of which upstream's tests or scripts know the text.
var (
	ErrReservedNetOutside = errors.New("Reserved net is not in the network")
	ErrIPNotReserved      = errors.New("Wg peer IP is not in the reserved net")
	ErrClientRangeOutside = errors.New("Client IP range is not in the network")
	ErrNodeID             = errors.New("node_id must be greater than 0")
)
