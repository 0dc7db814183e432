package rpc

import (
	"context"

	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

// GetSyncData shows the stored records. There is no ephemeral store: its count is 0.
func (s *Server) GetSyncData(context.Context, *emptypb.Empty) (*gatewaypb.DebugSyncDataResponse, error) {
	resp := &gatewaypb.DebugSyncDataResponse{MyNodeId: uint64(s.d.Self.NodeID), PersistentKeys: count(int64(s.d.Store.Status().Keys))}
	addrs := s.d.Store.PeerAddrs()
	for _, id := range sortedKeys(addrs) {
		resp.PeerAddrs = append(resp.PeerAddrs, &gatewaypb.PeerAddrEntry{NodeId: uint64(id), Url: addrs[id]})
	}
	for _, n := range s.d.Store.Nodes() {
		resp.Nodes = append(resp.Nodes, &gatewaypb.NodeInfoEntry{NodeId: uint64(n.ID), Url: n.URL, WgPublicKey: n.WGPublicKey, WgEndpoint: n.WGEndpoint, WgIp: n.WGIP})
	}
	for _, i := range s.d.Store.Instances() {
		resp.Instances = append(resp.Instances, &gatewaypb.InstanceEntry{InstanceId: i.ID, AppId: i.AppID, Ip: i.IP.String(), PublicKey: i.PublicKey})
	}
	return resp, nil
}

// GetProxyState shows what is registered in memory.
func (s *Server) GetProxyState(context.Context, *emptypb.Empty) (*gatewaypb.DebugProxyStateResponse, error) {
	resp := new(gatewaypb.DebugProxyStateResponse)
	for _, i := range s.d.Registry.List() {
		resp.Instances = append(resp.Instances, &gatewaypb.ProxyStateInstance{InstanceId: i.ID, AppId: i.AppID, Ip: i.IP.String(), PublicKey: i.PublicKey, RegTime: i.RegTime})
	}
	for _, a := range s.d.Registry.Allocated() {
		resp.AllocatedAddresses = append(resp.AllocatedAddresses, a.String())
	}
	return resp, nil
}
