package rpc

import (
	"cmp"
	"slices"
	"sync"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
)

// cluster is what the store says about nodes and domains, in the form of answers. It is immutable and shared by them.
type cluster struct {
	down bool // this node is marked down
	// nodes are all nodes by id, this one included.
	nodes []store.Node
	// servers and gateways are the nodes that guests are told of, by id.
	servers  []*gatewaypb.WireGuardPeer
	gateways []*gatewaypb.GatewayNodeInfo
	agent    *gatewaypb.GuestAgentConfig
}

// clusterCache keeps the view until the store changes, so that a registration does not decode records.
type clusterCache struct {
	mu    sync.Mutex
	watch *store.Watcher
	cur   *cluster
}

func (s *Server) cluster() *cluster {
	c := &s.view
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.watch.Ready():
		c.watch.Take()
		c.cur = nil
	default:
	}
	if c.cur == nil {
		c.cur = s.readCluster()
	}
	return c.cur
}

func (s *Server) readCluster() *cluster {
	self := s.self()
	status := s.d.Store.NodeStatuses()
	c := &cluster{down: status[self.ID] == store.NodeDown}
	c.nodes = slices.DeleteFunc(s.d.Store.Nodes(), func(n store.Node) bool { return n.ID == self.ID })
	c.nodes = append(c.nodes, self)
	slices.SortFunc(c.nodes, func(a, b store.Node) int { return cmp.Compare(a.ID, b.ID) })
	for _, n := range c.nodes {
		if status[n.ID] == store.NodeDown {
			continue
		}
		c.servers = append(c.servers, &gatewaypb.WireGuardPeer{Pk: n.WGPublicKey, Ip: n.WGIP, Endpoint: n.WGEndpoint})
		// When a node was last seen is left out (0): a guest's answer must be the same while nothing that it configures
		// has changed.
		c.gateways = append(c.gateways, nodeInfo(n, 0))
	}
	c.agent = &gatewaypb.GuestAgentConfig{InternalPort: uint32(s.d.AgentPort), AppAddressNsPrefix: s.d.AppAddressNSPrefix}
	if best, ok := s.bestDomain(); ok {
		c.agent.Domain, c.agent.ExternalPort = best.Domain, uint32(best.Port)
	}
	return c
}

// self is this node's record. The configuration decides, whatever the store holds from earlier.
func (s *Server) self() store.Node {
	n := s.d.Self
	return store.Node{ID: n.NodeID, UUID: n.UUID, URL: n.URL, WGPublicKey: n.WGPublicKey, WGIP: n.WGIP.String(), WGEndpoint: n.WGEndpoint}
}

// bestDomain is the ZT domain with the highest priority among those that this node serves; of equals the last by name.
func (s *Server) bestDomain() (best store.ZTDomain, ok bool) {
	for _, d := range s.d.Store.ZTDomains() {
		if d.Node != nil && *d.Node != s.d.Self.NodeID {
			continue
		}
		if !ok || d.Priority >= best.Priority {
			best, ok = d, true
		}
	}
	return best, ok
}

func nodeInfo(n store.Node, lastSeen uint64) *gatewaypb.GatewayNodeInfo {
	return &gatewaypb.GatewayNodeInfo{
		Id: n.ID, Uuid: n.UUID[:], Url: n.URL, LastSeen: lastSeen, WgPublicKey: n.WGPublicKey, WgIp: n.WGIP, WgEndpoint: n.WGEndpoint,
	}
}
