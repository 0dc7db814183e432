package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

// errDomain is what callers get for a domain that is not configured.
var errDomain = errors.New("ZT-Domain config not found")

func (s *Server) domainInfo(d store.ZTDomain) *gatewaypb.ZtDomainInfo {
	c := &gatewaypb.ZtDomainConfig{Domain: d.Domain, Port: uint32(d.Port), Node: d.Node, Priority: d.Priority}
	if d.DNSCredID != "" {
		c.DnsCredId = proto.String(d.DNSCredID)
	}
	status := &gatewaypb.ZtDomainCertStatus{LoadedInMemory: s.d.Certs.Get(d.Domain) != nil}
	if data, ok := s.d.Store.CertData(d.Domain); ok {
		status.HasCert, status.NotAfter, status.IssuedBy, status.IssuedAt = true, data.NotAfter, data.IssuedBy, data.IssuedAt
	}
	return &gatewaypb.ZtDomainInfo{Config: c, CertStatus: status}
}

// ListZtDomains lists the configured domains by name.
func (s *Server) ListZtDomains(context.Context, *emptypb.Empty) (*gatewaypb.ListZtDomainsResponse, error) {
	resp := new(gatewaypb.ListZtDomainsResponse)
	for _, d := range s.d.Store.ZTDomains() {
		resp.Domains = append(resp.Domains, s.domainInfo(d))
	}
	return resp, nil
}

// GetZtDomain shows one domain.
func (s *Server) GetZtDomain(_ context.Context, req *gatewaypb.GetZtDomainRequest) (*gatewaypb.ZtDomainInfo, error) {
	name, err := hostname.NormalizeDomain(req.GetDomain())
	if err != nil {
		return nil, err
	}
	d, ok := s.d.Store.ZTDomain(name)
	if !ok {
		return nil, errDomain
	}
	return s.domainInfo(d), nil
}

// AddZtDomain makes a domain a platform domain: names under it are routed from now on, those that terminate TLS as soon
// as there is a certificate.
func (s *Server) AddZtDomain(ctx context.Context, req *gatewaypb.ZtDomainConfig) (*gatewaypb.ZtDomainInfo, error) {
	d, err := domainConfig(req)
	if err != nil {
		return nil, err
	}
	err = s.d.Store.CreateZTDomain(ctx, d)
	if errors.Is(err, store.ErrExists) {
		return nil, fmt.Errorf("ZT-Domain config already exists: %s", d.Domain)
	}
	return s.domainStored(d, err, "added")
}

// UpdateZtDomain replaces the configuration of a domain.
func (s *Server) UpdateZtDomain(ctx context.Context, req *gatewaypb.ZtDomainConfig) (*gatewaypb.ZtDomainInfo, error) {
	d, err := domainConfig(req)
	if err != nil {
		return nil, err
	}
	return s.domainStored(d, s.d.Store.UpdateZTDomain(ctx, d), "changed")
}

func (s *Server) domainStored(d store.ZTDomain, err error, what string) (*gatewaypb.ZtDomainInfo, error) {
	switch {
	case errors.Is(err, store.ErrNoCredential):
		return nil, store.ErrNoCredential // the text that clients know
	case errors.Is(err, store.ErrNotFound):
		return nil, errDomain
	case err != nil:
		return nil, fmt.Errorf("failed to store the ZT-Domain config: %w", err)
	}
	s.log.Info("ZT domain "+what, "domain", d.Domain, "port", d.Port, "priority", d.Priority)
	s.d.DomainsChanged()
	return s.domainInfo(d), nil
}

// domainConfig checks what can be checked without the store.
func domainConfig(req *gatewaypb.ZtDomainConfig) (store.ZTDomain, error) {
	name, err := hostname.NormalizeDomain(req.GetDomain())
	switch {
	case err != nil:
		return store.ZTDomain{}, err
	case req.GetPort() == 0:
		return store.ZTDomain{}, errors.New("port must be between 1 and 65535")
	case req.GetPort() > math.MaxUint16:
		return store.ZTDomain{}, errors.New("port out of range")
	}
	return store.ZTDomain{Domain: name, DNSCredID: req.GetDnsCredId(), Port: uint16(req.GetPort()), Node: req.Node, Priority: req.GetPriority()}, nil
}

// DeleteZtDomain removes the configuration of a domain. Its certificate stays stored and in use.
func (s *Server) DeleteZtDomain(ctx context.Context, req *gatewaypb.DeleteZtDomainRequest) (*emptypb.Empty, error) {
	name, err := hostname.NormalizeDomain(req.GetDomain())
	if err != nil {
		return nil, err
	}
	err = s.d.Store.DeleteZTDomain(ctx, name)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, errDomain
	case err != nil:
		return nil, fmt.Errorf("failed to delete the ZT-Domain config: %w", err)
	}
	s.log.Info("ZT domain deleted", "domain", name)
	s.d.DomainsChanged()
	return &emptypb.Empty{}, nil
}
