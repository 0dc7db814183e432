package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// files are the checks of the files that the configuration names.
func files(cfg *config.Config, h *Host) []Check {
	c := &cfg.Core
	var list []Check
	add := func(name string, f func() Result) {
		list = append(list, Check{name, GroupConfig, func(context.Context) Result { return f() }})
	}
	add("rpc certificate", func() Result { return h.checkRPCCertificate(cfg) })
	if c.Admin.Enabled && c.Admin.Server.TLS.Enabled() {
		add("admin certificate", func() Result { return h.checkPair("core.admin.tls", c.Admin.Server.TLS.Certs, c.Admin.Server.TLS.Key) })
	}
	if c.Admin.Enabled && c.Admin.HtpasswdFile != "" {
		add("admin users", func() Result { return h.checkSecret("core.admin.htpasswd_file", c.Admin.HtpasswdFile) })
	}
	if c.Proxy.StaticCert() {
		add("static certificate", func() Result {
			return h.checkPair("core.proxy.cert_chain and cert_key", c.Proxy.CertChain, c.Proxy.CertKey, "*."+c.Proxy.BaseDomain)
		})
	}
	if c.Store.PasswordFile != "" {
		add("store password", func() Result { return h.checkSecret("core.store.password_file", c.Store.PasswordFile) })
	}
	if c.WG.Mode != config.WGNone && c.WG.ConfigPath != "" {
		add("peer file", func() Result { return h.checkPeerFile(c.WG.ConfigPath) })
	}
	return list
}

func (h *Host) checkRPCCertificate(cfg *config.Config) Result {
	t := &cfg.Server.TLS
	if t.Key == "" || t.Certs == "" || t.Mutual.CACerts == "" {
		return fail("set [tls] key, certs and mutual.ca_certs", "the main server has no complete certificate set, and guests register over mutual TLS only")
	}
	if cfg.Core.RPCDomain != "" {
		for _, p := range []string{t.Key, t.Certs, t.Mutual.CACerts} {
			if !h.exists(p) {
				return h.awaitsAgent(cfg.Core.RPCDomain, []string{t.Key, t.Certs, t.Mutual.CACerts})
			}
		}
	}
	r := h.checkPair("[tls]", t.Certs, t.Key)
	if r.Status == finding.Fail {
		return r
	}
	if n, err := h.countCerts(t.Mutual.CACerts); err != nil || n == 0 {
		if err == nil {
			err = errors.New("there is no certificate in it")
		}
		return fail("put the CA that signs the guests' certificates there, in PEM", "tls.mutual.ca_certs %s cannot be used: %v", t.Mutual.CACerts, err)
	}
	return r
}

// awaitsAgent is for files that the gateway writes at its start.
func (h *Host) awaitsAgent(domain string, paths []string) Result {
	for _, p := range paths {
		dir := filepath.Dir(h.abs(p))
		if err := h.TryWrite(dir); err != nil {
			return fail("create the directory and give it to the gateway's user", "the certificate for core.rpc_domain %s is written at every start, and %s cannot be written: %v", domain, dir, err)
		}
	}
	return ok("not there yet; the guest agent gives one for core.rpc_domain %s at every start", domain)
}

func (h *Host) countCerts(path string) (int, error) {
	b, err := h.read(path)
	if err != nil {
		return 0, err
	}
	n := 0
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return n, nil
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return n, fmt.Errorf("certificate %d: %w", n+1, err)
		}
		n++
	}
}

// checkPair looks at a certificate chain and its key. names are what it must be for.
func (h *Host) checkPair(what, certs, key string, names ...string) Result {
	chain, err := h.read(certs)
	if err != nil {
		return fail(remedy(err, certs), "%s: the certificate chain %s cannot be read: %v", what, certs, err)
	}
	secret, err := h.read(key)
	if err != nil {
		return fail(remedy(err, key), "%s: the private key %s cannot be read: %v", what, key, err)
	}
	pair, err := tls.X509KeyPair(chain, secret)
	if err != nil {
		return fail("write the pair anew, both in PEM, the leaf first", "%s: %s and %s are no certificate and its key: %v", what, certs, key, err)
	}
	leaf := pair.Leaf
	r := ok("%s: for %s, valid until %s", what, list(leaf.DNSNames, 3), leaf.NotAfter.UTC().Format(time.RFC3339))
	now := h.Now()
	left := leaf.NotAfter.Sub(now)
	switch {
	case left <= 0:
		return fail("replace it", "%s: the certificate %s expired %s ago", what, certs, span(-left))
	case now.Before(leaf.NotBefore):
		return fail("set the clock, or wait", "%s: the certificate %s is valid only from %s on", what, certs, leaf.NotBefore.UTC().Format(time.RFC3339))
	case left < leaf.NotAfter.Sub(leaf.NotBefore)/6:
		r = warn("replace it in time", "%s: the certificate %s expires in %s", what, certs, span(left))
	}
	for _, n := range names {
		// A wildcard is not a host name; one below it is covered if it is.
		probe := n
		if len(n) > 2 && n[:2] == "*." {
			probe = "x" + n[1:]
		}
		if err := leaf.VerifyHostname(probe); err != nil {
			return fail("use a certificate for "+n, "%s: the certificate %s is for %s, not for %s", what, certs, list(leaf.DNSNames, 3), n)
		}
	}
	return worse(r, h.mode(key))
}

// mode complains about secrets that others can read.
func (h *Host) mode(path string) Result {
	i, err := h.stat(path)
	if err != nil {
		return ok("")
	}
	if m := i.Mode().Perm(); m&0o077 != 0 {
		return warn("chmod 600 "+h.abs(path), "%s is a secret and has mode %04o, so other users can read it", path, m)
	}
	return ok("")
}

// worse is the first of two results unless the second is worse.
func worse(a, b Result) Result {
	if finding.Worst(a.Status, b.Status) == a.Status {
		return a
	}
	return b
}

func (h *Host) checkSecret(what, path string) Result {
	b, err := h.read(path)
	switch {
	case err != nil:
		return fail(remedy(err, path), "%s %s cannot be read: %v", what, path, err)
	case len(b) == 0:
		return fail("fill it", "%s %s is empty", what, path)
	}
	return worse(ok("%s %s is there", what, path), h.mode(path))
}

func (h *Host) checkPeerFile(path string) Result {
	dir := filepath.Dir(h.abs(path))
	if !h.exists(dir) {
		return warn("mkdir -p "+dir, "the directory of core.wg.config_path %s is missing, so the peers are not written there for other tools", path)
	}
	if err := h.TryWrite(dir); err != nil {
		return warn("give the directory to the gateway's user, or clear core.wg.config_path", "core.wg.config_path %s cannot be written, so other tools do not see the peers: %v", path, err)
	}
	return worse(ok("core.wg.config_path %s can be written", path), h.mode(path))
}

func remedy(err error, path string) string {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "create " + path + ", or correct the path in the configuration"
	case errors.Is(err, fs.ErrPermission):
		return "run as root, or give the gateway's user the right to read " + path
	}
	return "see what is at " + path
}

// span is a duration in the unit that people would use.
func span(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int64(d/time.Second))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int64(d/time.Minute))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int64(d/time.Hour))
	}
	return fmt.Sprintf("%dd", int64(d/(24*time.Hour)))
}
