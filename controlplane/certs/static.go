package certs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// StaticFiles is the certificate of core.proxy.base_domain, cert_chain and
// cert_key (gateway spec 7.2).
type StaticFiles struct {
	BaseDomain string
	CertPath   string // PEM chain
	KeyPath    string // PEM key
}

// LoadStatic installs the certificate of f, which stays through every Reload
// and hides a record of the same domain. It is for start-up: the error is meant
// to end the process. An expired certificate is installed with a warning, since
// refusing to serve helps nobody.
func (s *Store) LoadStatic(f StaticFiles) error {
	return s.loadStatic(f, true)
}

// WatchStatic follows changes of f's files until ctx ends, looking every
// interval (0: 2 s). A pair that is half-written, does not match or is expired
// leaves the installed one and is logged once.
func (s *Store) WatchStatic(ctx context.Context, f StaticFiles, interval time.Duration) {
	w := fileWatch{
		paths: []string{f.CertPath, f.KeyPath},
		load:  func() error { return s.loadStatic(f, false) },
		log:   s.log.With(slog.String("domain", canonical(f.BaseDomain))),
		what:  "static certificate",
	}
	w.run(ctx, interval)
}

func (s *Store) loadStatic(f StaticFiles, starting bool) error {
	domain := canonical(f.BaseDomain)
	if domain == "" {
		return errors.New("load static certificate: core.proxy.base_domain is empty")
	}
	cert, err := loadPair(f.CertPath, f.KeyPath)
	if err != nil {
		s.met.rejected.Inc()
		return fmt.Errorf("load static certificate for %s: %w", domain, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := entry{cert: cert, expires: cert.Leaf.NotAfter}
	now := s.now()
	old, known := s.static[domain]
	if !now.Before(e.expires) {
		if !starting && known && now.Before(old.expires) {
			s.met.rejected.Inc()
			return fmt.Errorf("load static certificate for %s: %s: %w: since %s", domain, f.CertPath, ErrExpired, e.expires.UTC().Format(time.RFC3339))
		}
		s.log.Warn("the static certificate is expired: clients will refuse it",
			slog.String("domain", domain), slog.String("file", f.CertPath), slog.Time("expired", e.expires))
	}
	if known && sameChain(old.cert, cert) {
		return nil // touched, not changed; the key belongs to the same leaf
	}
	s.static[domain] = e
	s.announce(domain, e, f.CertPath)
	s.publish()
	return nil
}

// fileWatch calls load when files changed and have then been left alone for one
// interval. It polls: a directory that is swapped by symbolic links, a bind
// mount and a network file system all show in stat, not all in inotify.
type fileWatch struct {
	paths []string
	load  func() error
	log   *slog.Logger
	what  string
}

// fileSig tells one state of a file from another.
type fileSig struct {
	dev, ino uint64
	size     int64
	mtime    time.Time
	err      string // instead, if the file cannot be looked at
}

func (w *fileWatch) look() string {
	var all string
	for _, p := range w.paths {
		all += fmt.Sprintf("%+v", signature(p))
	}
	return all
}

func signature(path string) fileSig {
	fi, err := os.Stat(path)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			return fileSig{err: pe.Err.Error()}
		}
		return fileSig{err: err.Error()}
	}
	sig := fileSig{size: fi.Size(), mtime: fi.ModTime()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		sig.dev, sig.ino = uint64(st.Dev), st.Ino
	}
	return sig
}

func (w *fileWatch) run(ctx context.Context, interval time.Duration) {
	if interval <= 0 {
		interval = 2 * time.Second
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	// Files that changed between loading and watching are loaded again: the
	// first look counts as a change, and an unchanged pair is not installed.
	done, seen := "", ""
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := w.look()
		if now == done {
			continue
		}
		if now != seen { // somebody may still be writing
			seen = now
			continue
		}
		done = now
		if err := w.load(); err != nil {
			w.log.Error("reloading the "+w.what+" failed: the previous one stays in use", slog.String("error", err.Error()))
			failed = true
		} else if failed {
			w.log.Info("the " + w.what + " is readable again")
			failed = false
		}
	}
}
