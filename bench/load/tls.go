package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// config returns the client's configuration: TLS 1.3 with one key exchange only, and one certificate only.
func (t *TLS) config(name string, sessions tls.ClientSessionCache) *tls.Config {
	group := tls.X25519
	if t.Group == tls.X25519MLKEM768.String() {
		group = tls.X25519MLKEM768
	}
	return &tls.Config{
		ServerName:         name,
		MinVersion:         tls.VersionTLS13,
		CurvePreferences:   []tls.CurveID{group},
		ClientSessionCache: sessions,
		// The certificate is compared, not chained: building a chain would only add to the client's work. The
		// handshake still proves that the gateway has its key.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 || !bytes.Equal(cs.PeerCertificates[0].Raw, t.Cert) {
				return errors.New("the gateway presented another certificate than the rig's")
			}
			return nil
		},
	}
}

func handshake(ctx context.Context, c *tls.Conn) error {
	if err := c.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	return nil
}

func describe(cs tls.ConnectionState) map[string]string {
	return map[string]string{
		"version": tls.VersionName(cs.Version),
		"suite":   tls.CipherSuiteName(cs.CipherSuite),
		"group":   cs.CurveID.String(),
	}
}

// session is a one-entry session cache for one worker: the newest ticket is always the one offered.
type session struct{ s *tls.ClientSessionState }

func (c *session) Get(string) (*tls.ClientSessionState, bool) { return c.s, c.s != nil }
func (c *session) Put(_ string, s *tls.ClientSessionState)    { c.s = s }
func (c *session) cache(resume bool) (cache tls.ClientSessionCache) {
	if resume {
		cache = c
	}
	return cache
}

// roundTrip sends a request and verifies the reply.
func roundTrip(c net.Conn, buf *[wire.Size]byte, conn, seq uint64) error {
	wire.Message{Kind: wire.Request, Conn: conn, Seq: seq}.Put(buf[:])
	if _, err := c.Write(buf[:]); err != nil {
		return fmt.Errorf("connection %d: sending request %d: %w", conn, seq, err)
	}
	if _, err := io.ReadFull(c, buf[:]); err != nil {
		return fmt.Errorf("connection %d: reply %d: %w", conn, seq, err)
	}
	if err := wire.Expect(buf[:], wire.Message{Kind: wire.Reply, Conn: conn, Seq: seq}); err != nil {
		return fmt.Errorf("connection %d: %w", conn, err)
	}
	return nil
}

// workers runs n workers until ctx ends or one fails, and joins their records. A worker calls up once.
func workers(ctx context.Context, n int, ready func(), work func(ctx context.Context, i int, up func()) ([]record, error)) ([]record, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg, coming sync.WaitGroup
	coming.Add(n)
	all := make([][]record, n)
	for i := range n {
		wg.Go(func() {
			var once sync.Once
			up := func() { once.Do(coming.Done) }
			defer up()
			r, err := work(ctx, i, up)
			if err != nil && ctx.Err() == nil {
				cancel(err)
			}
			all[i] = r
		})
	}
	coming.Wait()
	if ctx.Err() == nil {
		ready()
	}
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil && cause != errStopped {
		return nil, cause
	}
	var out []record
	for _, r := range all {
		out = append(out, r...)
	}
	return out, nil
}

// tlsRequests sends 64-byte requests over lasting TLS connections.
type tlsRequests struct {
	spec Spec
	seen map[string]string
	mu   sync.Mutex
}

func (d *tlsRequests) facts() map[string]string { return d.seen }

func (d *tlsRequests) run(ctx context.Context, clk clock, ready func()) ([]record, error) {
	return workers(ctx, d.spec.Conns, ready, func(ctx context.Context, i int, up func()) ([]record, error) {
		raw, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp4", d.spec.Addr.String())
		if err != nil {
			return nil, err
		}
		defer raw.Close()
		defer context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })()
		c := tls.Client(raw, d.spec.TLS.config(d.spec.Name, nil))
		if err := handshake(ctx, c); err != nil {
			return nil, err
		}
		d.mu.Lock()
		d.seen = describe(c.ConnectionState())
		d.mu.Unlock()
		var buf [wire.Size]byte
		records := make([]record, 0, 1<<16)
		for seq := uint64(0); ctx.Err() == nil; seq++ {
			begun := clk.now()
			if err := roundTrip(c, &buf, uint64(i), seq); err != nil {
				return records, err
			}
			now := clk.now()
			records = append(records, record{end: now, took: now - begun})
			up()
		}
		return records, nil
	})
}

// tlsSetup makes TLS connections one after the other, with one request each.
type tlsSetup struct {
	spec Spec
	seen map[string]string
	mu   sync.Mutex
}

func (d *tlsSetup) facts() map[string]string { return d.seen }

func (d *tlsSetup) run(ctx context.Context, clk clock, ready func()) ([]record, error) {
	return workers(ctx, d.spec.Conns, ready, func(ctx context.Context, i int, up func()) ([]record, error) {
		var s session
		cfg := d.spec.TLS.config(d.spec.Name, s.cache(d.spec.TLS.Resume))
		records := make([]record, 0, 1<<14)
		for n := uint64(0); ctx.Err() == nil; n++ {
			begun := clk.now()
			state, err := d.once(ctx, cfg, uint64(i), n)
			if err != nil {
				return records, err
			}
			now := clk.now()
			if d.spec.TLS.Resume {
				if n == 0 {
					continue // nothing to resume yet
				}
				if !state.DidResume {
					return records, fmt.Errorf("connection %d of worker %d was not resumed: %w", n, i, ErrHandshake)
				}
			}
			records = append(records, record{end: now, took: now - begun})
			d.mu.Lock()
			if d.seen == nil {
				d.seen = describe(state)
			}
			d.mu.Unlock()
			up()
		}
		return records, nil
	})
}

func (d *tlsSetup) once(ctx context.Context, cfg *tls.Config, conn, seq uint64) (tls.ConnectionState, error) {
	raw, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp4", d.spec.Addr.String())
	if err != nil {
		return tls.ConnectionState{}, err
	}
	c := tls.Client(raw, cfg)
	defer c.Close()
	// A deadline instead of a context with callbacks: it costs the client a tenth as much a connection.
	raw.SetDeadline(time.Now().Add(connectTimeout))
	if err := c.Handshake(); err != nil {
		return tls.ConnectionState{}, fmt.Errorf("%w: %w", ErrHandshake, err)
	}
	var buf [wire.Size]byte
	if err := roundTrip(c, &buf, conn, seq); err != nil {
		return tls.ConnectionState{}, err
	}
	return c.ConnectionState(), nil
}
