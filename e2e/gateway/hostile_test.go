package gateway

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestHostileRPC: what the internet sends to the main server costs its sender, not the guests.
func TestHostileRPC(t *testing.T) {
	t.Parallel()
	g := startGateway(t, settings{"limits.GetPeers": 1000})
	v := newGuest(t, "guest")
	_, want := v.register(t, g)
	pid := g.proc.cmd.Process.Pid
	idle, memory := descriptors(t, pid), rss(t, pid)
	anonymous := rpcClient(t, nil)
	const tooLarge = "failed to read data: payload too large"

	post := func(hc *http.Client, path string, body io.Reader, header ...string) (int, string) {
		t.Helper()
		req, err := http.NewRequest("POST", g.rpcURL(path), body)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := hc.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return 0, err.Error()
		}
		return resp.StatusCode, string(b)
	}
	big := make([]byte, 11<<20)
	for i := range big {
		big[i] = ' '
	}
	deep := strings.Repeat(`{"port_policy":`, 200_000)
	for _, c := range []struct {
		name, path string
		body       io.Reader
		status     int
		answer     string // its beginning
	}{
		{"11 MiB", "/prpc/RegisterCvm?json", bytes.NewReader(big), 400, jsonError(tooLarge)},
		{"11 MiB without a length", "/prpc/RegisterCvm?json", struct{ io.Reader }{bytes.NewReader(big)}, 400, jsonError(tooLarge)},
		{"11 MiB for a method without input", "/prpc/Info?json", bytes.NewReader(big), 400, jsonError(tooLarge)},
		{"11 MiB for no method", "/prpc/Nothing?json", bytes.NewReader(big), 400, jsonError(tooLarge)},
		{"a limit of its own", "/prpc/Tproxy.GetPeers?json", bytes.NewReader(big[:1001]), 400, jsonError(tooLarge)},
		{"just below the limit", "/prpc/RegisterCvm?json", bytes.NewReader(big[:10<<20]), 400, "{\n  \"error\": \"failed to decode JSON of RegisterCvm: "},
		{"nested 200,000 deep", "/prpc/RegisterCvm?json", strings.NewReader(deep), 400, "{\n  \"error\": \"failed to decode JSON of RegisterCvm: "},
		{"nested arrays", "/prpc/RegisterCvm?json", strings.NewReader(`{"x":` + strings.Repeat("[", 1<<20)), 400, "{\n  \"error\": \"failed to decode JSON of RegisterCvm: "},
		{"a long number", "/prpc/RegisterCvm?json", strings.NewReader(`{"port_policy":{"ports":[{"port":` + strings.Repeat("9", 1<<20) + `}]}}`), 400, "{\n  \"error\": \"failed to decode JSON of RegisterCvm: "},
		{"protobuf nested deep", "/prpc/RegisterCvm", bytes.NewReader(nested(5000)), 400, ""},
		{"random protobuf", "/prpc/RegisterCvm", io.LimitReader(rand.Reader, 1<<20), 400, ""},
		{"a long query", "/prpc/RegisterCvm?json&" + strings.Repeat("a[b]=1&", 5000), nil, 400, ""},
		{"a long method", "/prpc/" + strings.Repeat("Tproxy.", 5000) + "Info?json", nil, 200, `{"base_domain"`},
	} {
		began := time.Now()
		status, answer := post(v.http, c.path, c.body)
		if status != c.status || !strings.HasPrefix(answer, c.answer) {
			t.Errorf("%s: %d %.300s", c.name, status, answer)
		}
		if len(answer) > 4096 {
			t.Errorf("%s: an answer of %d bytes", c.name, len(answer))
		}
		if d := time.Since(began); d > 3*time.Second && !raced() {
			t.Errorf("%s: took %s", c.name, d)
		}
	}

	for _, path := range []string{"/prpc/RegisterCvm?json", "/prpc/Info?json", "/prpc/Nothing?json"} {
		if status, answer := post(anonymous, path, bytes.NewReader(big[:64<<10+1])); status != 400 || answer != jsonError(tooLarge) {
			t.Errorf("%s, 64 KiB and more of a stranger: %d %.300s", path, status, answer)
		}
	}

	// 10,000 headers, over HTTP/1.1 and HTTP/2.
	many := make([]string, 0, 20_000)
	for i := range 10_000 {
		many = append(many, fmt.Sprintf("X-Header-%d", i), "x")
	}
	if status, answer := post(anonymous, "/prpc/Info?json", nil, many...); status == 200 {
		t.Errorf("10,000 headers over HTTP/2: %d %.300s", status, answer)
	}
	old := tlsClient(t, &tls.Config{InsecureSkipVerify: true})
	old.Transport.(*http.Transport).ForceAttemptHTTP2 = false
	if a, err := ask(old, "POST", g.rpcURL("/prpc/Info?json"), "", many...); err == nil && a.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("10,000 headers over HTTP/1.1: %+v", a)
	}

	// Garbage where TLS is expected, on both ports: closed, and soon.
	for _, port := range []int{mainPort, proxyPort} {
		for name, text := range map[string][]byte{
			"HTTP in clear": []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), "SSH": []byte("SSH-2.0-OpenSSH_9.6\r\n"), "zeros": make([]byte, 1000),
			"a record of 65535": append([]byte{22, 3, 1, 0xff, 0xff}, make([]byte, 70000)...),
			"a hello of 16 MiB": append([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, make([]byte, 70000)...),
			"endless handshake": bytes.Repeat([]byte{22, 3, 1, 0, 1, 1}, 20000),
		} {
			c, err := net.Dial("tcp", g.addr(port))
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(8 * time.Second))
			c.Write(text) // may be cut off
			if _, err := io.Copy(io.Discard, c); isTimeout(err) {
				t.Errorf("port %d, %s: still open", port, name)
			}
			c.Close()
		}
	}

	// 200 strangers who send most of a large body and never the rest.
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	sent := make(chan struct{}, 200)
	for range cap(sent) {
		wg.Go(func() {
			pr, pw := io.Pipe()
			defer pw.Close()
			req, err := http.NewRequestWithContext(ctx, "POST", g.rpcURL("/prpc/RegisterCvm?json"), pr)
			if err != nil {
				t.Error(err)
				return
			}
			go func() {
				pw.Write(big[:9<<20])
				sent <- struct{}{}
				<-ctx.Done()
				pw.CloseWithError(ctx.Err())
			}()
			if resp, err := rpcClient(t, nil).Do(req); err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
	for range cap(sent) {
		select {
		case <-sent:
		case <-time.After(20 * time.Second):
			t.Fatal("a stranger's bytes are neither read nor refused")
		}
	}
	t.Logf("memory %d MiB before, %d MiB with 200 strangers that have sent 9 MiB each", memory, rss(t, pid))
	if peak := rss(t, pid); peak > memory+400 && !raced() {
		t.Errorf("200 strangers who sent 9 MiB each cost %d MiB", peak-memory)
	}
	cancel()
	wg.Wait()

	// 100 who send a byte now and then, over connections of their own; guests do not wait for them.
	ctx, cancel = context.WithCancel(t.Context())
	for range 100 {
		wg.Go(func() {
			pr, pw := io.Pipe()
			defer pw.Close()
			hc := rpcClient(t, nil)
			req, err := http.NewRequestWithContext(ctx, "POST", g.rpcURL("/prpc/RegisterCvm?json"), pr)
			if err != nil {
				t.Error(err)
				return
			}
			req.ContentLength = 1 << 20
			go func() {
				for ctx.Err() == nil {
					pw.Write([]byte{' '})
					time.Sleep(200 * time.Millisecond)
				}
				pw.CloseWithError(ctx.Err())
			}()
			if resp, err := hc.Do(req); err == nil {
				resp.Body.Close()
			}
		})
	}
	// And one that opens as many streams as it can on one connection.
	for range 500 {
		wg.Go(func() {
			pr, pw := io.Pipe()
			defer pw.Close()
			req, err := http.NewRequestWithContext(ctx, "POST", g.rpcURL("/prpc/RegisterCvm?json"), pr)
			if err != nil {
				t.Error(err)
				return
			}
			if resp, err := anonymous.Do(req); err == nil {
				resp.Body.Close()
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	within(t, 10*time.Second, func() error { // this process has to come to rest itself
		began := time.Now()
		c, err := net.Dial("tcp", g.addr(mainPort))
		if err == nil {
			c.Close()
		}
		if d := time.Since(began); d > 20*time.Millisecond {
			return fmt.Errorf("a bare connection takes %s: %w", d, err)
		}
		return err
	})
	worst := time.Duration(0)
	for range 30 {
		began := time.Now()
		if _, got := v.register(t, g); got != want {
			t.Errorf("another answer: %s", got)
		}
		worst = max(worst, time.Since(began))
	}
	if worst > 2*time.Second && !raced() {
		t.Errorf("a guest waited %s", worst)
	}
	peak := rss(t, pid)
	cancel()
	wg.Wait()
	t.Logf("guests waited %s at most among 100 slow senders and 500 streams; memory %d MiB before, %d MiB now", worst.Round(time.Millisecond), memory, peak)
	if peak > memory+400 && !raced() {
		t.Errorf("memory grew from %d to %d MiB", memory, peak)
	}
	anonymous.CloseIdleConnections()
	v.http.CloseIdleConnections()
	within(t, 15*time.Second, func() error {
		if n := descriptors(t, pid); n > idle+10 {
			return fmt.Errorf("%d descriptors are open, %d were before", n, idle)
		}
		return nil
	})
}

// nested is protobuf of unknown groups inside each other.
func nested(depth int) []byte {
	return append(bytes.Repeat([]byte{0x7b}, depth), bytes.Repeat([]byte{0x7c}, depth)...)
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}
