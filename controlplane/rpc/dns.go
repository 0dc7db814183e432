package rpc

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
)

const (
	cloudflare = "cloudflare"
	// Names in store.DNSCredential.Settings.
	settingToken = "api_token"
	settingURL   = "api_url"

	defaultTXTTTL  = 60  // seconds
	defaultMaxWait = 300 // seconds
)

// errCredential is what callers get for an id that is not there.
var errCredential = errors.New("dns credential not found")

func (s *Server) credentialInfo(c store.DNSCredential) *gatewaypb.DnsCredentialInfo {
	return &gatewaypb.DnsCredentialInfo{
		Id: c.ID, Name: c.Name, ProviderType: c.Provider, CfApiToken: redact(c.Settings[settingToken]), CfApiUrl: c.Settings[settingURL],
		DnsTxtTtl: proto.Uint32(c.TXTTTL), MaxDnsWait: proto.Uint32(uint32(min(seconds(c.MaxWait), math.MaxUint32))),
		CreatedAt: c.CreatedAt, UpdatedAt: c.UpdatedAt,
	}
}

// redact shows as much of a secret as is needed to recognise it: the first and last four characters, of a short one
// nothing.
func redact(secret string) string {
	r := []rune(secret)
	if len(r) <= 8 {
		return strings.Repeat("*", len(r))
	}
	return string(r[:4]) + "..." + string(r[len(r)-4:])
}

// ListDNSCredentials lists all credentials, tokens redacted, and names the default.
func (s *Server) ListDNSCredentials(context.Context, *emptypb.Empty) (*gatewaypb.ListDnsCredentialsResponse, error) {
	resp := new(gatewaypb.ListDnsCredentialsResponse)
	for _, c := range s.d.Store.DNSCredentials() {
		resp.Credentials = append(resp.Credentials, s.credentialInfo(c))
	}
	if id := s.d.Store.DefaultDNSCredential(); id != "" {
		resp.DefaultId = proto.String(id)
	}
	return resp, nil
}

// GetDNSCredential shows one credential, its token redacted.
func (s *Server) GetDNSCredential(_ context.Context, req *gatewaypb.GetDnsCredentialRequest) (*gatewaypb.DnsCredentialInfo, error) {
	c, ok := s.d.Store.DNSCredential(req.GetId())
	if !ok {
		return nil, errCredential
	}
	return s.credentialInfo(c), nil
}

// CreateDNSCredential stores a new credential.
func (s *Server) CreateDNSCredential(ctx context.Context, req *gatewaypb.CreateDnsCredentialRequest) (*gatewaypb.DnsCredentialInfo, error) {
	if req.GetProviderType() != cloudflare {
		return nil, fmt.Errorf("unsupported provider type: %s", req.GetProviderType())
	}
	token, err := checkToken(req.GetCfApiToken())
	if err != nil {
		return nil, err
	}
	if err := checkAPIURL(req.GetCfApiUrl()); err != nil {
		return nil, err
	}
	ttl, wait := uint32(defaultTXTTTL), uint32(defaultMaxWait)
	if req.DnsTxtTtl != nil {
		if ttl = req.GetDnsTxtTtl(); ttl == 0 {
			return nil, errors.New("dns_txt_ttl must be greater than zero")
		}
	}
	if req.MaxDnsWait != nil {
		if wait = req.GetMaxDnsWait(); wait == 0 {
			return nil, errors.New("max_dns_wait must be greater than zero")
		}
	}
	now := s.now()
	c := store.DNSCredential{
		ID: credentialID(now), Name: req.GetName(), Provider: cloudflare, Settings: map[string]string{settingToken: token},
		MaxWait: time.Duration(wait) * time.Second, TXTTTL: ttl, CreatedAt: unix(now), UpdatedAt: unix(now),
	}
	if u := req.GetCfApiUrl(); u != "" {
		c.Settings[settingURL] = u
	}
	if err := s.d.Store.CreateDNSCredential(ctx, c, req.GetSetAsDefault()); err != nil {
		return nil, fmt.Errorf("failed to create the dns credential: %w", err)
	}
	s.log.Info("dns credential created", "id", c.ID, "name", c.Name, "default", req.GetSetAsDefault())
	return s.credentialInfo(c), nil
}

// credentialID is the time in milliseconds, hex, and 8 random hex digits.
func credentialID(now time.Time) string {
	var r [4]byte
	rand.Read(r[:])
	return fmt.Sprintf("%x%08x", max(now.UnixMilli(), 0), binary.BigEndian.Uint32(r[:]))
}

// checkToken takes the line end away that comes with copying. A token that no HTTP header can carry would be found out
// at the first issuance only.
func checkToken(token string) (string, error) {
	token = strings.TrimSpace(token)
	if token == "" {
		return "", errors.New("cf_api_token must not be empty")
	}
	for _, b := range []byte(token) {
		if b <= ' ' || b > '~' {
			return "", errors.New("cf_api_token contains characters that no HTTP header can carry")
		}
	}
	return token, nil
}

// checkAPIURL accepts the empty one, which stands for Cloudflare's own. It does not repeat what it refuses.
func checkAPIURL(text string) error {
	if text == "" {
		return nil
	}
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("cf_api_url is not a URL: %w", withoutURL(err))
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return errors.New("cf_api_url must begin with http:// or https:// and name a host")
	}
	return nil
}

// UpdateDNSCredential changes the fields that are present.
func (s *Server) UpdateDNSCredential(ctx context.Context, req *gatewaypb.UpdateDnsCredentialRequest) (*gatewaypb.DnsCredentialInfo, error) {
	token := ""
	if req.CfApiToken != nil {
		var err error
		if token, err = checkToken(req.GetCfApiToken()); err != nil {
			return nil, err
		}
	}
	if err := checkAPIURL(req.GetCfApiUrl()); err != nil {
		return nil, err
	}
	c, err := s.d.Store.UpdateDNSCredential(ctx, req.GetId(), func(c *store.DNSCredential) error {
		if req.Name != nil {
			c.Name = req.GetName()
		}
		if c.Settings == nil {
			c.Settings = make(map[string]string)
		}
		if token != "" {
			c.Settings[settingToken] = token
		}
		if req.CfApiUrl != nil {
			if c.Settings[settingURL] = req.GetCfApiUrl(); c.Settings[settingURL] == "" {
				delete(c.Settings, settingURL)
			}
		}
		c.UpdatedAt = unix(s.now())
		return nil
	})
	if errors.Is(err, store.ErrNotFound) {
		return nil, errCredential
	}
	if err != nil {
		return nil, fmt.Errorf("failed to change the dns credential: %w", err)
	}
	s.log.Info("dns credential changed", "id", c.ID, "name", c.Name)
	return s.credentialInfo(c), nil
}

// DeleteDNSCredential removes a credential that is neither the default nor named by a domain.
func (s *Server) DeleteDNSCredential(ctx context.Context, req *gatewaypb.DeleteDnsCredentialRequest) (*emptypb.Empty, error) {
	err := s.d.Store.DeleteDNSCredential(ctx, req.GetId())
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, errCredential
	case err != nil:
		return nil, fmt.Errorf("failed to delete the dns credential: %w", err)
	}
	s.log.Info("dns credential deleted", "id", req.GetId())
	return &emptypb.Empty{}, nil
}

// GetDefaultDNSCredential shows the default credential; an empty id if there is none.
func (s *Server) GetDefaultDNSCredential(context.Context, *emptypb.Empty) (*gatewaypb.GetDefaultDnsCredentialResponse, error) {
	resp := &gatewaypb.GetDefaultDnsCredentialResponse{DefaultId: s.d.Store.DefaultDNSCredential()}
	if c, ok := s.d.Store.DNSCredential(resp.DefaultId); ok {
		resp.Credential = s.credentialInfo(c)
	}
	return resp, nil
}

// SetDefaultDNSCredential chooses the credential of the domains that name none.
func (s *Server) SetDefaultDNSCredential(ctx context.Context, req *gatewaypb.SetDefaultDnsCredentialRequest) (*emptypb.Empty, error) {
	err := s.d.Store.SetDefaultDNSCredential(ctx, req.GetId())
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, errCredential
	case err != nil:
		return nil, fmt.Errorf("failed to set the default dns credential: %w", err)
	}
	return &emptypb.Empty{}, nil
}
