package cvm

import (
	"crypto/tls"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-gw/dstack-gw/ratls"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newCA(t *testing.T) *ratls.CA {
	t.Helper()
	ca, err := ratls.NewCA(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// handshake lets conf connect to a server with the given credential.
func handshake(t *testing.T, conf *tls.Config, server *ratls.Credential) error {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{server.TLS()}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.(*tls.Conn).Handshake() // the client tells how it went
	}()
	defer func() { l.Close(); <-done }()
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := tls.DialWithDialer(&d, "tcp", l.Addr().String(), conf)
	if err == nil {
		c.Close()
	}
	return err
}
