package wireguard

import (
	"log/slog"
	"sync"
	"time"
)

// repeatFailures is how often a lasting failure is logged again.
const repeatFailures = time.Minute

// failureLog reports a failure of one recurring activity: at once, again when
// its text changes, then once a minute with the number of attempts, and once
// more when it is over. An attempt a second must not bury the log.
type failureLog struct {
	log  *slog.Logger
	what string

	mu       sync.Mutex
	text     string // of the current failure, empty when the last attempt worked
	logged   time.Time
	attempts int
}

// failed records a failed attempt. hint says what it means for the operator.
func (f *failureLog) failed(err error, hint string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attempts++
	text := err.Error()
	if text == f.text && time.Since(f.logged) < repeatFailures {
		return
	}
	f.log.Error(f.what+" failed", slog.String("error", text), slog.String("hint", hint), slog.Int("attempts", f.attempts))
	f.text, f.logged = text, time.Now()
}

// ok records an attempt that worked.
func (f *failureLog) ok() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.text == "" {
		return
	}
	f.log.Info(f.what+" works again", slog.Int("failed_attempts", f.attempts))
	f.text, f.attempts = "", 0
}
