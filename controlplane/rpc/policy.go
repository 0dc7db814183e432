package rpc

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

func portAttrs(p *gatewaypb.PortPolicy) []registry.PortAttr {
	out := make([]registry.PortAttr, len(p.GetPorts()))
	for n, a := range p.GetPorts() {
		out[n] = registry.PortAttr{Port: a.GetPort(), PP: a.GetPp()}
	}
	return out
}

// policyMessage is nil for an unknown policy. Ports ascend.
func policyMessage(p *registry.PortPolicy) *gatewaypb.PortPolicy {
	if p == nil {
		return nil
	}
	m := &gatewaypb.PortPolicy{RestrictMode: p.Restrict}
	for _, a := range p.List() {
		m.Ports = append(m.Ports, &gatewaypb.PortAttrs{Port: a.Port, Pp: a.PP})
	}
	return m
}

// SetInstancePortPolicy overrides what an instance reported about itself.
func (s *Server) SetInstancePortPolicy(ctx context.Context, req *gatewaypb.SetInstancePortPolicyRequest) (*emptypb.Empty, error) {
	p := req.GetPolicy()
	if p == nil {
		return nil, errors.New("port policy is required")
	}
	policy, err := registry.ParseAdminPolicy(portAttrs(p), p.GetRestrictMode())
	if err != nil {
		return nil, err
	}
	id := req.GetInstanceId()
	return done(s.edit(ctx, id, func() (registry.Instance, bool, error) { return s.d.Registry.SetAdminPolicy(id, policy) }))
}

// ClearInstancePortPolicy takes the override away; without one it succeeds.
func (s *Server) ClearInstancePortPolicy(ctx context.Context, req *gatewaypb.ClearInstancePortPolicyRequest) (*emptypb.Empty, error) {
	id := req.GetInstanceId()
	return done(s.edit(ctx, id, func() (registry.Instance, bool, error) { return s.d.Registry.ClearAdminPolicy(id) }))
}

// GetInstancePortPolicy shows the policy in force and where it comes from.
func (s *Server) GetInstancePortPolicy(_ context.Context, req *gatewaypb.GetInstancePortPolicyRequest) (*gatewaypb.GetInstancePortPolicyResponse, error) {
	i, ok := s.d.Registry.Instance(req.GetInstanceId())
	if !ok {
		return nil, fmt.Errorf("instance %s %w", req.GetInstanceId(), registry.ErrNotFound)
	}
	effective, source := i.Effective()
	return &gatewaypb.GetInstancePortPolicyResponse{
		Effective: policyMessage(effective), Source: string(source),
		InstanceReported: policyMessage(i.Policy), AdminOverride: policyMessage(i.AdminPolicy),
	}, nil
}

func done(err error) (*emptypb.Empty, error) {
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}
