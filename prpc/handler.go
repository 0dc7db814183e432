package prpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	prpcpb "github.com/dstack-gw/dstack-gw/api/prpc"
	"google.golang.org/protobuf/proto"
)

const (
	// DefaultMaxBody bounds bodies, in both directions, where nothing else is
	// said.
	DefaultMaxBody = 10 << 20

	// drainBody is how much of a refused body is read and dropped, so that a
	// sender that writes before it reads sees the answer instead of a reset.
	drainBody = 8 << 20

	// UnknownMethod stands for every name without a handler in Observe, so that
	// callers cannot invent label values.
	UnknownMethod = "unknown"
)

// Options of a Handler. The zero value serves anonymous callers.
type Options struct {
	// MaxBody bounds a request body in bytes; DefaultMaxBody when 0.
	MaxBody int64
	// MethodLimits overrides MaxBody by bare method name.
	MethodLimits map[string]int64
	// Identify finds out who calls, before anything of the body is read, and
	// returns the context that the method gets. An error refuses the call with
	// status 400 and the error's text. Nil: everybody may call.
	Identify func(*http.Request) (context.Context, error)
	// Observe is told about every call when it has been answered: the bare
	// method name (UnknownMethod without a handler), the status, the time it
	// took. May be nil.
	Observe func(method string, code int, d time.Duration)
	// Logger gets the stack of a method that panicked; slog.Default() when nil.
	Logger *slog.Logger
}

// Handler serves the service directly below its mount: it expects the path
// /<Method>, so mount it through http.StripPrefix.
//
// Answers are 200 with the result, 400 with an error (also for unknown methods
// and for callers that Identify refuses), 404 by NotFound for verbs other than
// GET and POST and for deeper paths, and 422 when the method is empty.
func (s *Service) Handler(opts Options) http.Handler {
	if opts.MaxBody == 0 {
		opts.MaxBody = DefaultMaxBody
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	return &handler{service: s, opts: opts}
}

type handler struct {
	service *Service
	opts    Options
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	segment := strings.TrimPrefix(r.URL.Path, "/")
	get := r.Method == http.MethodGet
	if !get && r.Method != http.MethodPost || strings.Contains(segment, "/") {
		NotFound(w, r)
		return
	}
	if segment == "" {
		frameworkError(w, r, http.StatusUnprocessableEntity,
			"The path names no method.")
		return
	}
	name := h.service.bare(segment)
	m := h.service.methods[name]
	// Released servers look at Content-Type only after they have read the body.
	// Looking at it for every error is what the KMS spec (3.4) asks of us.
	asJSON := get || jsonByQuery(r.URL.RawQuery) || jsonByType(r.Header.Get("Content-Type"))

	code, body := http.StatusOK, []byte(nil)
	resp, err := h.call(r, name, m, get, asJSON)
	if err == nil {
		body, err = encode(resp, asJSON)
	}
	if err != nil {
		code, body = http.StatusBadRequest, encodeError(err, asJSON)
	}

	header := w.Header()
	if asJSON {
		header.Set("Content-Type", "application/json")
	} else {
		header.Set("Content-Type", "application/octet-stream")
	}
	// Some SDKs cannot read a chunked answer (guest spec 2.5).
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(code)
	_, _ = w.Write(body) // the caller has gone; nobody is left to tell

	if h.opts.Observe != nil {
		label := UnknownMethod
		if m != nil {
			label = m.name
		}
		h.opts.Observe(label, code, time.Since(start))
	}
}

// call does everything between the request line and the result. name is the
// bare method, m is nil when it is not known.
func (h *handler) call(r *http.Request, name string, m *method, get, asJSON bool) (resp proto.Message, err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if p == http.ErrAbortHandler {
			panic(p) // the way to ask net/http for a dropped connection
		}
		h.opts.Logger.Error("method panicked",
			"service", h.service.name, "method", name, "panic", p, "stack", string(debug.Stack()))
		err = errors.New("internal error: the method failed unexpectedly, see the server's log")
	}()

	ctx := r.Context()
	if h.opts.Identify != nil {
		if ctx, err = h.opts.Identify(r); err != nil {
			return nil, err
		}
	}
	var body []byte
	if !get {
		limit, ok := h.opts.MethodLimits[name]
		if !ok {
			limit = h.opts.MaxBody
		}
		if body, err = readBody(r, limit); err != nil {
			return nil, fmt.Errorf("failed to read data: %w", err)
		}
	}
	if m == nil {
		return nil, fmt.Errorf("Service not found: %s", name) //nolint:staticcheck // wire text
	}
	req, err := m.decode(body, r.URL.RawQuery, get, asJSON)
	if err != nil {
		return nil, err
	}
	return m.call(ctx, req)
}

var errTooLarge = errors.New("payload too large")

// readBody reads the whole body, or refuses it and drops a bounded part of it.
func readBody(r *http.Request, limit int64) ([]byte, error) {
	// The declared length is the sender's claim: it sizes the buffer only as far
	// as that costs nothing.
	const upfront = 64 << 10
	if n := r.ContentLength; n <= limit {
		b, err := appendAll(make([]byte, 0, min(max(n, 0), upfront)+1), io.LimitReader(r.Body, limit+1))
		if err != nil {
			return nil, err
		}
		if int64(len(b)) <= limit {
			return b, nil
		}
	}
	// An error here is a sender who stopped: the answer is the same.
	_, _ = io.CopyN(io.Discard, r.Body, drainBody)
	return nil, errTooLarge
}

// appendAll is io.ReadAll into a buffer of the caller's size.
func appendAll(b []byte, r io.Reader) ([]byte, error) {
	for {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func encode(m proto.Message, asJSON bool) ([]byte, error) {
	if asJSON {
		return appendMessage(nil, m.ProtoReflect()), nil
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("failed to encode the answer: %w", err)
	}
	return b, nil
}

// encodeError renders the error answer; the JSON form is indented, unlike every
// other answer.
func encodeError(err error, asJSON bool) []byte {
	text := err.Error()
	if asJSON {
		b := appendString([]byte("{\n  \"error\": "), text)
		return append(b, "\n}"...)
	}
	b, err := proto.Marshal(&prpcpb.Error{Message: strings.ToValidUTF8(text, "\uFFFD")})
	if err != nil {
		// A string of valid UTF-8 always encodes.
		panic(fmt.Sprintf("prpc: encode error answer: %v", err))
	}
	return b
}

// jsonByQuery looks at the first field named json.
func jsonByQuery(raw string) bool {
	for raw != "" {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		name, value, _ := strings.Cut(pair, "=")
		if unescape(name) == "json" {
			switch unescape(value) {
			case "", "1", "true":
				return true
			}
			return false
		}
	}
	return false
}

func jsonByType(contentType string) bool {
	if contentType == "" {
		return false
	}
	if contentType == "application/json" {
		return true
	}
	t, _, err := mime.ParseMediaType(contentType)
	return (err == nil || errors.Is(err, mime.ErrInvalidMediaParameter)) && t == "application/json"
}
