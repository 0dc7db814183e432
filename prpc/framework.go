package prpc

import (
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
)

// NotFound answers a path that nobody serves: 404 with a small page, or with
// {"error":{"code":404,...}} when the Accept header prefers JSON. The rest of a
// server should use it too, so that all its unknown paths look alike.
func NotFound(w http.ResponseWriter, r *http.Request) {
	frameworkError(w, r, http.StatusNotFound, "The requested resource could not be found.")
}

// frameworkError is the shape of errors that are not RPC errors. Both texts are
// constants of this package: nothing of the request is echoed into HTML.
func frameworkError(w http.ResponseWriter, r *http.Request, code int, description string) {
	reason := http.StatusText(code)
	contentType := "text/html; charset=utf-8"
	body := fmt.Sprintf("<!DOCTYPE html>\n<title>%d %s</title>\n<h1>%d: %s</h1>\n<p>%s</p>\n",
		code, reason, code, reason, description)
	if prefersJSON(r.Header.Values("Accept")) {
		contentType = "application/json"
		body = fmt.Sprintf(`{"error":{"code":%d,"reason":%q,"description":%q}}`, code, reason, description)
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(code)
	_, _ = w.Write([]byte(body)) // the caller has gone; nobody is left to tell
}

// prefersJSON tells whether application/json is the best of an Accept header:
// the highest weight, the first of equals (RFC 9110, 12.5.1).
func prefersJSON(accept []string) bool {
	best, top := "", 0.0
	for item := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		t, params, err := mime.ParseMediaType(item)
		if err != nil {
			continue
		}
		q := 1.0
		if s, ok := params["q"]; ok {
			if q, err = strconv.ParseFloat(s, 64); err != nil {
				continue
			}
		}
		if q > top {
			best, top = t, q
		}
	}
	return best == "application/json"
}
