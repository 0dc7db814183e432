package cvm

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

// Compose is the part of an app-compose.json that matters here, and the ids that
// follow from its text.
type Compose struct {
	Name string
	// Hash is the SHA-256 of the exact text.
	Hash [32]byte
	// AppID is the first 20 bytes of Hash, the default of every dstack platform.
	AppID [20]byte
	// Policy is nil when the file has none.
	Policy *gatewaypb.PortPolicy
}

// AppIDHex is the app id as it appears in names.
func (c *Compose) AppIDHex() string { return hex.EncodeToString(c.AppID[:]) }

// ParseCompose reads an app-compose.json (guest spec 4.1).
func ParseCompose(text string) (*Compose, error) {
	var f struct {
		ManifestVersion int    `json:"manifest_version"`
		Name            string `json:"name"`
		Runner          string `json:"runner"`
		PortPolicy      *struct {
			Ports []struct {
				Port uint16 `json:"port"`
				PP   bool   `json:"pp"`
			} `json:"ports"`
			RestrictMode bool `json:"restrict_mode"`
		} `json:"port_policy"`
	}
	if err := json.Unmarshal([]byte(text), &f); err != nil {
		return nil, fmt.Errorf("app-compose: %w", err)
	}
	if f.ManifestVersion < 1 || f.Name == "" || f.Runner == "" {
		return nil, errors.New("app-compose: manifest_version, name and runner are mandatory")
	}
	c := &Compose{Name: f.Name, Hash: sha256.Sum256([]byte(text))}
	copy(c.AppID[:], c.Hash[:])
	if p := f.PortPolicy; p != nil {
		c.Policy = &gatewaypb.PortPolicy{RestrictMode: p.RestrictMode}
		for _, a := range p.Ports {
			c.Policy.Ports = append(c.Policy.Ports, &gatewaypb.PortAttrs{Port: uint32(a.Port), Pp: a.PP})
		}
	}
	return c, nil
}
