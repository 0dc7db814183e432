package wire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// recordHeader is the length of a TLS record header (RFC 8446 5.1).
const recordHeader = 5

// MaxHello bounds the one record a ClientHello of this bench arrives in (RFC 8446 5.1: 2^14 bytes of plaintext).
const MaxHello = recordHeader + 1<<14

// ErrNotHello says that a connection did not start with a TLS handshake record.
var ErrNotHello = errors.New("not a TLS handshake record")

// Hello returns one TLS record with a ClientHello for serverName, as crypto/tls sends it. With postQuantum it
// carries an X25519MLKEM768 key share as current browsers do, which makes it longer than one Ethernet segment.
func Hello(serverName string, postQuantum bool) ([]byte, error) {
	curves := []tls.CurveID{tls.X25519}
	if postQuantum {
		curves = []tls.CurveID{tls.X25519MLKEM768, tls.X25519}
	}
	rec := &recorder{}
	cfg := &tls.Config{ServerName: serverName, MinVersion: tls.VersionTLS12, CurvePreferences: curves, InsecureSkipVerify: true}
	// The handshake must fail, as recorder answers nothing; the bytes written before that are the hello.
	if err := tls.Client(rec, cfg).HandshakeContext(context.Background()); err == nil {
		return nil, errors.New("building a ClientHello: handshake with nobody succeeded")
	}
	n, err := HelloLen(rec.first)
	if err != nil || n != len(rec.first) {
		return nil, fmt.Errorf("building a ClientHello: crypto/tls wrote %d bytes, one record of %d expected: %w", len(rec.first), n, err)
	}
	return rec.first, nil
}

// HelloLen returns the length in bytes of the TLS record that starts b, 0 if b is too short to tell.
// Errors: ErrNotHello, also for a record longer than MaxHello.
func HelloLen(b []byte) (int, error) {
	if len(b) > 0 && b[0] != 22 || len(b) > 1 && b[1] != 3 {
		return 0, fmt.Errorf("connection starts with % x: %w", b[:min(len(b), recordHeader)], ErrNotHello)
	}
	if len(b) < recordHeader {
		return 0, nil
	}
	n := recordHeader + int(b[3])<<8 + int(b[4])
	if n > MaxHello {
		return 0, fmt.Errorf("handshake record of %d bytes, at most %d allowed: %w", n, MaxHello, ErrNotHello)
	}
	return n, nil
}

// recorder keeps what is written and answers with end of file.
type recorder struct{ first []byte }

func (r *recorder) Write(b []byte) (int, error) {
	r.first = append(r.first, b...)
	return len(b), nil
}
func (r *recorder) Read([]byte) (int, error)         { return 0, io.EOF }
func (r *recorder) Close() error                     { return nil }
func (r *recorder) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (r *recorder) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (r *recorder) SetDeadline(time.Time) error      { return nil }
func (r *recorder) SetReadDeadline(time.Time) error  { return nil }
func (r *recorder) SetWriteDeadline(time.Time) error { return nil }
