package clienthello_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"

	"github.com/dstack-gw/dstack-gw/dataplane/clienthello"
)

// goHello returns the first flight of a crypto/tls client.
func goHello(t testing.TB, cfg *tls.Config) []byte {
	t.Helper()
	var sent bytes.Buffer
	if err := tls.Client(recorder{w: &sent}, cfg).HandshakeContext(context.Background()); err == nil {
		t.Fatal("a handshake with nobody succeeded")
	}
	return sent.Bytes()
}

// recorder is a connection on which only the client talks.
type recorder struct {
	net.Conn
	w io.Writer
}

func (r recorder) Write(b []byte) (int, error) { return r.w.Write(b) }
func (r recorder) Read([]byte) (int, error)    { return 0, io.EOF }
func (r recorder) Close() error                { return nil }

func TestGoClient(t *testing.T) {
	name, err := clienthello.SNI(goHello(t, &tls.Config{ServerName: "App.Example.COM"}), nil)
	if err != nil || string(name) != "app.example.com" {
		t.Fatalf("%q, %v", name, err)
	}
}
