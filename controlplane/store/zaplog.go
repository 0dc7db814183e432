package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// slogCore passes etcd's messages from a level on to slog.
type slogCore struct {
	log    *slog.Logger
	min    zapcore.Level
	fields []zapcore.Field
}

func (c slogCore) Enabled(l zapcore.Level) bool { return l >= c.min }

func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	c.fields = append(append([]zapcore.Field(nil), c.fields...), fields...)
	return c
}

// meaningless are messages that every start of an embedded node brings: about listeners and authentication that it does
// not have, and about a schema version that is not known before the first write and looked for again.
func meaningless(message string) bool {
	switch message {
	case "Running http and grpc server on single port. This is not recommended for production.",
		"simple token is not cryptographically signed",
		"Failed to detect schema version",
		"failed to update storage version":
		return true
	}
	return false
}

func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) && !meaningless(e.Message) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range c.fields {
		f.AddTo(enc)
	}
	for _, f := range fields {
		f.AddTo(enc)
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	c.log.LogAttrs(context.Background(), level, "etcd: "+e.Message, attrs...)
	return nil
}

func (c slogCore) Sync() error { return nil }

// faultHook takes the place of os.Exit and panic behind etcd's fatal messages: the goroutine ends, the rest of the
// gateway goes on, and the store is told.
type faultHook struct{ fault *fault }

func (h faultHook) OnWrite(ce *zapcore.CheckedEntry, fields []zapcore.Field) {
	err := errors.New(ce.Message)
	for _, f := range fields {
		if cause, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			err = fmt.Errorf("%s: %w", ce.Message, cause)
			break
		}
	}
	h.fault.set(fmt.Errorf("etcd stopped: %w", err))
	runtime.Goexit()
}

// serverLogger is for an embedded etcd.
func serverLogger(log *slog.Logger, f *fault) *zap.Logger {
	return zap.New(slogCore{log: log, min: zapcore.WarnLevel}, zap.WithFatalHook(faultHook{f}), zap.WithPanicHook(faultHook{f}))
}

// clientLogger is for the client of a remote etcd. Its warnings are about every single retry; the store tells of an
// outage itself.
func clientLogger(log *slog.Logger) *zap.Logger {
	return zap.New(slogCore{log: log, min: zapcore.ErrorLevel})
}
