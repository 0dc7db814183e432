package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	// Where guest images put the agent's socket; the second is that of images up
	// to 0.5.5.
	socket    = "/var/run/dstack/dstack.sock"
	oldSocket = "/var/run/dstack.sock"

	// reportSize is how much report data a quote holds.
	reportSize = 64
)

// Address is the base URL of the own CVM's agent: the value of
// DSTACK_AGENT_ADDRESS, or when that is empty the first of the usual sockets
// that exists, or the newer one when none does (gateway spec 1.2).
func Address(env string, exists func(path string) bool) string {
	switch {
	case env != "":
		return env
	case !exists(socket) && exists(oldSocket):
		return "unix:" + oldSocket
	default:
		return "unix:" + socket
	}
}

// Client calls one guest agent. It is safe for concurrent use.
type Client struct {
	name string // the address, fit for logs
	rpc  *prpc.Client
}

// New prepares calls to the agent at address: unix:/path, or a URL with http or
// https. A nil hc gives 5 s to connect, 60 s a call; see prpc.NewClient for what
// else hc can be. Nothing is connected yet.
func New(address string, hc *http.Client) (*Client, error) {
	rpc, err := prpc.NewClient(address, hc)
	if err != nil {
		return nil, fmt.Errorf("guest agent address: %w", err)
	}
	name := address
	if u, err := url.Parse(address); err == nil {
		name = u.Redacted()
	}
	return &Client{name: name, rpc: rpc}, nil
}

// CloseIdleConnections closes what is kept open between calls.
func (c *Client) CloseIdleConnections() { c.rpc.CloseIdleConnections() }

func (c *Client) call(ctx context.Context, method string, req, resp proto.Message) error {
	err := c.rpc.Call(ctx, method, req, resp)
	if err == nil {
		return nil
	}
	if _, answered := errors.AsType[*prpc.StatusError](err); answered {
		return fmt.Errorf("guest agent at %s: %w", c.name, err)
	}
	if _, answered := errors.AsType[*prpc.AnswerError](err); answered {
		return fmt.Errorf("guest agent at %s: %w", c.name, err)
	}
	return fmt.Errorf("guest agent at %s cannot be reached (is it running, is DSTACK_AGENT_ADDRESS right?): %w", c.name, err)
}

// Info describes the app that runs in the agent's CVM.
func (c *Client) Info(ctx context.Context) (*guestpb.AppInfo, error) {
	info := new(guestpb.AppInfo)
	if err := c.call(ctx, "Info", &emptypb.Empty{}, info); err != nil {
		return nil, err
	}
	return info, nil
}

// GetQuote has the TEE sign at most 64 bytes of report data; shorter is padded
// with zeros by the agent. prpc.Marshal of the answer is the JSON text that is
// stored and published as evidence (gateway spec 7.6).
func (c *Client) GetQuote(ctx context.Context, reportData []byte) (*guestpb.GetQuoteResponse, error) {
	quote := new(guestpb.GetQuoteResponse)
	if err := c.evidence(ctx, "GetQuote", reportData, quote); err != nil {
		return nil, err
	}
	return quote, nil
}

// Attest is GetQuote in the versioned container. Agents before 0.5.6 do not know
// the method: a *prpc.StatusError.
func (c *Client) Attest(ctx context.Context, reportData []byte) (*guestpb.AttestResponse, error) {
	att := new(guestpb.AttestResponse)
	if err := c.evidence(ctx, "Attest", reportData, att); err != nil {
		return nil, err
	}
	return att, nil
}

func (c *Client) evidence(ctx context.Context, method string, reportData []byte, resp proto.Message) error {
	if len(reportData) > reportSize {
		return fmt.Errorf("%s: report data has %d bytes, at most %d fit into a quote", method, len(reportData), reportSize)
	}
	return c.call(ctx, method, &guestpb.RawQuoteArgs{ReportData: reportData}, resp)
}

// GetTLSKey asks for a new key with a certificate of the platform's KMS.
func (c *Client) GetTLSKey(ctx context.Context, args *guestpb.GetTlsKeyArgs) (*guestpb.GetTlsKeyResponse, error) {
	key := new(guestpb.GetTlsKeyResponse)
	if err := c.call(ctx, "GetTlsKey", args, key); err != nil {
		return nil, err
	}
	return key, nil
}

// TLSFiles are the paths of the main RPC server's [tls] table.
type TLSFiles struct {
	Key     string // tls.key
	Certs   string // tls.certs
	CACerts string // tls.mutual.ca_certs
}

// WriteRPCCertificate obtains the certificate of the gateway's RPC server for
// rpcDomain, and for the host of myURL where that is another, and writes the
// three files: the last certificate of the chain as the CA, the whole chain, the
// key (gateway spec 1.12, step 6). Each is replaced atomically with mode 0600,
// and none unless key and chain fit together.
func (c *Client) WriteRPCCertificate(ctx context.Context, rpcDomain, myURL string, files TLSFiles) error {
	if err := c.writeRPCCertificate(ctx, rpcDomain, myURL, files); err != nil {
		return fmt.Errorf("RPC certificate for %s: %w", rpcDomain, err)
	}
	return nil
}

func (c *Client) writeRPCCertificate(ctx context.Context, rpcDomain, myURL string, files TLSFiles) error {
	names := []string{rpcDomain}
	if myURL != "" {
		u, err := url.Parse(myURL)
		if err != nil || u.Hostname() == "" {
			return fmt.Errorf("core.sync.my_url %q has no host; write https://host:port", myURL)
		}
		if h := u.Hostname(); h != rpcDomain {
			names = append(names, h)
		}
	}
	resp, err := c.GetTLSKey(ctx, &guestpb.GetTlsKeyArgs{
		Subject:         "dstack-gateway",
		AltNames:        names,
		UsageRaTls:      true,
		UsageServerAuth: true,
		UsageClientAuth: true,
		WithAppInfo:     true,
	})
	if err != nil {
		return err
	}
	n := len(resp.CertificateChain)
	if n == 0 {
		return fmt.Errorf("guest agent at %s answered GetTlsKey without a certificate", c.name)
	}
	chain := []byte(strings.Join(resp.CertificateChain, "\n"))
	ca := []byte(resp.CertificateChain[n-1])
	if _, err := tls.X509KeyPair(chain, []byte(resp.Key)); err != nil {
		return fmt.Errorf("guest agent at %s answered GetTlsKey with an unusable key or chain: %w", c.name, err)
	}
	for _, f := range []struct {
		path string
		data []byte
	}{{files.CACerts, ca}, {files.Certs, chain}, {files.Key, []byte(resp.Key)}} {
		if err := ratls.WriteFile(f.path, f.data); err != nil {
			return err
		}
	}
	return nil
}
