package store

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

// instanceRecord is the stored form of a registry.Instance (gateway spec 8.3, `inst/{id}`); the id is the key.
type instanceRecord struct {
	AppID       string        `json:"app_id"`
	IP          netip.Addr    `json:"ip"`
	PublicKey   string        `json:"public_key"`
	RegTime     uint64        `json:"reg_time"`
	Policy      *policyRecord `json:"port_policy,omitempty"`
	PolicyHash  string        `json:"port_policy_hash,omitempty"`
	AdminPolicy *policyRecord `json:"admin_port_policy,omitempty"`
}

// policyRecord lists ports as numbers: a guest may declare all 65,535 of them, and the record must still fit in etcd.
type policyRecord struct {
	Ports    []uint16 `json:"ports,omitempty"` // all declared ports, ascending
	PP       []uint16 `json:"pp,omitempty"`    // those of them that get a PROXY header
	Restrict bool     `json:"restrict_mode"`
}

func toPolicyRecord(p *registry.PortPolicy) *policyRecord {
	if p == nil {
		return nil
	}
	r := &policyRecord{Restrict: p.Restrict}
	for _, a := range p.List() {
		r.Ports = append(r.Ports, uint16(a.Port))
		if a.PP {
			r.PP = append(r.PP, uint16(a.Port))
		}
	}
	return r
}

func (r *policyRecord) policy() *registry.PortPolicy {
	if r == nil {
		return nil
	}
	p := &registry.PortPolicy{Restrict: r.Restrict, Ports: make(map[uint16]registry.PortFlags, len(r.Ports))}
	for _, port := range r.Ports {
		p.Ports[port] = registry.PortFlags{}
	}
	for _, port := range r.PP {
		p.Ports[port] = registry.PortFlags{PP: true}
	}
	return p
}

func toInstanceRecord(i registry.Instance) instanceRecord {
	return instanceRecord{
		AppID: i.AppID, IP: i.IP, PublicKey: i.PublicKey, RegTime: i.RegTime, PolicyHash: i.PolicyHash,
		Policy: toPolicyRecord(i.Policy), AdminPolicy: toPolicyRecord(i.AdminPolicy),
	}
}

func (r instanceRecord) instance(id string) registry.Instance {
	return registry.Instance{
		ID: id, AppID: r.AppID, IP: r.IP, PublicKey: r.PublicKey, RegTime: r.RegTime, PolicyHash: r.PolicyHash,
		Policy: r.Policy.policy(), AdminPolicy: r.AdminPolicy.policy(),
	}
}

// UUID is the identity of a data directory, 16 bytes.
type UUID [16]byte

func (u UUID) String() string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

func (u *UUID) UnmarshalText(text []byte) error {
	s := string(text)
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return errors.New("not a UUID in text form")
	}
	raw, err := hex.DecodeString(s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:])
	if err != nil {
		return errors.New("not a UUID in text form")
	}
	copy(u[:], raw)
	return nil
}

// Node is what a gateway publishes about itself (`node/info/{id}`).
type Node struct {
	ID          uint32 `json:"-"`
	UUID        UUID   `json:"uuid"`
	URL         string `json:"url"`
	WGPublicKey string `json:"wg_public_key"`
	WGEndpoint  string `json:"wg_endpoint"`
	WGIP        string `json:"wg_ip"`
}

// NodeStatus is the operator's mark on a node (`node/status/{id}`).
type NodeStatus string

const (
	NodeUp   NodeStatus = "up"
	NodeDown NodeStatus = "down"
)

type nodeStatusRecord struct {
	Status NodeStatus `json:"status"`
}

type peerAddrRecord struct {
	URL string `json:"url"`
}

// DNSCredential is an account at a DNS provider (`dns_cred/{id}`). Settings hold secrets.
type DNSCredential struct {
	ID   string `json:"-"`
	Name string `json:"name"`
	// Provider is the provider type, e.g. "cloudflare".
	Provider string `json:"provider"`
	// Settings are the provider's own fields, e.g. "api_token" and "api_url" of cloudflare.
	Settings map[string]string `json:"settings"`
	// MaxWait bounds the wait for a TXT record to become visible.
	MaxWait time.Duration `json:"-"`
	// TXTTTL is the TTL of challenge records, seconds.
	TXTTTL uint32 `json:"dns_txt_ttl"`
	// CreatedAt and UpdatedAt are seconds since the epoch.
	CreatedAt uint64 `json:"created_at"`
	UpdatedAt uint64 `json:"updated_at"`
}

// String keeps the settings out of logs.
func (c DNSCredential) String() string {
	return fmt.Sprintf("DNSCredential(%s, %s)", c.ID, c.Provider)
}

// GoString is String: %#v must not show secrets either.
func (c DNSCredential) GoString() string { return c.String() }

type dnsCredentialRecord struct {
	DNSCredential
	MaxWaitSecs uint64 `json:"max_dns_wait_secs"`
}

type defaultCredentialRecord struct {
	ID string `json:"id"`
}

// CertbotConfig are the settings of issuance (`global/certbot_config`).
type CertbotConfig struct {
	// RenewInterval is the period of the check; 0 pauses renewal.
	RenewInterval time.Duration
	// RenewBefore is how long before expiry a certificate is renewed.
	RenewBefore time.Duration
	// RenewTimeout bounds one issuance.
	RenewTimeout time.Duration
	// ACMEURL is the directory; empty means Let's Encrypt production.
	ACMEURL string
}

// DefaultCertbotConfig is what holds while nothing is stored (gateway spec 7.4).
func DefaultCertbotConfig() CertbotConfig {
	return CertbotConfig{RenewInterval: 12 * time.Hour, RenewBefore: 30 * 24 * time.Hour, RenewTimeout: 300 * time.Second}
}

type certbotConfigRecord struct {
	RenewIntervalSecs uint64 `json:"renew_interval_secs"`
	RenewBeforeSecs   uint64 `json:"renew_before_expiration_secs"`
	RenewTimeoutSecs  uint64 `json:"renew_timeout_secs"`
	ACMEURL           string `json:"acme_url"`
}

func secs(d time.Duration) uint64 { return uint64(max(d, 0) / time.Second) }

// duration saturates: a stored number too large for a time.Duration means "never".
func duration(s uint64) time.Duration {
	if s > uint64(1<<63-1)/uint64(time.Second) {
		return 1<<63 - 1
	}
	return time.Duration(s) * time.Second
}

type acmeCredentialsRecord struct {
	JSON string `json:"json"`
}

// ACMEAttestation binds the ACME account to the gateway's TEE (`global/acme_attestation`).
type ACMEAttestation struct {
	AccountURI  string `json:"account_uri"`
	Quote       string `json:"quote"`
	Attestation string `json:"attestation"`
	GeneratedBy uint32 `json:"generated_by"`
	GeneratedAt uint64 `json:"generated_at"` // seconds since the epoch
}

// ZTDomain is a base domain whose wildcard certificate the gateways own (`cert/{domain}/config`).
type ZTDomain struct {
	Domain string `json:"-"`
	// DNSCredID is empty for the default credential.
	DNSCredID string  `json:"dns_cred_id,omitempty"`
	Port      uint16  `json:"port"`
	Node      *uint32 `json:"node,omitempty"`
	Priority  int32   `json:"priority"`
}

// CertData is a certificate with its private key (`cert/{domain}/data`).
type CertData struct {
	CertPEM  string `json:"cert_pem"`
	KeyPEM   string `json:"key_pem"`
	NotAfter uint64 `json:"not_after"` // seconds since the epoch
	IssuedBy uint32 `json:"issued_by"`
	IssuedAt uint64 `json:"issued_at"` // seconds since the epoch
}

// String keeps the private key out of logs.
func (c CertData) String() string {
	return "CertData(not after " + time.Unix(int64(c.NotAfter), 0).UTC().Format(time.RFC3339) + ", issued by node " + strconv.FormatUint(uint64(c.IssuedBy), 10) + ")"
}

// GoString is String: %#v must not show secrets either.
func (c CertData) GoString() string { return c.String() }

// CertAttestation binds a certificate's public key to the TEE (`cert/{domain}/attestation/{unix s}`).
type CertAttestation struct {
	PublicKey   []byte `json:"public_key"` // SubjectPublicKeyInfo, DER
	Quote       string `json:"quote"`
	Attestation string `json:"attestation"`
	GeneratedBy uint32 `json:"generated_by"`
	GeneratedAt uint64 `json:"generated_at"` // seconds since the epoch
}

// LockHolder says who holds a lock and since when.
type LockHolder struct {
	Node  uint32 `json:"started_by"`
	Since uint64 `json:"started_at"` // seconds since the epoch
}
