package wireguard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// EndpointRec is where a peer was last heard from.
type EndpointRec struct {
	Endpoint      netip.AddrPort
	LastHandshake time.Time
}

// EndpointStore keeps endpoints over a restart of the process. What is lost
// costs a guest up to 25 s without a tunnel, nothing else.
type EndpointStore interface {
	LoadEndpoints() (map[wgtypes.Key]EndpointRec, error)
	SaveEndpoints(map[wgtypes.Key]EndpointRec) error
}

// EndpointFile is an EndpointStore in a JSON file of mode 0600: guests'
// addresses are nobody else's business.
type EndpointFile string

var _ EndpointStore = EndpointFile("")

type endpointDoc struct {
	Version int             `json:"version"` // 1
	Peers   []endpointEntry `json:"peers"`
}

type endpointEntry struct {
	PublicKey     string `json:"public_key"`     // base64
	Endpoint      string `json:"endpoint"`       // ip:port
	LastHandshake int64  `json:"last_handshake"` // Unix seconds
}

// LoadEndpoints reads the file. A missing file is an empty result.
func (f EndpointFile) LoadEndpoints() (map[wgtypes.Key]EndpointRec, error) {
	text, err := os.ReadFile(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m, err := parseEndpoints(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", string(f), err)
	}
	return m, nil
}

// parseEndpoints skips entries it cannot read: the file is a cache.
func parseEndpoints(text []byte) (map[wgtypes.Key]EndpointRec, error) {
	var doc endpointDoc
	if err := json.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	if doc.Version != 1 {
		return nil, fmt.Errorf("version %d is not known, 1 is", doc.Version)
	}
	m := make(map[wgtypes.Key]EndpointRec, len(doc.Peers))
	for _, e := range doc.Peers {
		key, err := wgtypes.ParseKey(e.PublicKey)
		if err != nil {
			continue
		}
		ep, err := netip.ParseAddrPort(e.Endpoint)
		if err != nil || ep.Port() == 0 || ep.Addr().IsUnspecified() || ep.Addr().IsMulticast() {
			continue
		}
		m[key] = EndpointRec{Endpoint: ep, LastHandshake: time.Unix(e.LastHandshake, 0)}
	}
	return m, nil
}

// SaveEndpoints replaces the file.
func (f EndpointFile) SaveEndpoints(m map[wgtypes.Key]EndpointRec) error {
	doc := endpointDoc{Version: 1, Peers: make([]endpointEntry, 0, len(m))}
	for k, e := range m {
		doc.Peers = append(doc.Peers, endpointEntry{k.String(), e.Endpoint.String(), e.LastHandshake.Unix()})
	}
	text, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	return writeFile(string(f), text)
}

// loadEndpoints reads the store at start. Failing is survivable.
func (d *Device) loadEndpoints() {
	if d.opt.Endpoints == nil {
		return
	}
	m, err := d.opt.Endpoints.LoadEndpoints()
	if err != nil {
		d.log.Warn("the saved WireGuard endpoints are unreadable: instances come back when they call in, which takes up to 25 s",
			slog.String("error", err.Error()))
		return
	}
	maps.Copy(d.endpoints, m)
	d.saved = maps.Clone(d.endpoints)
}

// noteEndpoints takes the endpoints of a fresh table over, with mu held, and
// forgets those too old to be given back.
func (d *Device) noteEndpoints(t *Table) {
	for k, p := range t.Peers {
		if p.Endpoint.IsValid() && !p.LastHandshake.IsZero() {
			d.endpoints[k] = EndpointRec{Endpoint: p.Endpoint, LastHandshake: p.LastHandshake}
		}
	}
	for k, e := range d.endpoints {
		if t.Taken.Sub(e.LastHandshake) > d.opt.EndpointMaxAge {
			delete(d.endpoints, k)
		}
	}
}

// saveEndpoints writes the store if an endpoint changed, or the saved handshake
// times fell behind so far that a restart would distrust them. refreshMu is held.
func (d *Device) saveEndpoints(force bool) {
	if d.opt.Endpoints == nil || (!force && time.Since(d.lastSave) < d.opt.EndpointInterval) {
		return
	}
	d.mu.Lock()
	now := maps.Clone(d.endpoints)
	d.mu.Unlock()
	same := maps.EqualFunc(now, d.saved, func(a, b EndpointRec) bool {
		return a.Endpoint == b.Endpoint && a.LastHandshake.Sub(b.LastHandshake) < d.opt.EndpointMaxAge/4
	})
	if same {
		return
	}
	d.lastSave = time.Now()
	if err := d.opt.Endpoints.SaveEndpoints(now); err != nil {
		d.endpointLog.failed(err, "after a restart instances come back only when they call in, which takes up to 25 s")
		return
	}
	d.endpointLog.ok()
	d.saved = now
}
