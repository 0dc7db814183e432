package rpc

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/ratls"
)

// Webhook asks another service whether an app may register (gateway spec 3.2 step 2).
type Webhook struct {
	// URL gets a POST with the app info as JSON. Any 2xx allows.
	URL string
	// Timeout bounds one question, redirects included.
	Timeout time.Duration
	// Cache is how long a yes holds for the same app info, 0: every registration asks.
	Cache time.Duration
	// Client carries transport settings; nil means a pooled one that honours the proxy settings of the environment.
	// Its own Timeout is not needed.
	Client *http.Client
}

// What operators of gateways know and search for in logs.
const (
	textUnauthorized = "App authorization failed"
	textNotSent      = "Failed to send request"
	textNotOK        = "Request failed"

	errAuthTimeout wireText = "Auth timeout: deadline has elapsed"
)

// maxCached bounds the answers that are remembered: one for each instance of a large platform.
const maxCached = 50_000

type authorizer struct {
	w   Webhook
	now func() time.Time

	mu  sync.Mutex
	yes map[[sha256.Size]byte]time.Time // until when
}

func newAuthorizer(w Webhook, now func() time.Time) *authorizer {
	if w.Client == nil {
		w.Client = &http.Client{Transport: &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			DialContext:         (&net.Dialer{}).DialContext, // bounded by Timeout
			ForceAttemptHTTP2:   true,
			TLSHandshakeTimeout: 5 * time.Second,
			// All CVMs of a platform register within minutes after a restart.
			MaxIdleConnsPerHost: 64,
			MaxConnsPerHost:     256,
			IdleConnTimeout:     90 * time.Second,
		}}
	}
	return &authorizer{w: w, now: now, yes: make(map[[sha256.Size]byte]time.Time)}
}

// authorize returns nil if the app may register. The chain of causes begins as gateway operators know it.
func (a *authorizer) authorize(ctx context.Context, info *ratls.AppInfo) error {
	body, err := json.Marshal(info)
	if err != nil {
		return fmt.Errorf("%s: failed to encode the app info: %w", textUnauthorized, err)
	}
	key := sha256.Sum256(body)
	if a.w.Cache > 0 && a.remembered(key) {
		return nil
	}
	if err := a.ask(ctx, body); err != nil {
		return fmt.Errorf("%s: %w", textUnauthorized, err)
	}
	if a.w.Cache > 0 {
		a.remember(key)
	}
	return nil
}

func (a *authorizer) ask(ctx context.Context, body []byte) error {
	if a.w.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.w.Timeout)
		defer cancel()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.w.URL, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s: core.auth.url: %w", textNotSent, withoutURL(err))
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := a.w.Client.Do(req)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return errAuthTimeout
		}
		return fmt.Errorf("%s: %w", textNotSent, withoutURL(err))
	}
	// A short body is read so that the connection can be used again; nobody looks at it.
	_, _ = io.CopyN(io.Discard, resp.Body, 16<<10)
	resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("%s: the authorization service answered with status %s", textNotOK, resp.Status)
	}
	return nil
}

// withoutURL drops the URL from an error that goes to a guest: it may hold a secret.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func (a *authorizer) remembered(key [sha256.Size]byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	until, ok := a.yes[key]
	return ok && a.now().Before(until)
}

func (a *authorizer) remember(key [sha256.Size]byte) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.yes) >= maxCached {
		for k, until := range a.yes {
			if !now.Before(until) {
				delete(a.yes, k)
			}
		}
		if len(a.yes) >= maxCached {
			clear(a.yes)
		}
	}
	a.yes[key] = now.Add(a.w.Cache)
}
