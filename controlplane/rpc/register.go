package rpc

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/ratls"
)

// settleTimeout bounds what happens between a decision about an instance and the answer to it.
const settleTimeout = 10 * time.Second

// RegisterCvm gives the calling CVM its place in the overlay (gateway spec 3.2). The caller is identified by its
// certificate.
func (s *Server) RegisterCvm(ctx context.Context, req *gatewaypb.RegisterCvmRequest) (*gatewaypb.RegisterCvmResponse, error) {
	resp, err := s.registerCvm(ctx, req)
	if err != nil {
		return nil, safeForGuests(err)
	}
	return resp, nil
}

func (s *Server) registerCvm(ctx context.Context, req *gatewaypb.RegisterCvmRequest) (*gatewaypb.RegisterCvmResponse, error) {
	info, err := ratls.FromContext(ctx).AppInfo()
	if err != nil {
		s.metrics.registrations.WithLabelValues(resultRefused).Inc()
		return nil, err
	}
	instanceID := hex.EncodeToString(info.InstanceID)
	if s.auth != nil {
		start := s.now()
		err := s.auth.authorize(ctx, info)
		s.metrics.auth.Observe(s.now().Sub(start).Seconds())
		if err != nil {
			s.metrics.registrations.WithLabelValues(resultUnauthorized).Inc()
			s.log.Warn("registration not authorized", "instance", instanceID, "app", hex.EncodeToString(info.AppID), "error", err)
			return nil, err
		}
	}
	q := registry.Request{
		AppID: hex.EncodeToString(info.AppID), InstanceID: instanceID,
		ComposeHash: hex.EncodeToString(info.ComposeHash), PublicKey: req.GetClientPublicKey(),
	}
	if p := req.GetPortPolicy(); p != nil {
		if q.Policy, err = registry.ParsePolicy(portAttrs(p), p.GetRestrictMode()); err != nil {
			s.metrics.registrations.WithLabelValues(resultRefused).Inc()
			return nil, err
		}
	}
	return s.register(ctx, q)
}

// DebugRegisterCvm registers whatever it is told to; it must be served to tests only.
func (s *Server) DebugRegisterCvm(ctx context.Context, req *gatewaypb.DebugRegisterCvmRequest) (*gatewaypb.RegisterCvmResponse, error) {
	return s.register(ctx, registry.Request{AppID: req.GetAppId(), InstanceID: req.GetInstanceId(), PublicKey: req.GetClientPublicKey()})
}

// register is the part from step 5 on.
func (s *Server) register(ctx context.Context, q registry.Request) (*gatewaypb.RegisterCvmResponse, error) {
	cluster := s.cluster()
	if cluster.down {
		s.metrics.registrations.WithLabelValues(resultRefused).Inc()
		return nil, errors.New("this gateway node is marked as down and cannot accept new registrations")
	}
	unlock := s.locks.lock(q.InstanceID)
	res, err := s.d.Registry.Register(q)
	if err == nil && (res.Record || s.isUnwritten(q.InstanceID)) {
		s.settle(ctx, res)
	}
	unlock()
	if err != nil {
		s.metrics.registrations.WithLabelValues(resultRefused).Inc()
		s.log.Warn("registration refused", "instance", q.InstanceID, "app", q.AppID, "error", err)
		return nil, err
	}
	result := resultUnchanged
	switch {
	case res.Created:
		result = resultCreated
		s.log.Info("CVM registered", "instance", q.InstanceID, "app", q.AppID, "ip", res.Instance.IP.String())
	case res.Record:
		result = resultChanged
	}
	s.metrics.registrations.WithLabelValues(result).Inc()
	if res.Instance.Policy == nil {
		s.d.PolicyMissing(q.InstanceID)
	}
	return &gatewaypb.RegisterCvmResponse{
		Wg:       &gatewaypb.WireGuardConfig{ClientIp: res.Instance.IP.String(), Servers: cluster.servers},
		Agent:    cluster.agent,
		Gateways: cluster.gateways,
	}, nil
}

// settle makes a registration durable and sets its tunnel up, both at the same time. Neither can undo the registration.
// The lock of the instance is held. A guest that hangs up does not stop it.
func (s *Server) settle(ctx context.Context, res registry.Result) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	applied := make(chan struct{})
	if res.Peer {
		go func() {
			defer close(applied)
			s.applyPeer(ctx, res.Instance)
		}()
	} else {
		close(applied)
	}
	_ = s.write(ctx, res.Instance) // logged; guests register again, which writes again
	<-applied
}

func (s *Server) applyPeer(ctx context.Context, i registry.Instance) {
	key, err := wgtypes.ParseKey(i.PublicKey)
	if err == nil {
		err = s.d.Tunnels.Apply(ctx, wireguard.Peer{ID: i.ID, PublicKey: key, IP: i.IP})
	}
	if err != nil {
		s.log.Warn("the WireGuard peer could not be set; the registration stands and it is tried again in the background",
			"instance", i.ID, "ip", i.IP.String(), "error", err)
	}
}

// write stores a record. The lock of the instance is held.
func (s *Server) write(ctx context.Context, i registry.Instance) error {
	s.writesMu.Lock()
	s.writing[i.ID] = struct{}{}
	s.writesMu.Unlock()
	d, err := s.records.PutInstance(ctx, i)
	s.writesMu.Lock()
	delete(s.writing, i.ID)
	if d == 0 {
		s.unwritten[i.ID] = struct{}{}
	} else {
		// Volatile records are the store's to repeat.
		delete(s.unwritten, i.ID)
	}
	s.writesMu.Unlock()
	switch {
	case d == store.Stored:
	case d == store.Journaled:
		s.log.Info("the record of a CVM is in the local journal until the store can be written", "instance", i.ID)
	case d == store.Volatile:
		s.log.Warn("the record of a CVM is in memory only until the store can be written", "instance", i.ID, "error", err)
	default:
		s.log.Warn("the record of a CVM may not be stored; it is written again at its next registration", "instance", i.ID, "error", err)
	}
	return err
}

func (s *Server) isUnwritten(id string) bool {
	s.writesMu.Lock()
	defer s.writesMu.Unlock()
	_, ok := s.unwritten[id]
	return ok
}

// oldGateway is what guests search for in an error to recognise a gateway older than 0.5.6. They then register again
// with other evidence, so that the words must not slip in from some cause.
const oldGateway = "no attestation provided"

// safeForGuests keeps the chain for errors.Is and rewords the text if needed.
func safeForGuests(err error) error {
	if !strings.Contains(err.Error(), oldGateway) {
		return err
	}
	return &reworded{err}
}

type reworded struct{ err error }

func (e *reworded) Error() string {
	return strings.ReplaceAll(e.err.Error(), oldGateway, "attestation is absent")
}

func (e *reworded) Unwrap() error { return e.err }

// SetReportedPolicy stores what a policy fetch found for the compose file with the given hash (gateway spec 5.9). It does
// nothing if the instance has reported a policy itself or runs another compose file by now.
func (s *Server) SetReportedPolicy(ctx context.Context, instanceID, composeHash string, p *registry.PortPolicy) error {
	return s.edit(ctx, instanceID, func() (registry.Instance, bool, error) {
		return s.d.Registry.SetReportedPolicy(instanceID, composeHash, p)
	})
}

// edit changes a record and stores it. The error says that the change was refused, or that it is in force but may be
// lost with the process.
func (s *Server) edit(ctx context.Context, id string, change func() (registry.Instance, bool, error)) error {
	defer s.locks.lock(id)()
	i, changed, err := change()
	if err != nil || !changed {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if err := s.write(ctx, i); err != nil {
		return fmt.Errorf("the change is in force but not durable: %w", err)
	}
	return nil
}
