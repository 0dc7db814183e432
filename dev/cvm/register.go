package cvm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// Limits of guests (gateway spec 12.1).
const (
	registerConnect = 5 * time.Second
	registerCall    = 60 * time.Second
)

// register is one RegisterCvm call, with a new connection as in guests. The
// gateway is believed if the platform's CA signed its certificate and that
// carries the app id of the gateway.
func register(ctx context.Context, c *Config, req *gatewaypb.RegisterCvmRequest) (*gatewaypb.RegisterCvmResponse, error) {
	conf, err := clientTLS(c)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		DialContext:         (&net.Dialer{Timeout: registerConnect}).DialContext,
		TLSHandshakeTimeout: registerConnect,
		TLSClientConfig:     conf,
		DisableKeepAlives:   true,
		ForceAttemptHTTP2:   true,
	}
	client, err := prpc.NewClient(registerBase(c.GatewayURL), &http.Client{Timeout: registerCall, Transport: transport})
	if err != nil {
		return nil, err
	}
	resp := new(gatewaypb.RegisterCvmResponse)
	if err := client.Call(ctx, "RegisterCvm", req, resp); err != nil {
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			return nil, fmt.Errorf("%w (does a firewall on this machine drop what comes from the CVMs?)", err)
		}
		return nil, err
	}
	return resp, nil
}

// registerBase appends /prpc unless the URL ends in it.
func registerBase(url string) string {
	url = strings.TrimRight(url, "/")
	if strings.HasSuffix(url, "/prpc") {
		return url
	}
	return url + "/prpc"
}

func clientTLS(c *Config) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(c.Path(FileClientCert), c.Path(FileClientKey))
	if err != nil {
		return nil, fmt.Errorf("load the certificate to register with: %w", err)
	}
	ca, err := os.ReadFile(c.Path(FileCA))
	if err != nil {
		return nil, fmt.Errorf("load the platform's CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("load the platform's CA: no certificate in %s", c.Path(FileCA))
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		RootCAs:      roots,
		Certificates: []tls.Certificate{cert},
		VerifyConnection: func(s tls.ConnectionState) error {
			id, err := ratls.AppID(s.PeerCertificates[0])
			if err != nil {
				return fmt.Errorf("the gateway's certificate: %w", err)
			}
			if got := hex.EncodeToString(id); got != c.GatewayAppID {
				return fmt.Errorf("the server's certificate belongs to app %q, not to the gateway %s", got, c.GatewayAppID)
			}
			return nil
		},
	}, nil
}
