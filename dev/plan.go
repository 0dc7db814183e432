package dev

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/dstack-gw/dstack-gw/dev/cvm"
)

// app is one application and its CVMs. Everything about it follows from its
// name, so ids are the same on every machine.
type app struct {
	name      string
	instances []instance
	// reports says whether its guests report their port policy, as they do since
	// 0.5.9; otherwise the gateway has to ask for it.
	reports bool
	compose string
	id      string
}

// instance is one CVM.
type instance struct {
	name  string
	id    string
	index int // over all apps
}

// plan is what Up builds: two CVMs of one app, one of another.
func plan() ([]app, error) {
	apps := []app{
		{name: "web", reports: true, instances: make([]instance, 2)},
		{name: "api", reports: false, instances: make([]instance, 1)},
	}
	index := 0
	for i := range apps {
		a := &apps[i]
		var err error
		if a.compose, err = composeText(a.name); err != nil {
			return nil, err
		}
		c, err := cvm.ParseCompose(a.compose)
		if err != nil {
			return nil, err
		}
		a.id = c.AppIDHex()
		for j := range a.instances {
			name := fmt.Sprintf("%s-%d", a.name, j+1)
			sum := sha256.Sum256([]byte("dstack dev instance " + name))
			a.instances[j] = instance{name: name, id: hex.EncodeToString(sum[:20]), index: index}
			index++
		}
	}
	return apps, nil
}

// composeText is the app-compose.json. It opens the ports of package cvm but
// for the agent's, and asks for a PROXY header on one of them.
func composeText(name string) (string, error) {
	type port struct {
		Port int  `json:"port"`
		PP   bool `json:"pp"`
	}
	text, err := json.MarshalIndent(struct {
		ManifestVersion   int    `json:"manifest_version"`
		Name              string `json:"name"`
		Runner            string `json:"runner"`
		DockerComposeFile string `json:"docker_compose_file"`
		GatewayEnabled    bool   `json:"gateway_enabled"`
		PortPolicy        any    `json:"port_policy"`
	}{
		ManifestVersion:   2,
		Name:              name,
		Runner:            "docker-compose",
		DockerComposeFile: "services: {web: {image: nginx, network_mode: host}}\n",
		GatewayEnabled:    true,
		PortPolicy: map[string]any{
			"ports": []port{
				{cvm.PortHTTP, false}, {cvm.PortAlt, false}, {cvm.PortTLS, false}, {cvm.PortGRPC, false},
				{cvm.PortProxy, true},
			},
			"restrict_mode": true,
		},
	}, "", "  ")
	return string(text), err
}

// gatewayAppID is the app id of the gateway itself.
func gatewayAppID() [20]byte {
	sum := sha256.Sum256([]byte("dstack dev gateway"))
	return [20]byte(sum[:20])
}

// parentOf is a domain without its first label.
func parentOf(domain string) string {
	_, rest, _ := strings.Cut(domain, ".")
	return rest
}
