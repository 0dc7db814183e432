package config

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"regexp"
	"slices"
	"strings"
)

// Levels beside those of slog.
const (
	LevelTrace = slog.Level(-8)            // below debug
	LevelOff   = slog.Level(math.MaxInt32) // above everything
)

// TargetKey is the attribute that names the part of the program a record comes from, such as "certs" or "proxy".
const TargetKey = "target"

// LogFilter decides by target and level which records are logged. It does not change after ParseLogFilter.
type LogFilter struct {
	directives []directive // longest target first
	lowest     slog.Level  // what the most talkative directive lets through
	message    *regexp.Regexp
}

type directive struct {
	target string // prefix of the targets it is for; "" = all
	level  slog.Level
}

// ParseLogFilter reads the grammar of RUST_LOG: directives separated by commas, each a level ("info"), a target ("certs",
// everything of it) or target=level ("certs=debug"), and behind a slash a regular expression that messages must match.
// Levels are off, error, warn, info, debug, trace in any case. A directive is for all targets that begin with its target; the longest
// one decides, the last one of equals. An empty text means info. Directives that cannot be read are skipped and returned
// as complaints: a daemon should not stay down because of them.
//
// Files written for upstream name its crate: "dstack_gateway" is the whole program here, "dstack_gateway::x" the target "x".
func ParseLogFilter(text string) (f *LogFilter, complaints []string) {
	f = &LogFilter{}
	list, expression, hasExpression := strings.Cut(text, "/")
	if hasExpression {
		re, err := regexp.Compile(strings.TrimSpace(expression))
		if err != nil {
			complaints = append(complaints, fmt.Sprintf("RUST_LOG: the expression behind / is skipped: %v", err))
		} else {
			f.message = re
		}
	}
	for d := range strings.SplitSeq(list, ",") {
		if d = strings.TrimSpace(d); d == "" {
			continue
		}
		parsed, ok := parseDirective(d)
		if !ok {
			complaints = append(complaints, fmt.Sprintf("RUST_LOG: %q is skipped: want a level (off, error, warn, info, debug, trace), a target, or target=level", d))
			continue
		}
		f.directives = slices.DeleteFunc(f.directives, func(o directive) bool { return o.target == parsed.target })
		f.directives = append(f.directives, parsed)
	}
	if len(f.directives) == 0 {
		f.directives = []directive{{level: slog.LevelInfo}}
	}
	slices.SortStableFunc(f.directives, func(a, b directive) int { return len(b.target) - len(a.target) })
	f.lowest = LevelOff
	for _, d := range f.directives {
		f.lowest = min(f.lowest, d.level)
	}
	return f, complaints
}

func parseDirective(text string) (directive, bool) {
	target, level, hasLevel := strings.Cut(text, "=")
	target, level = strings.TrimSpace(target), strings.TrimSpace(level)
	if !hasLevel {
		if l, ok := parseLevel(text); ok {
			return directive{level: l}, true
		}
		level = ""
	}
	d := directive{target: normalTarget(target), level: LevelTrace}
	if strings.ContainsAny(target, "[]{}\" ") || target == "" {
		return d, false // spans and fields of upstream's tracing have no counterpart
	}
	if level == "" {
		return d, true
	}
	var ok bool
	d.level, ok = parseLevel(level)
	return d, ok
}

func parseLevel(text string) (slog.Level, bool) {
	switch strings.ToLower(text) {
	case "off":
		return LevelOff, true
	case "error":
		return slog.LevelError, true
	case "warn":
		return slog.LevelWarn, true
	case "info":
		return slog.LevelInfo, true
	case "debug":
		return slog.LevelDebug, true
	case "trace":
		return LevelTrace, true
	}
	return 0, false
}

// normalTarget makes one notation of the two: "dstack_gateway::proxy::io" is "proxy.io".
func normalTarget(target string) string {
	target = strings.ReplaceAll(target, "::", ".")
	for _, program := range []string{"dstack_gateway", "dstack_gw"} {
		if rest, ok := strings.CutPrefix(target, program); ok && (rest == "" || rest[0] == '.') {
			return strings.TrimPrefix(rest, ".")
		}
	}
	return target
}

// Level is the least severe level that is logged for a target.
func (f *LogFilter) Level(target string) slog.Level {
	for _, d := range f.directives {
		if strings.HasPrefix(target, d.target) {
			return d.level
		}
	}
	return LevelOff // as env-logger: what no directive names is silent
}

// Enabled says whether a record of the target and level is logged.
func (f *LogFilter) Enabled(target string, level slog.Level) bool {
	return level >= f.Level(target)
}

// Handler puts the filter before next. The target of a record is the attribute TargetKey given to With, else its own one,
// else the names of the groups (joined with dots). next decides no levels of its own: give it LevelTrace.
func (f *LogFilter) Handler(next slog.Handler) slog.Handler {
	return &filterHandler{filter: f, next: next}
}

type filterHandler struct {
	filter *LogFilter
	next   slog.Handler
	target string
	named  bool // target was given as an attribute, groups no longer count
}

// Enabled lets through what Handle may want: a record can still name a target of its own.
func (h *filterHandler) Enabled(ctx context.Context, level slog.Level) bool {
	least := h.filter.lowest
	if h.named {
		least = h.filter.Level(h.target)
	}
	return level >= least && h.next.Enabled(ctx, level)
}

func (h *filterHandler) Handle(ctx context.Context, r slog.Record) error {
	target := h.target
	if !h.named {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key != TargetKey {
				return true
			}
			target = a.Value.String()
			return false
		})
	}
	if !h.filter.Enabled(target, r.Level) {
		return nil
	}
	if h.filter.message != nil && !h.filter.message.MatchString(r.Message) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

func (h *filterHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.next = h.next.WithAttrs(attrs)
	for _, a := range attrs {
		if a.Key == TargetKey {
			c.target, c.named = a.Value.String(), true
		}
	}
	return &c
}

func (h *filterHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.next = h.next.WithGroup(name)
	if !c.named {
		c.target = strings.TrimPrefix(h.target+"."+name, ".")
	}
	return &c
}
