package rpc

import (
	"bytes"
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// Info names the platform.
func (s *Server) Info(context.Context, *emptypb.Empty) (*gatewaypb.InfoResponse, error) {
	agent := s.cluster().agent
	return &gatewaypb.InfoResponse{
		BaseDomain: agent.GetDomain(), ExternalPort: agent.GetExternalPort(), AppAddressNsPrefix: agent.GetAppAddressNsPrefix(), Version: s.d.Version,
	}, nil
}

// wireText is an error whose text clients know, upper case and all.
type wireText string

func (t wireText) Error() string { return string(t) }

const (
	errNoClientCert wireText = "Client authentication is required"
	errNotGateway   wireText = "Remote app id is not from dstack-gateway"
)

// GetPeers lists the known gateways for callers with the own app id in their certificate.
func (s *Server) GetPeers(ctx context.Context, _ *emptypb.Empty) (*gatewaypb.GetPeersResponse, error) {
	if !s.d.SkipAttestation {
		id := ratls.FromContext(ctx)
		switch {
		case id.AppID == nil:
			return nil, errNoClientCert
		case len(s.d.Self.AppID) == 0 || !bytes.Equal(id.AppID, s.d.Self.AppID):
			return nil, errNotGateway
		}
	}
	resp := &gatewaypb.GetPeersResponse{MyId: s.d.Self.NodeID, MyUrl: s.d.Self.URL}
	addrs := s.d.Store.PeerAddrs()
	addrs[s.d.Self.NodeID] = s.d.Self.URL
	for _, id := range sortedKeys(addrs) {
		resp.Peers = append(resp.Peers, &gatewaypb.PeerInfo{Id: id, Url: addrs[id]})
	}
	return resp, nil
}
