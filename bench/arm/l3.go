package arm

import (
	"context"
	"net/netip"
	"os"
	"strings"

	"github.com/dstack-gw/dstack-gw/bench/rig"
)

// L3 is plain IP forwarding: the client talks to the backend itself and the gateway's namespace routes. It is the
// limit for passthrough.
type L3 struct{}

// Name implements Arm.
func (L3) Name() string { return "l3" }

// Check implements Arm.
func (L3) Check() error { return nil }

// Version implements Arm.
func (L3) Version(context.Context) (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	return "Linux " + strings.TrimSpace(string(b)), err
}

// Lacks implements Arm.
func (L3) Lacks(n Need) string {
	switch {
	case n.Mode == Terminate:
		return "forwarding does not terminate TLS"
	case n.Control:
		return "nothing to register with"
	}
	return ""
}

// Config implements Arm.
func (L3) Config() string { return "net.ipv4.ip_forward=1, no netfilter rules" }

// Start implements Arm.
func (L3) Start(context.Context, *rig.Rig, Certificate) (Running, error) {
	return Running{Entry: func(m Mode, s Service) netip.AddrPort {
		return netip.AddrPortFrom(rig.BackendAddr.Addr(), port(m, s))
	}}, nil
}
