package rpc

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
)

const (
	// online is the age of a handshake up to which GetMeta counts an instance.
	online = 300 * time.Second
	// refreshTimeout is how long Status waits for new handshakes before it reports the ones it has.
	refreshTimeout = 2 * time.Second
)

// Status reports instances, nodes and counters. Handshakes are read anew.
func (s *Server) Status(ctx context.Context, _ *emptypb.Empty) (*gatewaypb.StatusResponse, error) {
	refresh, cancel := context.WithTimeout(ctx, refreshTimeout)
	if err := s.d.Tunnels.Refresh(refresh); err != nil {
		s.log.Debug("Status shows older handshakes: the WireGuard device was not read", "error", err)
	}
	cancel()
	cluster, table := s.cluster(), s.d.Tunnels.Handshakes()
	resp := &gatewaypb.StatusResponse{
		Id: s.d.Self.NodeID, Url: s.d.Self.URL, BootnodeUrl: s.d.Self.BootnodeURL, Uuid: s.d.Self.UUID[:],
		NumConnections: count(s.d.Proxy.Connections()),
		Accel: &gatewaypb.ProxyAccelStatus{
			KtlsMode: s.d.KTLS, SpliceMode: SpliceMode(s.d.Splice), SpliceEngaged: s.d.Proxy.SpliceEngaged(),
		},
	}
	for _, i := range s.d.Registry.List() {
		resp.Hosts = append(resp.Hosts, s.hostInfo(i, cluster, table))
	}
	for _, n := range cluster.nodes {
		var seen uint64
		if n.ID == s.d.Self.NodeID {
			seen = unix(s.now())
		}
		resp.Nodes = append(resp.Nodes, nodeInfo(n, seen))
	}
	return resp, nil
}

func (s *Server) hostInfo(i registry.Instance, c *cluster, t *wireguard.Table) *gatewaypb.HostInfo {
	return &gatewaypb.HostInfo{
		InstanceId: i.ID, Ip: i.IP.String(), AppId: i.AppID, BaseDomain: c.agent.GetDomain(),
		LatestHandshake: handshake(t, i.PublicKey), NumConnections: count(s.d.InstanceConnections(i.ID)),
	}
}

// handshake is the time of a peer's latest one, 0 if there has been none.
func handshake(t *wireguard.Table, publicKey string) uint64 {
	key, err := wgtypes.ParseKey(publicKey)
	if err != nil {
		return 0
	}
	if p, ok := t.Peers[key]; ok && !p.LastHandshake.IsZero() {
		return unix(p.LastHandshake)
	}
	return 0
}

func count(n int64) uint64 { return uint64(max(n, 0)) }

// GetInfo looks an instance up by its instance id.
func (s *Server) GetInfo(_ context.Context, req *gatewaypb.GetInfoRequest) (*gatewaypb.GetInfoResponse, error) {
	i, ok := s.d.Registry.Instance(req.GetId())
	if !ok {
		return &gatewaypb.GetInfoResponse{}, nil
	}
	return &gatewaypb.GetInfoResponse{Found: true, Info: s.hostInfo(i, s.cluster(), s.d.Tunnels.Handshakes())}, nil
}

// GetMeta counts instances.
func (s *Server) GetMeta(context.Context, *emptypb.Empty) (*gatewaypb.GetMetaResponse, error) {
	table, now := s.d.Tunnels.Handshakes(), s.now()
	resp := new(gatewaypb.GetMetaResponse)
	for _, i := range s.d.Registry.List() {
		resp.Registered++
		if key, err := wgtypes.ParseKey(i.PublicKey); err == nil {
			if age, ok := table.Age(key, now); ok && age < online {
				resp.Online++
			}
		}
	}
	return resp, nil
}

// Exit ends the process.
func (s *Server) Exit(_ context.Context, req *gatewaypb.ExitRequest) (*emptypb.Empty, error) {
	s.log.Warn("an operator ends the gateway", "force", req.GetForce())
	s.d.Exit(req.GetForce())
	return &emptypb.Empty{}, nil
}

// SetNodeURL records the RPC URL of a node.
func (s *Server) SetNodeURL(ctx context.Context, req *gatewaypb.SetNodeUrlRequest) (*emptypb.Empty, error) {
	if err := checkNodeURL(req.GetUrl()); err != nil {
		return nil, fmt.Errorf("invalid node url: %w", err)
	}
	if _, err := s.d.Store.SetPeerAddr(ctx, req.GetId(), req.GetUrl()); err != nil {
		return nil, fmt.Errorf("failed to store the url of node %d: %w", req.GetId(), err)
	}
	return &emptypb.Empty{}, nil
}

// checkNodeURL does not repeat the URL: it may hold a password.
func checkNodeURL(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return withoutURL(err)
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("scheme %q is neither http nor https", u.Scheme)
	case u.Hostname() == "":
		return errors.New("it has no host")
	case u.User != nil:
		return errors.New("it must not contain credentials")
	}
	return nil
}

// SetNodeStatus marks a node up or down.
func (s *Server) SetNodeStatus(ctx context.Context, req *gatewaypb.SetNodeStatusRequest) (*emptypb.Empty, error) {
	status := store.NodeStatus(req.GetStatus())
	if status != store.NodeUp && status != store.NodeDown {
		return nil, errors.New("invalid status: expected 'up' or 'down'")
	}
	if _, err := s.d.Store.SetNodeStatus(ctx, req.GetId(), status); err != nil {
		return nil, fmt.Errorf("failed to store the status of node %d: %w", req.GetId(), err)
	}
	s.log.Info("a node was marked", "node", req.GetId(), "status", string(status))
	return &emptypb.Empty{}, nil
}

// GetNodeStatuses lists the marks by node id.
func (s *Server) GetNodeStatuses(context.Context, *emptypb.Empty) (*gatewaypb.GetNodeStatusesResponse, error) {
	resp := new(gatewaypb.GetNodeStatusesResponse)
	statuses := s.d.Store.NodeStatuses()
	for _, id := range sortedKeys(statuses) {
		resp.Statuses = append(resp.Statuses, &gatewaypb.NodeStatusEntry{NodeId: id, Status: string(statuses[id])})
	}
	return resp, nil
}

func sortedKeys[V any](m map[uint32]V) []uint32 {
	keys := make([]uint32, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// WaveKvStatus describes the store in the terms of upstream's replication, which does not run here:
//
//	enabled                 false: there is no gossip
//	persistent.n_keys       keys in the store
//	persistent.next_seq     the revision that the next write gets
//	persistent.dirty        writes wait for etcd (in the journal or in memory)
//	persistent.wal_enabled  writes are durable, in etcd or in the journal
//	persistent.peers        this node alone: revision seen, revision seen, writes that wait
//	ephemeral               empty: counters are not replicated
func (s *Server) WaveKvStatus(context.Context, *emptypb.Empty) (*gatewaypb.WaveKvStatusResponse, error) {
	st, me := s.d.Store.Status(), s.d.Self.NodeID
	seen := []*gatewaypb.LastSeenEntry{{NodeId: me, Timestamp: unix(s.now())}}
	revision := count(st.Revision)
	return &gatewaypb.WaveKvStatusResponse{
		Persistent: &gatewaypb.StoreSyncStatus{
			Name: "persistent", NodeId: me, NKeys: count(int64(st.Keys)), NextSeq: revision + 1,
			Dirty: st.Pending > 0, WalEnabled: st.Volatile == 0,
			Peers: []*gatewaypb.PeerSyncStatus{{Id: me, LocalAck: revision, PeerAck: revision, BufferedLogs: count(int64(st.Pending)), LastSeen: seen}},
		},
		Ephemeral: &gatewaypb.StoreSyncStatus{
			Name: "ephemeral", NodeId: me, NextSeq: 1,
			Peers: []*gatewaypb.PeerSyncStatus{{Id: me, LastSeen: seen}},
		},
	}, nil
}

// GetInstanceHandshakes shows when this node last heard an instance; of an unknown one nothing.
func (s *Server) GetInstanceHandshakes(_ context.Context, req *gatewaypb.GetInstanceHandshakesRequest) (*gatewaypb.GetInstanceHandshakesResponse, error) {
	resp := new(gatewaypb.GetInstanceHandshakesResponse)
	if i, ok := s.d.Registry.Instance(req.GetInstanceId()); ok {
		resp.Handshakes = append(resp.Handshakes, &gatewaypb.HandshakeEntry{
			ObserverNodeId: s.d.Self.NodeID, Timestamp: handshake(s.d.Tunnels.Handshakes(), i.PublicKey),
		})
	}
	return resp, nil
}

// GetGlobalConnections adds up the open connections to registered instances.
func (s *Server) GetGlobalConnections(context.Context, *emptypb.Empty) (*gatewaypb.GlobalConnectionsStats, error) {
	var total uint64
	for _, i := range s.d.Registry.List() {
		total += count(s.d.InstanceConnections(i.ID))
	}
	return &gatewaypb.GlobalConnectionsStats{TotalConnections: total, NodeConnections: map[uint32]uint64{s.d.Self.NodeID: total}}, nil
}
