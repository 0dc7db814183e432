package hostname_test

import (
	"testing"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

// TestReserved is the table of gateway spec 4.4.
func TestReserved(t *testing.T) {
	const (
		gatewayText = "Only port 80 is supported for this node"
		healthText  = "Only port 80 is supported for health checks"
	)
	for _, tt := range []struct {
		label   string
		service hostname.Service
		err     string
	}{
		{"gateway", hostname.GatewayService, ""},
		{"gateway-80", hostname.GatewayService, ""},
		{"gateway-g", hostname.GatewayService, ""},
		{"gateway-8080", hostname.GatewayService, gatewayText},
		{"gateway-8080g", hostname.GatewayService, gatewayText},
		{"gateway-s", hostname.NoService, ""},
		{"gateway-80s", hostname.NoService, ""},
		{"health", hostname.HealthService, ""},
		{"health-443", hostname.HealthService, healthText},
		{"health-s", hostname.NoService, ""},
		{"localhost", hostname.LocalhostService, ""},
		{"localhost-8080", hostname.LocalhostService, ""},
		{"localhost-8443s", hostname.LocalhostService, ""},
		{"Gateway", hostname.NoService, ""},
		{"gateways", hostname.NoService, ""},
		{"myapp-8080", hostname.NoService, ""},
	} {
		target, err := hostname.ParseLabel(tt.label)
		if err != nil {
			t.Fatalf("%s: %v", tt.label, err)
		}
		service := target.Service()
		if service != tt.service {
			t.Errorf("%s: service %d, want %d", tt.label, service, tt.service)
		}
		text := ""
		if err := service.CheckPort(target.Port); err != nil {
			text = err.Error()
		}
		if text != tt.err {
			t.Errorf("%s: port error %q, want %q", tt.label, text, tt.err)
		}
	}
	for id, want := range map[string]hostname.Service{
		"gateway":   hostname.GatewayService,
		"health":    hostname.HealthService,
		"localhost": hostname.LocalhostService,
		"":          hostname.NoService,
		"app":       hostname.NoService,
	} {
		if got := hostname.Reserved(id); got != want {
			t.Errorf("Reserved(%q) = %d, want %d", id, got, want)
		}
	}
}
