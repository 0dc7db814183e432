package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/agent"
	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

// policyFetcher asks guests that report no port policy for the one in their compose
// file (gateway spec 5.9): one fetch in flight an instance, with retries, and no
// more than fetchLimit questions at once.
type policyFetcher struct {
	log       *slog.Logger
	reg       *registry.Registry
	set       func(ctx context.Context, id, composeHash string, p *registry.PortPolicy) error // registry and store
	agentPort uint16
	opt       config.PortPolicyFetch
	hc        *http.Client
	ctx       context.Context
	flights   sync.Map // instance id -> struct{}
	slots     chan struct{}
	wg        sync.WaitGroup
	failures  atomic.Uint64
	last      sync.Map // instance id -> why the last fetch failed; for explain
}

const fetchLimit = 64

func newPolicyFetcher(ctx context.Context, log *slog.Logger, reg *registry.Registry, agentPort uint16, opt config.PortPolicyFetch, set func(context.Context, string, string, *registry.PortPolicy) error) *policyFetcher {
	return &policyFetcher{log: log, reg: reg, set: set, agentPort: agentPort, opt: opt, ctx: ctx, slots: make(chan struct{}, fetchLimit),
		hc: &http.Client{Transport: &http.Transport{
			DialContext:       (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			DisableKeepAlives: true, // one question an instance and life
		}}}
}

// need starts a fetch unless one is under way. It never blocks: event loops call it.
func (f *policyFetcher) need(id string) {
	if _, busy := f.flights.LoadOrStore(id, struct{}{}); busy {
		return
	}
	f.wg.Go(func() {
		defer f.flights.Delete(id)
		err := f.fetch(id)
		if err == nil {
			f.last.Delete(id)
			return
		}
		if f.ctx.Err() == nil {
			f.failures.Add(1)
			f.last.Store(id, err.Error())
			f.log.Warn("the port policy of an instance is unknown, so its ports stay closed; the next connection asks again", "instance", id, "error", err)
		}
	})
}

func (f *policyFetcher) fetch(id string) error {
	backoff := f.opt.BackoffInitial.Std()
	for attempt := 0; ; attempt++ {
		i, ok := f.reg.Instance(id)
		if !ok {
			return nil // gone
		}
		if p, _ := i.Effective(); p != nil {
			return nil // reported or set in the meantime
		}
		p, err := f.ask(i.IP)
		if err == nil {
			policy, err := parsePolicy(p)
			if err != nil {
				return err
			}
			return f.set(f.ctx, id, i.PolicyHash, policy)
		}
		if errors.Is(err, agent.ErrNoPolicy) || attempt >= f.opt.MaxRetries {
			return err
		}
		select {
		case <-time.After(backoff):
		case <-f.ctx.Done():
			return f.ctx.Err()
		}
		backoff = min(backoff*2, f.opt.BackoffMax.Std())
	}
}

// ask makes one attempt, with a slot of its own. Between two attempts the slot is free: instances that do not answer must
// not keep those waiting that would.
func (f *policyFetcher) ask(ip netip.Addr) (*gatewaypb.PortPolicy, error) {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-f.ctx.Done():
		return nil, f.ctx.Err()
	}
	ctx, cancel := context.WithTimeout(f.ctx, f.opt.Timeout.Std())
	defer cancel()
	return agent.FetchPortPolicy(ctx, f.hc, f.url(ip))
}

// lastFailure says why the last fetch for an instance failed, "" if none did.
func (f *policyFetcher) lastFailure(id string) string {
	v, _ := f.last.Load(id)
	s, _ := v.(string)
	return s
}

// state is for doctor.
func (f *policyFetcher) state() doctor.PolicyFetches {
	st := doctor.PolicyFetches{Failed: f.failures.Load()}
	f.flights.Range(func(any, any) bool { st.InFlight++; return true })
	f.last.Range(func(id, why any) bool {
		st.Last = fmt.Sprintf("instance %s: %s", id, why)
		return false
	})
	return st
}

// forget drops what is remembered of an instance that is gone.
func (f *policyFetcher) forget(id string) { f.last.Delete(id) }

func (f *policyFetcher) url(ip netip.Addr) string {
	return fmt.Sprintf("http://%s/prpc", net.JoinHostPort(ip.String(), strconv.Itoa(int(f.agentPort))))
}

func parsePolicy(p *gatewaypb.PortPolicy) (*registry.PortPolicy, error) {
	attrs := make([]registry.PortAttr, 0, len(p.GetPorts()))
	for _, a := range p.GetPorts() {
		attrs = append(attrs, registry.PortAttr{Port: a.GetPort(), PP: a.GetPp()})
	}
	return registry.ParsePolicy(attrs, p.GetRestrictMode())
}
