package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// maxPolicyAnswer bounds the Info answer of an app's CVM in bytes. Guests that
// have to be asked hold compose files of at most 256 KiB; escaped twice and with
// the event log they stay far below.
const maxPolicyAnswer = 4 << 20

// ErrNoPolicy marks an answer from which no port policy can be read. Asking
// again would give the same answer.
var ErrNoPolicy = errors.New("instance gives no usable port policy")

// FetchPortPolicy asks the agent of an app's CVM once for the port policy in the
// app's compose file (gateway spec 5.9). base is http://<ip>:<agent_port>/prpc.
//
// An app that hides its compose file, or has no policy in it, gets the open
// policy: no ports, no restriction. Errors that wrap ErrNoPolicy are final; any
// other (no connection, a status, the end of ctx) is worth another attempt.
//
// hc carries the dialer; nil means a fresh connection from the default one.
// Redirects are never followed: the answer comes from inside the CVM, which must
// not choose whom the gateway talks to.
func FetchPortPolicy(ctx context.Context, hc *http.Client, base string) (*gatewaypb.PortPolicy, error) {
	policy, err := fetchPortPolicy(ctx, hc, base)
	if err != nil {
		return nil, fmt.Errorf("fetch port policy from %s: %w", base, err)
	}
	return policy, nil
}

func fetchPortPolicy(ctx context.Context, hc *http.Client, base string) (*gatewaypb.PortPolicy, error) {
	own := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	if hc != nil {
		own = *hc
	}
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	rpc, err := prpc.NewClient(base, &own)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPolicy, err)
	}
	rpc.MaxAnswer = maxPolicyAnswer
	info := new(guestpb.PublicTcbInfo)
	err = rpc.Call(ctx, "Info", &emptypb.Empty{}, info)
	if bad, ok := errors.AsType[*prpc.AnswerError](err); ok {
		return nil, fmt.Errorf("%w: %w", ErrNoPolicy, bad)
	}
	if err != nil {
		return nil, err
	}
	if info.TcbInfo == nil {
		return nil, fmt.Errorf("%w: the Info answer has no tcb_info", ErrNoPolicy)
	}
	policy, err := policyOf(info.GetTcbInfo())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoPolicy, err)
	}
	return policy, nil
}

// policyOf digs the policy out of tcb_info, which is JSON whose app_compose is
// the text of the compose file, JSON again.
func policyOf(tcbInfo string) (*gatewaypb.PortPolicy, error) {
	if tcbInfo == "" {
		return &gatewaypb.PortPolicy{}, nil // public_tcbinfo = false
	}
	outer, err := object([]byte(tcbInfo))
	if err != nil {
		return nil, fmt.Errorf("tcb_info: %w", err)
	}
	text, ok := outer["app_compose"]
	if !ok {
		return nil, errors.New("tcb_info: app_compose is missing")
	}
	var compose string
	if !isString(text) || json.Unmarshal(text, &compose) != nil {
		return nil, errors.New("tcb_info: app_compose is not a string")
	}
	policy, err := policyOfCompose([]byte(compose))
	if err != nil {
		return nil, fmt.Errorf("app_compose: %w", err)
	}
	return policy, nil
}
