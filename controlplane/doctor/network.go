package doctor

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/dns"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
)

// checkResolvers asks every resolver that custom domains depend on.
func (h *Host) checkResolvers(ctx context.Context, cfg *config.Config) Result {
	servers := slices.Clone(cfg.Core.Proxy.AppAddressDNSServers)
	from := "core.proxy.app_address_dns_servers"
	if len(servers) == 0 {
		from = "/etc/resolv.conf"
		b, err := h.read(from)
		if err != nil {
			return fail("write nameserver lines there, or set core.proxy.app_address_dns_servers", "%s cannot be read, and the gateway does not start without resolvers: %v", from, err)
		}
		conf, err := dns.ClientConfigFromReader(strings.NewReader(string(b)))
		if err != nil {
			return fail("correct it", "%s cannot be read: %v", from, err)
		}
		for _, s := range conf.Servers {
			ip, err := netip.ParseAddr(s)
			if err != nil {
				return fail("correct it", "%s: nameserver %q is no address", from, s)
			}
			servers = append(servers, netip.AddrPortFrom(ip, 53))
		}
		if len(servers) == 0 {
			servers = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:53")}
		}
	}
	errs := make([]error, len(servers))
	var wg sync.WaitGroup
	for i, s := range servers {
		wg.Go(func() { errs[i] = h.AskResolver(ctx, s) })
	}
	wg.Wait()
	tab := &finding.Table{Columns: []string{"resolver", "answer"}}
	good := 0
	for i, s := range servers {
		said := "ok"
		if errs[i] == nil {
			good++
		} else {
			said = errs[i].Error()
		}
		tab.Add(s.String(), said)
	}
	var r Result
	switch {
	case good == len(servers):
		return ok("%s in %s, all answer", plural(len(servers), "resolver"), from)
	case good == 0:
		r = fail("see whether UDP and TCP port 53 get out, or set core.proxy.app_address_dns_servers to resolvers that can be reached",
			"no resolver of %s answers: custom domains are refused, and so are hosts in URLs of the configuration", from)
	default:
		r = warn("remove those that do not answer from "+from, "%d of %s in %s answer; lookups that meet the others take seconds longer", good, plural(len(servers), "resolver"), from)
	}
	r.Table = tab
	return r
}

// checkAgent asks the guest agent of the gateway's own CVM.
func (h *Host) checkAgent(ctx context.Context, cfg *config.Config) Result {
	c := &cfg.Core
	needed := c.RPCDomain != "" || !c.Debug.InsecureSkipAttestation
	if !needed {
		return skip("not needed: core.rpc_domain is empty and core.debug.insecure_skip_attestation is on")
	}
	id, err := h.AgentInfo(ctx, h.AgentAddress)
	if err != nil {
		why := "the own app id is asked for at the start (core.debug.insecure_skip_attestation is off)"
		if c.RPCDomain != "" {
			why = "it gives the certificate for core.rpc_domain " + c.RPCDomain
		}
		return fail("mount the agent's socket into the gateway's container, or set DSTACK_AGENT_ADDRESS; outside a CVM clear core.rpc_domain and set core.debug.insecure_skip_attestation = true",
			"%s, and it cannot be asked: %v", why, err)
	}
	return ok("%s answers; this is app %x", h.AgentAddress, id)
}

// checkWebhook connects to the registration webhook without asking it anything: a
// question would be about a CVM.
func (h *Host) checkWebhook(ctx context.Context, raw string) Result {
	u, err := url.Parse(raw)
	if err != nil || u.Hostname() == "" {
		return fail("write http(s)://host[:port]/path", "core.auth.url is no URL with a host")
	}
	where := u.Scheme + "://" + u.Host // neither path nor password belong into a report
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443"}[u.Scheme]
		if port == "" {
			port = "80"
		}
	}
	refuse := func(err error) Result {
		return fail("start the authorization server, or correct core.auth.url; until then every registration that is not cached is refused", "%s cannot be reached: %v", where, err)
	}
	nc, err := h.Dial(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return refuse(err)
	}
	defer nc.Close()
	if u.Scheme == "https" {
		t := tls.Client(nc, &tls.Config{ServerName: u.Hostname()})
		if err := t.HandshakeContext(ctx); err != nil {
			return refuse(err)
		}
	}
	return ok("%s takes connections", where)
}

// checkEtcd connects to the members of an external store.
func (h *Host) checkEtcd(ctx context.Context, members []string) Result {
	errs := make([]error, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() {
			host := m
			if u, err := url.Parse(m); err == nil && u.Host != "" {
				host = u.Host
			}
			if _, _, err := net.SplitHostPort(host); err != nil {
				host = net.JoinHostPort(host, "2379")
			}
			nc, err := h.Dial(ctx, "tcp", host)
			if err == nil {
				nc.Close()
			}
			errs[i] = err
		})
	}
	wg.Wait()
	tab := &finding.Table{Columns: []string{"member", "answer"}}
	good := 0
	for i, m := range members {
		if u, err := url.Parse(m); err == nil {
			m = u.Redacted()
		}
		if errs[i] == nil {
			good++
			tab.Add(m, "ok")
		} else {
			tab.Add(m, errs[i].Error())
		}
	}
	if good == len(members) {
		return ok("%d of %s take connections", good, plural(len(members), "member"))
	}
	r := warn("see why the others are down: etcd works while a majority does", "%d of %s take connections", good, plural(len(members), "member"))
	if good*2 <= len(members) {
		r = fail("start them, or correct core.store.endpoints; until then registrations go to the local journal, and issuance and admin writes are refused",
			"only %d of %s take connections, which is no majority", good, plural(len(members), "member"))
	}
	r.Table = tab
	return r
}
