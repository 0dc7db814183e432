package hostname

import "errors"

// Words that take the place of an id in a label (gateway spec 4.4).
const (
	GatewayID   = "gateway"
	HealthID    = "health"
	LocalhostID = "localhost"
)

// Service is what a reserved word stands for.
type Service uint8

const (
	// NoService: the id is an ordinary one.
	NoService Service = iota
	// GatewayService: the built-in HTTP endpoints of the gateway.
	GatewayService
	// HealthService: the built-in health check.
	HealthService
	// LocalhostService: a backend on 127.0.0.1, which the caller must refuse
	// unless the debug switch for it is on.
	LocalhostService
)

// Errors of Service.CheckPort, returned as they are.
var (
	ErrGatewayPort = errors.New("Only port 80 is supported for this node")
	ErrHealthPort  = errors.New("Only port 80 is supported for health checks")
)

// Reserved returns the service that id is reserved for, NoService if none. It
// holds for labels that terminate TLS; see Target.Service for all of them.
func Reserved(id string) Service {
	switch id {
	case GatewayID:
		return GatewayService
	case HealthID:
		return HealthService
	case LocalhostID:
		return LocalhostService
	}
	return NoService
}

// Service returns the service that t asks for. In Passthrough mode only
// LocalhostID is reserved: the gateway has no TLS endpoint of its own there.
func (t Target) Service() Service {
	s := Reserved(t.ID)
	if t.Mode == Passthrough && s != LocalhostService {
		return NoService
	}
	return s
}

// CheckPort returns ErrGatewayPort or ErrHealthPort when the service s is not
// available on port.
func (s Service) CheckPort(port uint16) error {
	switch {
	case port == terminatePort:
		return nil
	case s == GatewayService:
		return ErrGatewayPort
	case s == HealthService:
		return ErrHealthPort
	}
	return nil
}
