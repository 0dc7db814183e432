package cvm

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
)

// InstanceHeader tells a gRPC client in the response's header which CVM
// answered.
const InstanceHeader = "x-dstack-instance"

// grpcHandler serves gRPC's health check and reflection, and a page to whoever
// does not speak gRPC. It wants HTTP/2 without TLS.
func grpcHandler(c *Config) http.Handler {
	header := metadata.Pairs(InstanceHeader, c.Name)
	s := grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if err := grpc.SetHeader(ctx, header); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if err := stream.SetHeader(header); err != nil {
				return err
			}
			return h(srv, stream)
		}),
	)
	healthpb.RegisterHealthServer(s, health.NewServer())
	reflection.Register(s)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			s.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprint(w, page(c, PortGRPC, r.Proto))
	})
}

// page is what every server of a CVM answers; the end differs.
func page(c *Config, port int, how string) string {
	return fmt.Sprintf("%s instance %s port %d %s\n", c.Name, c.InstanceID, port, how)
}
