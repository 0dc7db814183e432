package controlplane

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestBodyGuard(t *testing.T) {
	known := &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{}}}
	for _, c := range []struct {
		name string
		tls  *tls.ConnectionState
		size int
		want error
	}{
		{"a stranger, nothing", nil, 0, nil},
		{"a stranger, small", nil, smallBody, nil},
		{"a stranger, one byte more", nil, smallBody + 1, errBodyTooLarge},
		{"a stranger, large", &tls.ConnectionState{}, 20 << 20, errBodyTooLarge},
		{"known, small", known, smallBody, nil},
		{"known, one byte more", known, smallBody + 1, nil},
		{"known, large", known, 20 << 20, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			body := bytes.Repeat([]byte("body"), c.size/4+1)[:c.size]
			g := guardBodies(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				got, err := io.ReadAll(r.Body)
				if !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if c.want == nil && !bytes.Equal(got, body) {
					t.Errorf("%d bytes of %d, or others", len(got), len(body))
				}
				if len(got) > smallBody && c.tls != known {
					t.Errorf("a stranger got %d bytes in", len(got))
				}
				if _, err := r.Body.Read(make([]byte, 1)); c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("once more: %v", err)
				}
			}))
			r := httptest.NewRequest("POST", "/", bytes.NewReader(body))
			r.TLS = c.tls
			g.ServeHTTP(httptest.NewRecorder(), r)
			if n := len(g.slots); n != 0 {
				t.Errorf("%d slots are still taken", n)
			}
		})
	}
}

// TestBodyGuardBusy: while all slots are taken, large bodies wait for a limited time and small ones not at all.
func TestBodyGuardBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := guardBodies(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.ReadAll(r.Body); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
			}
		}))
		call := func(body io.Reader) (string, time.Duration) {
			r := httptest.NewRequest("POST", "/", body)
			r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{}}}
			w, began := httptest.NewRecorder(), time.Now()
			g.ServeHTTP(w, r)
			return w.Body.String(), time.Since(began)
		}
		var wg sync.WaitGroup
		stall := make(chan struct{})
		for range largeBodies {
			wg.Go(func() {
				call(io.MultiReader(bytes.NewReader(make([]byte, smallBody+1)), readerFunc(func([]byte) (int, error) { <-stall; return 0, io.EOF })))
			})
		}
		synctest.Wait()
		if text, d := call(bytes.NewReader(make([]byte, smallBody))); text != "" || d != 0 {
			t.Errorf("a small body: %q after %s", text, d)
		}
		if text, d := call(bytes.NewReader(make([]byte, smallBody+1))); text != errBodiesBusy.Error()+"\n" || d != largeWait {
			t.Errorf("a large body: %q after %s", text, d)
		}
		close(stall)
		wg.Wait()
		if text, d := call(bytes.NewReader(make([]byte, smallBody+1))); text != "" || d != 0 {
			t.Errorf("a large body after the crowd: %q after %s", text, d)
		}
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
