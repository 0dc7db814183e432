package config

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestParseLogFilter(t *testing.T) {
	for _, tt := range []struct {
		text   string
		levels map[string]slog.Level
		bad    int
	}{
		{"", map[string]slog.Level{"": slog.LevelInfo, "certs": slog.LevelInfo}, 0},
		{" , ", map[string]slog.Level{"": slog.LevelInfo}, 0},
		{"debug", map[string]slog.Level{"": slog.LevelDebug, "certs": slog.LevelDebug}, 0},
		{"OFF", map[string]slog.Level{"": LevelOff}, 0},
		{"Trace", map[string]slog.Level{"": LevelTrace}, 0},
		{"info,certbot=debug", map[string]slog.Level{"": slog.LevelInfo, "certbot": slog.LevelDebug, "certbot.acme": slog.LevelDebug, "other": slog.LevelInfo}, 0},
		{"certbot=debug, warn", map[string]slog.Level{"": slog.LevelWarn, "certbot": slog.LevelDebug}, 0},
		{"error,a=warn,a.b=trace,a.b.c=off", map[string]slog.Level{"a": slog.LevelWarn, "a.x": slog.LevelWarn, "a.b": LevelTrace, "a.b.c.d": LevelOff, "z": slog.LevelError}, 0},
		{"certs", map[string]slog.Level{"": LevelOff, "certs": LevelTrace, "proxy": LevelOff}, 0},
		{"info,certs=", map[string]slog.Level{"": slog.LevelInfo, "certs": LevelTrace}, 0},
		{"a=info,a=debug", map[string]slog.Level{"a": slog.LevelDebug}, 0},
		{"info,debug", map[string]slog.Level{"": slog.LevelDebug}, 0},
		{"info,dstack_gateway=debug", map[string]slog.Level{"": slog.LevelDebug, "certs": slog.LevelDebug}, 0},
		{"info,dstack_gateway::proxy::io=debug", map[string]slog.Level{"": slog.LevelInfo, "proxy": slog.LevelInfo, "proxy.io": slog.LevelDebug}, 0},
		{"dstack_gateway_x=debug,warn", map[string]slog.Level{"": slog.LevelWarn, "dstack_gateway_x": slog.LevelDebug}, 0},
		{"info,a=loud", map[string]slog.Level{"a": slog.LevelInfo}, 1},
		{"info,=debug", map[string]slog.Level{"": slog.LevelInfo}, 1},
		{"info,a[span]=debug", map[string]slog.Level{"": slog.LevelInfo}, 1},
		{"a=b=c", map[string]slog.Level{"": slog.LevelInfo}, 1},
		{"debug/(", map[string]slog.Level{"": slog.LevelDebug}, 1},
	} {
		f, complaints := ParseLogFilter(tt.text)
		if len(complaints) != tt.bad {
			t.Errorf("%q: complaints %q", tt.text, complaints)
		}
		for target, want := range tt.levels {
			if got := f.Level(target); got != want {
				t.Errorf("%q: level of %q = %v, want %v", tt.text, target, got, want)
			}
		}
	}
	if !(LevelTrace < slog.LevelDebug && LevelOff > slog.LevelError) {
		t.Error("the levels are in the wrong order")
	}
}

func TestLogHandler(t *testing.T) {
	for _, tt := range []struct {
		filter string
		log    func(*slog.Logger)
		want   string
	}{
		{"info", func(l *slog.Logger) { l.Debug("a"); l.Info("b") }, "b"},
		{"off", func(l *slog.Logger) { l.Error("a") }, ""},
		{"info,certs=debug", func(l *slog.Logger) { l.Debug("a"); l.WithGroup("certs").Debug("b") }, "b"},
		{"info,certs=debug", func(l *slog.Logger) { l.Debug("a", TargetKey, "certs"); l.Debug("b", TargetKey, "proxy") }, "a"},
		{"info,certs=debug", func(l *slog.Logger) {
			l.With(TargetKey, "certs").Debug("a")
			l.With(TargetKey, "proxy").Debug("b")
			l.With("other", "certs").Debug("c")
		}, "a"},
		{"info,certs.acme=debug", func(l *slog.Logger) {
			l.WithGroup("certs").Debug("a")
			l.WithGroup("certs").WithGroup("acme").Debug("b")
			l.WithGroup("").WithGroup("certs").With("x", 1).WithGroup("acme").Debug("c")
		}, "b c"},
		{"info,certs=off", func(l *slog.Logger) { l.WithGroup("certs").Error("a"); l.Info("b") }, "b"},
		{"info,certs=debug", func(l *slog.Logger) { l.With(TargetKey, "certs").WithGroup("proxy").Debug("a") }, "a"},
		{"trace", func(l *slog.Logger) { l.Log(t.Context(), LevelTrace, "a") }, "a"},
		{"debug", func(l *slog.Logger) { l.Log(t.Context(), LevelTrace, "a") }, ""},
		{"info/^k", func(l *slog.Logger) { l.Info("keep"); l.Info("drop"); l.Debug("kept") }, "keep"},
	} {
		var out bytes.Buffer
		f, complaints := ParseLogFilter(tt.filter)
		if len(complaints) > 0 {
			t.Fatal(complaints)
		}
		tt.log(slog.New(f.Handler(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: LevelTrace}))))
		var got []string
		for line := range strings.Lines(out.String()) {
			_, rest, _ := strings.Cut(line, "msg=")
			got = append(got, strings.Fields(rest)[0])
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%q logged %q, want %q", tt.filter, got, tt.want)
		}
	}
}

// TestLogHandlerSkipsEarly: a logger with a known target costs nothing for what is filtered out.
func TestLogHandlerSkipsEarly(t *testing.T) {
	f, _ := ParseLogFilter("info,certs=debug")
	h := f.Handler(slog.NewTextHandler(&bytes.Buffer{}, &slog.HandlerOptions{Level: LevelTrace}))
	if h.WithAttrs([]slog.Attr{slog.String(TargetKey, "proxy")}).Enabled(t.Context(), slog.LevelDebug) {
		t.Error("debug of proxy is enabled")
	}
	if !h.Enabled(t.Context(), slog.LevelDebug) || h.Enabled(t.Context(), LevelTrace) {
		t.Error("without a target, what some directive lets through must pass, and no more")
	}
}
