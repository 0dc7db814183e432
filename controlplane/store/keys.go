package store

import (
	"fmt"
	"strconv"
	"strings"
)

// Prefixes of the key space (gateway spec 8.3), for Watch.
const (
	PrefixInstances      = "inst/"
	PrefixNodes          = "node/"
	PrefixNodeInfo       = "node/info/"
	PrefixNodeStatus     = "node/status/"
	PrefixPeerAddrs      = "__peer_addr/"
	PrefixDNSCredentials = "dns_cred/"
	PrefixCerts          = "cert/"
	PrefixGlobal         = "global/"

	KeyDefaultDNSCredential = "dns_cred_default"
	KeyCertbotConfig        = "global/certbot_config"
	KeyACMECredentials      = "global/acme_credentials"
	KeyACMEAttestation      = "global/acme_attestation"
	KeyACMERotationLock     = "global/acme_rotation_lock"
)

// Kind says what a key stands for.
type Kind int

const (
	KindOther            Kind = iota // not one of the store's keys
	KindInstance                     // ID: instance id
	KindNodeInfo                     // ID: decimal node id
	KindNodeStatus                   // ID: decimal node id
	KindPeerAddr                     // ID: decimal node id
	KindDNSCredential                // ID: credential id
	KindDefaultDNSCred               // no ID
	KindCertbotConfig                // no ID
	KindACMECredentials              // no ID
	KindACMEAttestation              // no ID
	KindACMERotationLock             // no ID
	KindZTDomain                     // ID: domain
	KindCertData                     // ID: domain
	KindCertLock                     // ID: domain
	KindCertAttestation              // ID: domain
)

// parseKey splits a key into what it stands for and whom it belongs to.
func parseKey(key string) (Kind, string) {
	switch key {
	case KeyDefaultDNSCredential:
		return KindDefaultDNSCred, ""
	case KeyCertbotConfig:
		return KindCertbotConfig, ""
	case KeyACMECredentials:
		return KindACMECredentials, ""
	case KeyACMEAttestation:
		return KindACMEAttestation, ""
	case KeyACMERotationLock:
		return KindACMERotationLock, ""
	}
	for _, p := range []struct {
		prefix string
		kind   Kind
	}{
		{PrefixInstances, KindInstance}, {PrefixNodeInfo, KindNodeInfo}, {PrefixNodeStatus, KindNodeStatus},
		{PrefixPeerAddrs, KindPeerAddr}, {PrefixDNSCredentials, KindDNSCredential},
	} {
		if id, ok := strings.CutPrefix(key, p.prefix); ok && id != "" {
			return p.kind, id
		}
	}
	if rest, ok := strings.CutPrefix(key, PrefixCerts); ok {
		domain, what, _ := strings.Cut(rest, "/")
		switch {
		case domain == "":
		case what == "config":
			return KindZTDomain, domain
		case what == "data":
			return KindCertData, domain
		case what == "lock":
			return KindCertLock, domain
		case strings.HasPrefix(what, "attestation/"):
			return KindCertAttestation, domain
		}
	}
	return KindOther, ""
}

// volatile keys live on a lease and are not worth a backup.
func volatileKey(key string) bool {
	k, _ := parseKey(key)
	return k == KindCertLock || k == KindACMERotationLock
}

// sealedKey says whether a value is a secret that is encrypted when a sealing key is configured.
func sealedKey(key string) bool {
	k, _ := parseKey(key)
	return k == KindDNSCredential || k == KindACMECredentials || k == KindCertData
}

func instanceKey(id string) string      { return PrefixInstances + id }
func nodeInfoKey(id uint32) string      { return PrefixNodeInfo + strconv.FormatUint(uint64(id), 10) }
func nodeStatusKey(id uint32) string    { return PrefixNodeStatus + strconv.FormatUint(uint64(id), 10) }
func peerAddrKey(id uint32) string      { return PrefixPeerAddrs + strconv.FormatUint(uint64(id), 10) }
func dnsCredentialKey(id string) string { return PrefixDNSCredentials + id }

const attestationDir = "/attestation/"

func certKey(domain, what string) string { return PrefixCerts + domain + "/" + what }

// checkName refuses names that would escape their place in the key space or make a key ambiguous.
func checkName(what, name string) error {
	if name == "" || len(name) > 253 || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("store: %s %q cannot be part of a key: want 1 to 253 bytes without slash and NUL", what, name)
	}
	return nil
}

// group is the part of a key up to the first slash; reads by prefix need to look at one group only.
func group(key string) string {
	g, _, _ := strings.Cut(key, "/")
	return g
}
