package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// IdentityOptions configures LoadIdentity (gateway spec 1.4, [tls]).
type IdentityOptions struct {
	KeyPath   string // tls.key
	CertsPath string // tls.certs, leaf first
	CAPath    string // tls.mutual.ca_certs
	// Mandatory refuses clients without a certificate in the handshake. A
	// client that presents one that does not verify is refused either way.
	Mandatory bool
	Logger    *slog.Logger     // default slog.Default()
	Now       func() time.Time // default time.Now
}

// Identity is the gateway's own certificate: that of the RPC listener, and what
// it shows to its peers. It can be replaced while connections are served.
type Identity struct {
	opt  IdentityOptions
	log  *slog.Logger
	mu   sync.Mutex // one Reload at a time
	cur  atomic.Pointer[identity]
	base *tls.Config
}

// identity is one loaded state.
type identity struct {
	cert   *tls.Certificate
	cas    []*x509.Certificate
	pool   *x509.CertPool // all of cas
	server *tls.Config
}

// LoadIdentity reads the files. The error names the one that is missing or
// wrong and is meant to end the process.
func LoadIdentity(opt IdentityOptions) (*Identity, error) {
	for _, f := range []struct{ key, path string }{
		{"tls.key", opt.KeyPath}, {"tls.certs", opt.CertsPath}, {"tls.mutual.ca_certs", opt.CAPath},
	} {
		if f.path == "" {
			return nil, fmt.Errorf("load the RPC certificate: %s is not set", f.key)
		}
	}
	if opt.Logger == nil {
		opt.Logger = slog.Default()
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	id := &Identity{opt: opt, log: opt.Logger}
	if err := id.Reload(); err != nil {
		return nil, err
	}
	// Session ticket keys belong to this config and outlive a reload; sessions
	// of clients whose authority is gone do not resume, crypto/tls sees to it.
	id.base = id.cur.Load().server.Clone()
	id.base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return id.cur.Load().server, nil
	}
	return id, nil
}

// Reload reads the files again. On an error the previous state stays.
func (id *Identity) Reload() error {
	id.mu.Lock()
	defer id.mu.Unlock()
	cert, err := loadPair(id.opt.CertsPath, id.opt.KeyPath)
	if err != nil {
		return fmt.Errorf("load the RPC certificate: %w", err)
	}
	text, err := readPEM(id.opt.CAPath)
	if err != nil {
		return fmt.Errorf("load the authorities of RPC clients: %w", err)
	}
	cas, err := parseChain(text)
	if err != nil {
		return fmt.Errorf("load the authorities of RPC clients: %s: %w", id.opt.CAPath, err)
	}
	if !id.opt.Now().Before(cert.Leaf.NotAfter) {
		id.log.Warn("the RPC certificate is expired: guests will refuse it",
			slog.String("file", id.opt.CertsPath), slog.Time("expired", cert.Leaf.NotAfter))
	}
	if len(cert.Leaf.Subject.Names) == 0 {
		id.log.Warn("the RPC certificate has no subject: it cannot serve as the client identity towards other gateways",
			slog.String("file", id.opt.CertsPath))
	}
	pool := x509.NewCertPool()
	for _, c := range cas {
		pool.AddCert(c)
	}
	next := &identity{cert: cert, cas: cas, pool: pool}
	next.server = &tls.Config{
		MinVersion:       tls.VersionTLS12,
		NextProtos:       []string{"h2", "http/1.1"},
		Certificates:     []tls.Certificate{*cert},
		ClientCAs:        pool,
		ClientAuth:       tls.VerifyClientCertIfGiven,
		VerifyConnection: requireSubject,
		Time:             id.opt.Now,
	}
	if id.opt.Mandatory {
		next.server.ClientAuth = tls.RequireAndVerifyClientCert
	}
	old := id.cur.Swap(next)
	if old == nil || !sameChain(old.cert, cert) {
		id.log.Info("RPC certificate loaded", slog.String("subject", cert.Leaf.Subject.String()),
			slog.String("serial", cert.Leaf.SerialNumber.Text(16)), slog.String("key", keyKind(cert.Leaf)), slog.Time("expires", cert.Leaf.NotAfter))
	}
	return nil
}

// Watch reloads when a file changes, looking every interval (0: 2 s), until ctx
// ends.
func (id *Identity) Watch(ctx context.Context, interval time.Duration) {
	w := fileWatch{
		paths: []string{id.opt.KeyPath, id.opt.CertsPath, id.opt.CAPath},
		load:  id.Reload,
		log:   id.log,
		what:  "RPC certificate",
	}
	w.run(ctx, interval)
}

// ServerConfig is for the RPC listener: TLS 1.2 and 1.3, h2 and http/1.1,
// client certificates verified against the authorities. Every handshake uses
// the certificate and the authorities of its moment. The result is the
// caller's; each has session ticket keys of its own.
func (id *Identity) ServerConfig() *tls.Config { return id.base.Clone() }

// ClientConfig is for calls to peers whose names are verified against the first
// authority, showing the gateway's own certificate. It is as of now: take a new
// one for each connection.
func (id *Identity) ClientConfig() *tls.Config {
	cur := id.cur.Load()
	roots := x509.NewCertPool()
	roots.AddCert(cur.cas[0])
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		RootCAs:    roots,
		// Not Certificates: those are sent only to servers that name our issuer.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cur.cert, nil },
		Time:                 id.opt.Now,
	}
}

// Certificate is the current one, with Leaf set.
func (id *Identity) Certificate() *tls.Certificate { return id.cur.Load().cert }

// TrustAnchor is the authority peers are verified against: the first of
// tls.mutual.ca_certs.
func (id *Identity) TrustAnchor() *x509.Certificate { return id.cur.Load().cas[0] }

// ClientCAs are the authorities of RPC clients.
func (id *Identity) ClientCAs() *x509.CertPool { return id.cur.Load().pool }

// requireSubject refuses a client certificate without a subject (gateway spec
// 1.4). Unlike a peer certificate callback it also runs for resumed sessions.
func requireSubject(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) > 0 && len(cs.PeerCertificates[0].Subject.Names) == 0 {
		return errors.New("the client certificate has no subject")
	}
	return nil
}
