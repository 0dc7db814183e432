package cvm

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"

	"google.golang.org/protobuf/types/known/emptypb"

	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
)

// agentHandler is as much of a guest agent as a gateway asks (guest spec 8.6):
// Info with the app's compose file, from which the port policy is read.
func agentHandler(c *Config) (http.Handler, error) {
	compose, err := ParseCompose(c.Compose)
	if err != nil {
		return nil, err
	}
	instance, err := hex.DecodeString(c.InstanceID)
	if err != nil {
		return nil, fmt.Errorf("instance id: %w", err)
	}
	// Measurements are absent, as on platforms without TDX: there is no TEE.
	tcb, err := json.MarshalIndent(map[string]any{
		"compose_hash": hex.EncodeToString(compose.Hash[:]),
		"event_log":    []any{},
		"app_compose":  c.Compose,
	}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode tcb_info: %w", err)
	}
	info := &guestpb.AppInfo{
		AppId:        compose.AppID[:],
		InstanceId:   instance,
		TcbInfo:      string(tcb),
		AppName:      compose.Name,
		ComposeHash:  compose.Hash[:],
		CloudVendor:  "dstack dev",
		CloudProduct: c.Name,
	}
	s := prpc.NewService("Worker", "Worker.")
	prpc.Handle(s, "Info", func(context.Context, *emptypb.Empty) (*guestpb.AppInfo, error) { return info, nil })
	mux := http.NewServeMux()
	mux.Handle("/prpc/", http.StripPrefix("/prpc", s.Handler(prpc.Options{})))
	return mux, nil
}
