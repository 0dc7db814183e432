package prpc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
)

const (
	// Conventions of every released client (KMS spec 3.5).
	connectTimeout = 5 * time.Second
	callTimeout    = 60 * time.Second

	// maxErrorText bounds what is kept of a failed call's body.
	maxErrorText = 64 << 10
)

// Client calls the methods of one server. It is safe for concurrent use.
type Client struct {
	// MaxAnswer bounds an answer in bytes; DefaultMaxBody when 0. Set it before
	// the first call.
	MaxAnswer int64

	base string
	http *http.Client
}

// StatusError is an answer other than 200.
type StatusError struct {
	// Method is the one called.
	Method string
	// Status is the HTTP status code.
	Status int
	// Text is the server's error text, or its whole answer when that is not the
	// JSON of an RPC error. At most 64 KiB.
	Text string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s: status %d: %s", e.Method, e.Status, e.Text)
}

// NewClient prepares calls to base: http://host:port/mount, https://... or
// unix:/path, where the methods of a unix socket are served at its root.
// Slashes at the end are dropped.
//
// hc carries TLS configuration, timeouts and redirect policy. Nil means 5 s to
// connect, 60 s a call, no proxy and no redirects. For a unix base, an
// *http.Transport in hc (or none) is copied and made to dial the socket; any
// other transport is used as it is.
func NewClient(base string, hc *http.Client) (*Client, error) {
	if hc == nil {
		hc = &http.Client{
			Timeout: callTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error {
				return http.ErrUseLastResponse
			},
			Transport: &http.Transport{
				DialContext:         (&net.Dialer{Timeout: connectTimeout}).DialContext,
				TLSHandshakeTimeout: connectTimeout,
				IdleConnTimeout:     10 * time.Second, // servers keep alive 10 s
				ForceAttemptHTTP2:   true,
			},
		}
	}
	if path, ok := strings.CutPrefix(base, "unix:"); ok {
		if strings.HasPrefix(path, "//") {
			path = path[2:] // unix:///run/x.sock, the URL form
		}
		if path == "" {
			return nil, errors.New("RPC base \"unix:\" names no socket; write unix:/path/to/socket")
		}
		return &Client{base: "http://localhost", http: overUnix(hc, path)}, nil
	}
	u, err := url.Parse(base)
	if err != nil {
		return nil, fmt.Errorf("RPC base: %w", redactURL(err))
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("RPC base %q is neither http://host, https://host nor unix:/path", u.Redacted())
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("RPC base %q must not have a query or a fragment", u.Redacted())
	}
	return &Client{base: strings.TrimRight(base, "/"), http: hc}, nil
}

// overUnix returns a copy of hc that connects to a socket, whatever the URL.
func overUnix(hc *http.Client, path string) *http.Client {
	c := *hc
	var t *http.Transport
	switch rt := hc.Transport.(type) {
	case nil:
		t = &http.Transport{}
	case *http.Transport:
		t = rt.Clone()
	default:
		return &c
	}
	dialer := &net.Dialer{Timeout: connectTimeout}
	t.Proxy = nil
	t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, "unix", path)
	}
	c.Transport = t
	return &c
}

// redactURL keeps the cause of a url.Error and drops the URL, which may hold
// credentials.
func redactURL(err error) error {
	if ue, ok := errors.AsType[*url.Error](err); ok {
		return ue.Err
	}
	return err
}

// CloseIdleConnections closes what is kept open between calls.
func (c *Client) CloseIdleConnections() { c.http.CloseIdleConnections() }

// Call sends req to a method and reads the answer into resp, which must be
// fresh. Both travel as JSON (POST, ?json, no Content-Type), which every
// released server accepts. An Empty resp takes any answer; an answer of null or
// of no bytes is an error for all other messages.
//
// A status other than 200 gives a *StatusError. Nothing is retried.
func (c *Client) Call(ctx context.Context, method string, req, resp proto.Message) error {
	body, err := Marshal(req)
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost,
		c.base+"/"+url.PathEscape(method)+"?json", bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s: %w", method, redactURL(err))
	}
	hr.Header.Set("Accept", "application/json")
	res, err := c.http.Do(hr)
	if err != nil {
		// *url.Error names verb and URL, with credentials removed.
		return fmt.Errorf("%s: %w", method, err)
	}
	defer res.Body.Close()

	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorText)) // as much as came
		return &StatusError{Method: method, Status: res.StatusCode, Text: errorText(text)}
	}
	limit := c.MaxAnswer
	if limit == 0 {
		limit = DefaultMaxBody
	}
	answer, err := io.ReadAll(io.LimitReader(res.Body, limit+1))
	if err != nil {
		return fmt.Errorf("%s: read the answer: %w", method, err)
	}
	if int64(len(answer)) > limit {
		return &AnswerError{Method: method, Err: fmt.Errorf("larger than %d bytes", limit)}
	}
	if err := Unmarshal(answer, resp); err != nil {
		return &AnswerError{Method: method, Err: err}
	}
	return nil
}

// AnswerError is an answer of status 200 that is not what the method returns.
// Asking again would give the same.
type AnswerError struct {
	Method string
	Err    error
}

func (e *AnswerError) Error() string {
	return fmt.Sprintf("%s: unusable answer: %v", e.Method, e.Err)
}

func (e *AnswerError) Unwrap() error { return e.Err }

// errorText unwraps {"error":"text"}; anything else stands for itself.
func errorText(body []byte) string {
	var e struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal(body, &e); err == nil && e.Error != "" {
		return e.Error
	}
	return strings.ToValidUTF8(strings.TrimSpace(string(body)), "\uFFFD")
}
