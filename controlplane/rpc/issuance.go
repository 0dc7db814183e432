package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/certs"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
)

// ErrNoIssuance is wrapped by what the RPCs answer that need automatic issuance.
var ErrNoIssuance = errors.New("not configured: automatic certificate issuance is not part of this release")

// RenewCert would renew what is due.
func (s *Server) RenewCert(context.Context, *emptypb.Empty) (*gatewaypb.RenewCertResponse, error) {
	return nil, fmt.Errorf("%w; renew with your own ACME client, replace the files of core.proxy.cert_chain and core.proxy.cert_key "+
		"(they are watched), or call ReloadCert after the stored certificates changed", ErrNoIssuance)
}

// RenewZtDomainCert would issue for one domain. Its name is not normalised.
func (s *Server) RenewZtDomainCert(_ context.Context, req *gatewaypb.RenewZtDomainCertRequest) (*gatewaypb.RenewZtDomainCertResponse, error) {
	if _, ok := s.d.Store.ZTDomain(req.GetDomain()); !ok {
		return nil, errDomain
	}
	return nil, fmt.Errorf("%w; obtain a certificate for *.%s with your own ACME client and give it to core.proxy.base_domain, cert_chain and cert_key",
		ErrNoIssuance, req.GetDomain())
}

// SetCaa would pin issuance to the ACME account.
func (s *Server) SetCaa(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("%w and there is no ACME account to pin; set CAA records at your DNS provider for the authority and account that you use", ErrNoIssuance)
}

// RotateAcmeCredentials would replace the ACME account.
func (s *Server) RotateAcmeCredentials(context.Context, *emptypb.Empty) (*gatewaypb.RotateAcmeCredentialsResponse, error) {
	return nil, fmt.Errorf("%w and does not use the stored ACME account; rotate the account of your own ACME client, then adjust your CAA records", ErrNoIssuance)
}

// ReloadCert builds the certificates in use from the stored ones again. Those of configured domains that cannot be used
// are in the error; the others are in use all the same.
func (s *Server) ReloadCert(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	records := make(map[string]certs.Record)
	for domain, c := range s.d.Store.Certs() {
		records[domain] = certs.Record{CertPEM: c.CertPEM, KeyPEM: c.KeyPEM, NotAfter: c.NotAfter, IssuedBy: c.IssuedBy, IssuedAt: c.IssuedAt}
	}
	rejected := s.d.Certs.Reload(records)
	s.d.DomainsChanged()
	var failed []error
	for _, d := range s.d.Store.ZTDomains() {
		if err, bad := rejected[d.Domain]; bad {
			failed = append(failed, fmt.Errorf("%s: %w", d.Domain, err))
		}
	}
	if len(failed) > 0 {
		return nil, fmt.Errorf("certificates were reloaded, but %d of %d domains have none that can be used: %w",
			len(failed), len(s.d.Store.ZTDomains()), joined(failed))
	}
	return &emptypb.Empty{}, nil
}

// joined is errors.Join on one line.
type joined []error

func (j joined) Error() string {
	texts := make([]string, len(j))
	for n, err := range j {
		texts[n] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (j joined) Unwrap() []error { return j }

// ForceReleaseCertLock breaks the issuance lock of a domain. Its name is not normalised: locks of older releases can
// have any.
func (s *Server) ForceReleaseCertLock(ctx context.Context, req *gatewaypb.ForceReleaseCertLockRequest) (*emptypb.Empty, error) {
	domain := req.GetDomain()
	if domain == "" || strings.ContainsAny(domain, "/\x00") {
		return nil, errors.New("domain must not be empty and must not contain a slash")
	}
	if err := s.d.Store.ForceReleaseCertLock(ctx, domain); err != nil {
		return nil, fmt.Errorf("failed to release the lock: %w", err)
	}
	s.log.Warn("an operator released the issuance lock", "domain", domain)
	return &emptypb.Empty{}, nil
}

// ListCertAttestations shows the evidence for the keys of a domain, newest first.
func (s *Server) ListCertAttestations(_ context.Context, req *gatewaypb.ListCertAttestationsRequest) (*gatewaypb.ListCertAttestationsResponse, error) {
	name, err := hostname.NormalizeDomain(req.GetDomain())
	if err != nil {
		return nil, err
	}
	latest, history := s.d.Store.CertAttestations(name)
	if limit := int(req.GetLimit()); limit > 0 && limit < len(history) {
		history = history[:limit]
	}
	resp := new(gatewaypb.ListCertAttestationsResponse)
	if latest != nil {
		resp.Latest = attestationInfo(*latest)
	}
	for _, a := range history {
		resp.History = append(resp.History, attestationInfo(a))
	}
	return resp, nil
}

func attestationInfo(a store.CertAttestation) *gatewaypb.CertAttestationInfo {
	return &gatewaypb.CertAttestationInfo{PublicKey: a.PublicKey, Quote: a.Quote, GeneratedBy: a.GeneratedBy, GeneratedAt: a.GeneratedAt}
}

// GetCertbotConfig shows the settings of issuance.
func (s *Server) GetCertbotConfig(context.Context, *emptypb.Empty) (*gatewaypb.CertbotConfigResponse, error) {
	c := s.d.Store.CertbotConfig()
	return &gatewaypb.CertbotConfigResponse{
		RenewIntervalSecs: seconds(c.RenewInterval), RenewBeforeExpirationSecs: seconds(c.RenewBefore),
		RenewTimeoutSecs: seconds(c.RenewTimeout), AcmeUrl: c.ACMEURL,
	}, nil
}

// SetCertbotConfig changes the settings that are present.
func (s *Server) SetCertbotConfig(ctx context.Context, req *gatewaypb.SetCertbotConfigRequest) (*emptypb.Empty, error) {
	if text := req.GetAcmeUrl(); text != "" {
		u, err := url.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("acme_url is not a URL: %w", withoutURL(err))
		}
		if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
			return nil, errors.New("acme_url must begin with http:// or https:// and name a host")
		}
	}
	_, err := s.d.Store.UpdateCertbotConfig(ctx, func(c *store.CertbotConfig) error {
		for _, part := range []struct {
			set *uint64
			to  *time.Duration
		}{{req.RenewIntervalSecs, &c.RenewInterval}, {req.RenewBeforeExpirationSecs, &c.RenewBefore}, {req.RenewTimeoutSecs, &c.RenewTimeout}} {
			if part.set != nil {
				*part.to = span(*part.set)
			}
		}
		if req.AcmeUrl != nil {
			c.ACMEURL = req.GetAcmeUrl()
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("failed to store the certbot config: %w", err)
	}
	return &emptypb.Empty{}, nil
}

func seconds(d time.Duration) uint64 { return uint64(max(d, 0) / time.Second) }

// span saturates: what no time.Duration can hold is as good as never.
func span(secs uint64) time.Duration {
	if secs > math.MaxInt64/uint64(time.Second) {
		return math.MaxInt64
	}
	return time.Duration(secs) * time.Second
}
