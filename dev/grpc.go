package dev

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/dstack-gw/dstack-gw/dev/cvm"
)

// GRPC makes one health check through the gateway and prints the status and who
// answered. label is the first label of the host name ("<app>-50051g") or the
// whole name.
func GRPC(ctx context.Context, stateDir, label string, out io.Writer) error {
	f, err := ReadFacts(stateDir)
	if err != nil {
		return err
	}
	host := label
	if !strings.Contains(label, ".") {
		host += "." + f.BaseDomain
	}
	text, err := os.ReadFile(f.WebCA)
	if err != nil {
		return fmt.Errorf("read the web CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return fmt.Errorf("no certificate in %s", f.WebCA)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+host,
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", f.Proxy)
		}))
	if err != nil {
		return fmt.Errorf("gRPC to %s: %w", host, err)
	}
	defer conn.Close()
	var header metadata.MD
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.Header(&header))
	if err != nil {
		return fmt.Errorf("gRPC health check of %s through %s: %w", host, f.Proxy, err)
	}
	_, err = fmt.Fprintln(out, resp.Status, strings.Join(header.Get(cvm.InstanceHeader), " "))
	return err
}
