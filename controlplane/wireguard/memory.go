package wireguard

import (
	"net/netip"
	"sync"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// memory is the backend of mode None: it holds peers that never speak.
type memory struct {
	mu    sync.Mutex
	own   devState
	peers map[wgtypes.Key]netip.Addr
}

func newMemory() *memory { return &memory{peers: make(map[wgtypes.Key]netip.Addr)} }

func (m *memory) dump() (*devState, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := m.own
	for k, ip := range m.peers {
		st.peers = append(st.peers, devPeer{key: k, allowed: netip.PrefixFrom(ip, ip.BitLen()), nAllowed: 1})
	}
	return &st, nil
}

func (m *memory) apply(c change) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.privateKey != nil {
		m.own.privateKey = *c.privateKey
	}
	if c.listenPort != nil {
		m.own.listenPort = *c.listenPort
	}
	for _, p := range c.peers {
		if p.remove {
			delete(m.peers, p.key)
		} else {
			m.peers[p.key] = p.ip
		}
	}
	return nil
}

func (m *memory) close() error { return nil }
