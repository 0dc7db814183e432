package arm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// Control calls a dstack gateway's debug and admin interfaces (gateway spec 2, 3.5 and 3.6) from inside its namespace.
type Control struct {
	client *http.Client
	token  string
}

// controlConns bounds the connections kept to one interface.
const controlConns = 32

// newControl returns a Control that connects with dial (host:port, numeric).
func newControl(token string, dial func(addr string) (net.Conn, error)) *Control {
	return &Control{
		token: token,
		client: &http.Client{
			Timeout: callTimeout,
			Transport: &http.Transport{
				DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
					return dial(addr)
				},
				MaxIdleConnsPerHost: controlConns,
				MaxConnsPerHost:     controlConns,
			},
		},
	}
}

// Close drops the connections.
func (c *Control) Close() { c.client.CloseIdleConnections() }

// call posts in as JSON to a method and decodes the answer into out, if not nil.
func (c *Control) call(ctx context.Context, port int, method string, in, out any) error {
	fail := func(err error) error { return fmt.Errorf("calling %s on port %d: %w", method, port, err) }
	body, err := json.Marshal(in)
	if err != nil {
		return fail(err)
	}
	url := fmt.Sprintf("http://127.0.0.1:%d/prpc/%s?json", port, method)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return fail(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if port == adminPort {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return fail(err)
	}
	if resp.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(text)))
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fail(fmt.Errorf("answer %q: %w", text, err))
	}
	return nil
}

// Get reads a page of the admin interface, such as /metrics.
func (c *Control) Get(ctx context.Context, path string) ([]byte, error) {
	fail := func(err error) ([]byte, error) { return nil, fmt.Errorf("reading the admin page %s: %w", path, err) }
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", adminPort, path), nil)
	if err != nil {
		return fail(err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.client.Do(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fail(err)
	}
	if resp.StatusCode != http.StatusOK {
		return fail(fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(text)))
	}
	return text, nil
}

// Register registers an instance with a key of its own and returns the address it was given.
func (c *Control) Register(ctx context.Context, app, instance string) (netip.Addr, error) {
	var key [32]byte
	rand.Read(key[:])
	in := map[string]string{
		"client_public_key": base64.StdEncoding.EncodeToString(key[:]),
		"app_id":            app,
		"instance_id":       instance,
	}
	var out struct {
		WG struct {
			ClientIP string `json:"client_ip"`
		} `json:"wg"`
	}
	if err := c.call(ctx, debugPort, "RegisterCvm", in, &out); err != nil {
		return netip.Addr{}, err
	}
	ip, err := netip.ParseAddr(out.WG.ClientIP)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("calling RegisterCvm: client_ip: %w", err)
	}
	return ip, nil
}

// Open lets clients reach every port of an instance: without a policy they reach none (gateway spec 5.9).
func (c *Control) Open(ctx context.Context, instance string) error {
	return c.call(ctx, adminPort, "SetInstancePortPolicy", map[string]any{
		"instance_id": instance,
		"policy":      map[string]any{"ports": []any{}, "restrict_mode": false},
	}, nil)
}

// accel returns what the gateway says about its fast paths.
func (c *Control) accel(ctx context.Context) (map[string]string, error) {
	var out struct {
		Accel map[string]any `json:"accel"`
	}
	if err := c.call(ctx, adminPort, "Status", nil, &out); err != nil {
		return nil, err
	}
	facts := map[string]string{}
	for k, v := range out.Accel {
		facts["accel "+strings.ReplaceAll(k, "_", " ")] = fmt.Sprint(v)
	}
	return facts, nil
}
