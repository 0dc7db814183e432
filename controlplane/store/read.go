package store

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/dstack-gw/dstack-gw/controlplane/registry"
)

// The getters read memory. A record that does not decode is skipped, logged once and counted in Status, because one bad
// record must not take the others along; only the ACME account fails closed (gateway spec 8.3).

// decode reads value and keeps account of what cannot be read.
func (s *Store) decode(key string, value []byte, record any) bool {
	err := s.codec.decode(key, value, record)
	s.badMu.Lock()
	defer s.badMu.Unlock()
	if err == nil {
		delete(s.bad, key)
		return true
	}
	if old, known := s.bad[key]; !known || old != err.Error() {
		s.log.Warn("a record is skipped", "key", key, "err", err)
	}
	s.bad[key] = err.Error()
	return false
}

func (s *Store) undecodable() int {
	s.badMu.Lock()
	defer s.badMu.Unlock()
	for key := range s.bad {
		if _, there := s.mirror.get(key); !there {
			delete(s.bad, key)
		}
	}
	return len(s.bad)
}

// one reads the record of a key.
func one[T any](s *Store, key string) (record T, ok bool) {
	value, ok := s.mirror.get(key)
	if !ok || !s.decode(key, value, &record) {
		var zero T
		return zero, false
	}
	return record, true
}

// Instances returns all registrations by id, those in the journal included.
func (s *Store) Instances() []registry.Instance {
	list := s.mirror.list(PrefixInstances)
	out := make([]registry.Instance, 0, len(list))
	for _, kv := range list {
		var r instanceRecord
		if s.decode(kv.key, kv.value, &r) {
			out = append(out, r.instance(kv.key[len(PrefixInstances):]))
		}
	}
	return out
}

// Instance returns one registration.
func (s *Store) Instance(id string) (registry.Instance, bool) {
	r, ok := one[instanceRecord](s, instanceKey(id))
	if !ok {
		return registry.Instance{}, false
	}
	return r.instance(id), true
}

// nodeID reads the number at the end of a key.
func nodeID(key, prefix string) (uint32, bool) {
	n, err := strconv.ParseUint(strings.TrimPrefix(key, prefix), 10, 32)
	return uint32(n), err == nil
}

// Nodes returns all gateways by id.
func (s *Store) Nodes() []Node {
	var out []Node
	for _, kv := range s.mirror.list(PrefixNodeInfo) {
		var n Node
		if id, ok := nodeID(kv.key, PrefixNodeInfo); ok && s.decode(kv.key, kv.value, &n) {
			n.ID = id
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// NodeStatuses returns the marks by node id; a node without a mark is not in it and counts as up.
func (s *Store) NodeStatuses() map[uint32]NodeStatus {
	out := make(map[uint32]NodeStatus)
	for _, kv := range s.mirror.list(PrefixNodeStatus) {
		var r nodeStatusRecord
		if id, ok := nodeID(kv.key, PrefixNodeStatus); ok && s.decode(kv.key, kv.value, &r) {
			out[id] = r.Status
		}
	}
	return out
}

// PeerAddrs returns the RPC URLs by node id.
func (s *Store) PeerAddrs() map[uint32]string {
	out := make(map[uint32]string)
	for _, kv := range s.mirror.list(PrefixPeerAddrs) {
		var r peerAddrRecord
		if id, ok := nodeID(kv.key, PrefixPeerAddrs); ok && s.decode(kv.key, kv.value, &r) {
			out[id] = r.URL
		}
	}
	return out
}

func (r dnsCredentialRecord) credential(id string) DNSCredential {
	c := r.DNSCredential
	c.ID, c.MaxWait = id, duration(r.MaxWaitSecs)
	return c
}

// DNSCredentials returns all credentials by id.
func (s *Store) DNSCredentials() []DNSCredential {
	var out []DNSCredential
	for _, kv := range s.mirror.list(PrefixDNSCredentials) {
		var r dnsCredentialRecord
		if s.decode(kv.key, kv.value, &r) {
			out = append(out, r.credential(kv.key[len(PrefixDNSCredentials):]))
		}
	}
	return out
}

// DNSCredential returns one credential.
func (s *Store) DNSCredential(id string) (DNSCredential, bool) {
	r, ok := one[dnsCredentialRecord](s, dnsCredentialKey(id))
	if !ok {
		return DNSCredential{}, false
	}
	return r.credential(id), true
}

// DefaultDNSCredential returns the id of the default credential, empty if none is set.
func (s *Store) DefaultDNSCredential() string {
	r, _ := one[defaultCredentialRecord](s, KeyDefaultDNSCredential)
	return r.ID
}

func (r certbotConfigRecord) config() CertbotConfig {
	return CertbotConfig{duration(r.RenewIntervalSecs), duration(r.RenewBeforeSecs), duration(r.RenewTimeoutSecs), r.ACMEURL}
}

// CertbotConfig returns the settings of issuance, the defaults if none are stored.
func (s *Store) CertbotConfig() CertbotConfig {
	r, ok := one[certbotConfigRecord](s, KeyCertbotConfig)
	if !ok {
		return DefaultCertbotConfig()
	}
	return r.config()
}

// ACMECredentials returns the account as JSON text (gateway spec 7.4). A record that cannot be read is an error and not
// "none": registering another account would lose the CAA binding.
func (s *Store) ACMECredentials() (text string, found bool, err error) {
	value, ok := s.mirror.get(KeyACMECredentials)
	if !ok {
		return "", false, nil
	}
	var r acmeCredentialsRecord
	if err := s.codec.decode(KeyACMECredentials, value, &r); err != nil {
		return "", false, err
	}
	return r.JSON, true, nil
}

// ACMEAttestation returns the attestation of the account.
func (s *Store) ACMEAttestation() (ACMEAttestation, bool) {
	return one[ACMEAttestation](s, KeyACMEAttestation)
}

// ZTDomains returns the configured base domains, sorted.
func (s *Store) ZTDomains() []ZTDomain {
	var out []ZTDomain
	for _, kv := range s.mirror.list(PrefixCerts) {
		if kind, domain := parseKey(kv.key); kind == KindZTDomain {
			var d ZTDomain
			if s.decode(kv.key, kv.value, &d) {
				d.Domain = domain
				out = append(out, d)
			}
		}
	}
	slices.SortFunc(out, func(a, b ZTDomain) int { return cmp.Compare(a.Domain, b.Domain) })
	return out
}

// ZTDomain returns the configuration of one base domain.
func (s *Store) ZTDomain(domain string) (ZTDomain, bool) {
	d, ok := one[ZTDomain](s, certKey(domain, "config"))
	d.Domain = domain
	return d, ok
}

// Certs returns all stored certificates by domain, those of domains that are not configured any more included.
func (s *Store) Certs() map[string]CertData {
	out := make(map[string]CertData)
	for _, kv := range s.mirror.list(PrefixCerts) {
		if kind, domain := parseKey(kv.key); kind == KindCertData {
			var c CertData
			if s.decode(kv.key, kv.value, &c) {
				out[domain] = c
			}
		}
	}
	return out
}

// CertData returns the certificate of one domain.
func (s *Store) CertData(domain string) (CertData, bool) {
	return one[CertData](s, certKey(domain, "data"))
}

// CertAttestations returns the latest attestation of a domain's keys (nil if none) and the history, newest first.
func (s *Store) CertAttestations(domain string) (latest *CertAttestation, history []CertAttestation) {
	if a, ok := one[CertAttestation](s, certKey(domain, "attestation/latest")); ok {
		latest = &a
	}
	for _, h := range s.attestationKeys(domain) {
		if a, ok := one[CertAttestation](s, h.key); ok {
			history = append(history, a)
		}
	}
	return latest, history
}

type attestationKey struct {
	key string
	at  uint64
}

// attestationKeys returns the keys of the history, newest first.
func (s *Store) attestationKeys(domain string) []attestationKey {
	dir := PrefixCerts + domain + attestationDir
	var out []attestationKey
	for _, kv := range s.mirror.list(dir) {
		if at, err := strconv.ParseUint(kv.key[len(dir):], 10, 64); err == nil {
			out = append(out, attestationKey{kv.key, at})
		}
	}
	slices.SortFunc(out, func(a, b attestationKey) int { return cmp.Compare(b.at, a.at) })
	return out
}

// LockHolders returns who holds the lock of a domain's certificate, if anybody does.
func (s *Store) CertLockHolder(domain string) (LockHolder, bool) {
	return one[LockHolder](s, certKey(domain, "lock"))
}
