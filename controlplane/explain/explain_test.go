package explain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/dstack-gw/dstack-gw/controlplane/customdomain"
	"github.com/dstack-gw/dstack-gw/controlplane/doctor/finding"
	"github.com/dstack-gw/dstack-gw/controlplane/wireguard"
	"github.com/dstack-gw/dstack-gw/dataplane"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

func TestNew(t *testing.T) {
	if _, err := New(Deps{}); err == nil {
		t.Error("made without a gateway")
	}
}

// custom points shop.example to id:port.
func (w *world) custom(name, id string, port uint16) {
	w.resolved[name] = resolved{answer: customdomain.Answer{ID: id, Port: port}}
	w.txts["_dstack-app-address."+name] = TXT{Records: [][]string{{fmt.Sprintf("%s:%d", id, port)}}, TTL: 5 * time.Minute, Server: "192.0.2.53:53"}
}

// cases are what can become of a connection. Those with a golden file are compared
// as text in full.
var cases = []struct {
	name    string
	input   string
	setup   func(*world)
	outcome Outcome
	by      string // RefusedBy
	reason  dataplane.Reason
	status  finding.Status
	step    string // a step to look at
	says    string // what it says
	hint    string // what one of its hints says
	client  string
	golden  bool
}{
	// name
	{name: "terminate", input: "https://" + appA + "-8080.GW.example/path?q#f", outcome: Served, status: finding.Warn, step: stepInstances, says: "2 of 3 instances healthy, 2 tried", client: "sees the gateway's certificate for *.gw.example", golden: true},
	{name: "address", input: "192.0.2.1:443", outcome: Refused, by: stepName, reason: dataplane.ReasonNoSNI, status: finding.Fail, step: stepName, says: "it is an IP address", client: "cannot send such a server name", golden: true},
	{name: "address6", input: "https://[2001:db8::1]/", outcome: Refused, by: stepName, reason: dataplane.ReasonNoSNI, status: finding.Fail, step: stepName, says: "it is an IP address"},
	{name: "odd label", input: "-x.shop.example", setup: func(w *world) { w.custom("-x.shop.example", appA, 443) }, outcome: Broken, status: finding.Fail, step: stepName, says: `the label "-x" begins or ends with a hyphen`},
	{name: "unicode", input: "bücher.example", outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepName, says: "xn--bcher-kva.example, which is what browsers send"},

	// listener and public address
	{name: "other port", input: appA + ".gw.example:8443", outcome: Served, status: finding.Warn, step: stepListener, says: "nothing here listens on port 8443, the proxy listens on port 443", hint: "load balancer"},
	{name: "plain http", input: "http://" + appA + ".gw.example", outcome: Served, status: finding.Warn, step: stepListener, says: "serves TLS only", hint: "https://"},
	{name: "no listener", input: appA + ".gw.example", setup: func(w *world) { w.deps.Listeners = nil }, outcome: Served, status: finding.Warn, step: stepListener, says: "has no listener"},
	{name: "address elsewhere", input: appA + ".gw.example", setup: func(w *world) {
		w.hosts[appA+".gw.example"] = []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.9")}
	}, outcome: Served, status: finding.Warn, step: stepAddress, says: "DNS says 192.0.2.9, this gateway is reached at 203.0.113.1"},
	{name: "no address", input: appA + ".gw.example", setup: func(w *world) { w.hosts[appA+".gw.example"] = nil }, outcome: Served, status: finding.Warn, step: stepAddress, says: "has no address in DNS"},

	// domain
	{name: "dots only", input: "..gw.example", outcome: Refused, by: stepDomain, reason: dataplane.ReasonNoSNI, status: finding.Fail, step: stepDomain, says: "cannot be split"},
	{name: "base itself", input: "gw.example", outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepDomain, says: "is itself a base domain", hint: "<app id>.gw.example"},
	{name: "too deep", input: "www." + appA + ".gw.example", outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepDomain, says: "more than one label", hint: "exactly one label"},
	{name: "no base", input: appA + ".gw.example", setup: func(w *world) { w.bases() }, outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepDomain, says: "no base domain at all", hint: "AddZtDomain"},
	{name: "slip", input: appA + ".gv.example", outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepDomain, says: "custom domain", hint: "slip of the pen for gw.example"},
	{name: "leftover", input: appA + ".old.example", setup: func(w *world) {
		b := w.base("old.example", now.Add(70*24*time.Hour))
		b.Configured = false
		w.bases(b)
	}, outcome: Served, status: finding.Warn, step: stepDomain, says: "not configured any more"},

	// label
	{name: "gs", input: appA + "-8080gs.gw.example", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepLabel, says: "invalid port", hint: appA + "-8080s for passthrough", golden: true},
	{name: "sg", input: appA + "-8080sg.gw.example", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepLabel, says: "`gs` is not allowed", hint: "-8080s or "},
	{name: "bad port", input: appA + "-65536.gw.example", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepLabel, says: `"65536" is not a number from 1 to 65535`},
	{name: "two dashes", input: "my-app-80.gw.example", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepLabel, says: `"app" is not a number`},
	{name: "three parts", input: appA + "-80-1.gw.example", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepLabel, says: "one dash only", hint: "ids have no dash"},
	{name: "no id", input: "-80.gw.example", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepLabel, says: "nothing stands before the dash"},

	// reserved names
	{name: "gateway", input: "gateway.gw.example", outcome: Served, status: finding.OK, step: stepReserved, says: "served by the gateway itself", client: "the gateway's own HTTP endpoints", golden: true},
	{name: "health", input: "health.gw.example", outcome: Served, status: finding.OK, client: "gets 200"},
	{name: "gateway port", input: "gateway-81.gw.example", outcome: Refused, by: stepReserved, reason: dataplane.ReasonPortPolicy, status: finding.Fail, step: stepReserved, says: "Only port 80 is supported for this node", hint: "gateway.gw.example"},
	{name: "gateway passthrough", input: "gateway-s.gw.example", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepReserved, says: "as passthrough it is an ordinary id"},
	{name: "gateway without certificate", input: "gateway.new.example", outcome: Refused, by: stepCertificate, reason: dataplane.ReasonTLS, status: finding.Fail},
	{name: "localhost off", input: "localhost-80.gw.example", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepReserved, says: "insecure_localhost_backend is off"},
	{name: "localhost on", input: "localhost-80.gw.example", setup: func(w *world) { w.deps.Localhost = true }, outcome: Served, status: finding.Warn, step: stepReserved, says: "without a port policy", hint: "in production"},

	// txt
	{name: "custom", input: "shop.example", setup: func(w *world) {
		w.custom("shop.example", appA, 8443)
		w.dials["10.8.0.1:8443"] = speaksTLS(w.ca.issue(w.t, now.Add(60*24*time.Hour), "shop.example"), 0)
	}, outcome: Served, status: finding.Warn, step: stepAppTLS, says: "speaks TLS 1.3", client: "the app's certificate", golden: true},
	{name: "wildcard", input: "a.shop.example", setup: func(w *world) {
		w.resolved["a.shop.example"] = resolved{answer: customdomain.Answer{ID: instA, Port: 443}}
		w.txts["_dstack-app-address-wildcard.shop.example"] = TXT{Records: [][]string{{instA + ":443"}}, Alias: "txt.example"}
		w.txts["_tapp-address.a.shop.example"] = TXT{Server: "broken"}
		w.dials["10.8.0.1:443"] = speaksTLS(w.ca.issue(w.t, now.Add(60*24*time.Hour), "*.shop.example"), 0)
	}, outcome: Served, status: finding.OK, step: stepTXT, says: "leads to id " + instA},
	{name: "no record", input: "www.shop.example", outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepTXT, says: "no TXT record at", hint: "_dstack-app-address.www.shop.example", client: "cut off right after its ClientHello", golden: true},
	{name: "malformed", input: "shop.example", setup: func(w *world) {
		w.txts["_dstack-app-address.shop.example"] = TXT{Records: [][]string{{"my app \x1b[31m"}, {appA + ":443"}}, TTL: time.Minute}
		w.txts["_tapp-address.shop.example"] = TXT{Records: [][]string{{appA + ":443"}}, TTL: time.Minute}
		w.resolved["shop.example"] = resolved{err: fmt.Errorf("%w: TXT record x is %q: it has no colon", customdomain.ErrMalformed, "my app \x1b[31m")}
	}, outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepTXT, says: "has no colon", hint: "has 2 TXT records", golden: true},
	{name: "two strings", input: "shop.example", setup: func(w *world) {
		w.custom("shop.example", appA, 44)
		w.txts["_dstack-app-address.shop.example"] = TXT{Records: [][]string{{appA + ":44", "3"}}}
	}, outcome: Broken, status: finding.Fail, step: stepTXT, hint: "consists of 2 strings"},
	{name: "resolver fails", input: "shop.example", setup: func(w *world) {
		w.resolved["shop.example"] = resolved{err: fmt.Errorf("%w: 192.0.2.53:53: i/o timeout", customdomain.ErrResolver)}
	}, outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepTXT, says: "i/o timeout", hint: "app_address_dns_servers"},
	{name: "overload", input: "shop.example", setup: func(w *world) { w.resolved["shop.example"] = resolved{err: customdomain.ErrOverload} },
		outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepTXT, hint: "many unknown names"},
	{name: "out of date", input: "shop.example", setup: func(w *world) {
		w.custom("shop.example", appA, 443)
		w.cached["shop.example"] = resolved{answer: customdomain.Answer{ID: "gone", Port: 443}}
	}, outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTXT, says: "DNS says " + appA + ":443 by now", hint: "TTL"},
	{name: "remembered as missing", input: "shop.example", setup: func(w *world) {
		w.custom("shop.example", appA, 443)
		w.cached["shop.example"] = resolved{err: customdomain.ErrNotFound}
	}, outcome: Refused, by: stepTXT, reason: dataplane.ReasonDNS, status: finding.Fail, step: stepTXT, says: "by now", hint: "10 s"},
	{name: "custom reserved", input: "shop.example", setup: func(w *world) { w.custom("shop.example", "gateway", 80) },
		outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTarget, hint: "TXT records cannot lead there"},
	{name: "custom upper case", input: "shop.example", setup: func(w *world) { w.custom("shop.example", strings.ToUpper(appA), 80) },
		outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTarget, hint: "in lower case, " + appA},
	{name: "no fresh lookups", input: "shop.example", setup: func(w *world) { w.deps.LookupTXT = nil; w.custom("shop.example", instA, 80) },
		outcome: Broken, status: finding.Fail, step: stepTXT, says: "leads to id"},

	// app
	{name: "unknown app", input: "eeee000000000000000000000000000000000009.gw.example", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTarget, says: "no app and no instance has the id", hint: "see whether it registers", golden: true},
	{name: "suffix without dash", input: appA + "s.gw.example", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTarget, hint: appA + "-s"},
	{name: "similar", input: "aaaa000000000000000000000000000000000008.gw.example", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTarget, hint: "similar ids: " + appA},
	{name: "name as id", input: "myapp.gw.example", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail, step: stepTarget, hint: "40 lower-case hex digits"},

	// instances
	{name: "stale app", input: appS + ".gw.example", setup: func(w *world) { w.dials["10.8.0.6:80"] = hangs }, outcome: Refused, by: stepInstances, reason: dataplane.ReasonNoInstance, status: finding.Fail, step: stepInstances, says: "no instance of 1 has a WireGuard handshake younger than 30m", client: "cut off right after", golden: true},
	{name: "stale instance", input: instC + "-8080.gw.example", outcome: Served, status: finding.Warn, step: stepInstances, says: "the instance is named, so it alone is tried, although"},
	{name: "handshakes never read", input: appS + ".gw.example", setup: func(w *world) {
		w.table = &wireguard.Table{}
		w.status.LastError = "operation not permitted"
	}, outcome: Refused, by: stepInstances, reason: dataplane.ReasonNoInstance, status: finding.Fail, step: stepInstances, hint: "could not be read yet (operation not permitted)"},
	{name: "handshakes old", input: appS + ".gw.example", setup: func(w *world) { w.table.Taken = now.Add(-time.Hour) },
		outcome: Refused, by: stepInstances, reason: dataplane.ReasonNoInstance, status: finding.Fail, step: stepInstances, hint: "last read 60m ago"},
	{name: "one random", input: appA + "-8080.gw.example", setup: func(w *world) { w.deps.Selection.TopN = 0 }, outcome: Served, status: finding.Warn, step: stepInstances, says: "1 tried"},

	// port policy
	{name: "denied", input: appP + "-22.gw.example", outcome: Refused, by: stepPolicy, reason: dataplane.ReasonPortPolicy, status: finding.Fail, step: stepPolicy, says: "port 22 denied by app port policy for " + appP + " (1 candidate)", hint: "port_policy", golden: true},
	{name: "no port listed", input: appP + "-22.gw.example", setup: func(w *world) { w.add(appP, instP, 4, time.Second, restricted(nil)) },
		outcome: Refused, by: stepPolicy, reason: dataplane.ReasonPortPolicy, status: finding.Fail, step: stepPolicy, hint: "lists no port at all"},
	{name: "unknown policy", input: appU + ".gw.example", setup: func(w *world) {
		w.deps.PolicyFetch = func(id string) string { return "10.8.0.5:8090: connection refused, 3 of 6 attempts" }
	}, outcome: Refused, by: stepPolicy, reason: dataplane.ReasonPortPolicy, status: finding.Fail, step: stepPolicy, says: "waits up to 5s", hint: "agent", client: "waits up to 5s", golden: true},
	{name: "policies differ", input: appP + "-22.gw.example", setup: func(w *world) { w.add(appP, instB, 2, 5*time.Second, open) },
		outcome: Served, status: finding.Warn, step: stepPolicy, says: "allowed by 1 of 2 instances"},
	{name: "stale and denied", input: appP + "-22.gw.example", setup: func(w *world) { w.snap.Instance(instP).State.Handshake.Store(1) },
		outcome: Refused, by: stepInstances, reason: dataplane.ReasonNoInstance, status: finding.Fail, step: stepPolicy, says: "denied"},

	// app limit
	{name: "limit", input: appA + ".gw.example", setup: func(w *world) { w.snap.App(appA).State.Active.Store(2000) },
		outcome: Refused, by: stepLimit, reason: dataplane.ReasonAppLimit, status: finding.Fail, step: stepLimit, says: "2000 of 2000", hint: "max_connections_per_app"},
	{name: "close to the limit", input: appA + ".gw.example", setup: func(w *world) { w.snap.App(appA).State.Active.Store(1800) }, outcome: Served, status: finding.Warn, step: stepLimit, says: "close to its limit"},
	{name: "no limit", input: appA + ".gw.example", setup: func(w *world) { w.deps.MaxPerApp = 0 }, outcome: Served, status: finding.Warn, step: stepLimit, says: "no limit"},

	// certificate
	{name: "no certificate", input: appA + ".new.example", outcome: Refused, by: stepCertificate, reason: dataplane.ReasonTLS, status: finding.Fail, step: stepCertificate, says: "no certificate for *.new.example is loaded", hint: "-<port>s"},
	{name: "no certificate, passthrough", input: appA + "-443s.new.example", setup: func(w *world) {
		w.dials["10.8.0.1:443"] = speaksTLS(w.ca.issue(w.t, now.Add(60*24*time.Hour), "x.example"), 0)
	},
		outcome: Served, status: finding.Warn, step: stepAppTLS, says: "it is not for " + appA + "-443s.new.example"},
	{name: "expired", input: appA + ".gw.example", setup: func(w *world) { w.bases(w.base("gw.example", now.Add(-time.Hour))) },
		outcome: Refused, by: stepCertificate, reason: dataplane.ReasonTLS, status: finding.Fail, step: stepCertificate, says: "it expired 60m ago", hint: "RenewZtDomainCert", client: "refuses the certificate"},
	{name: "not yet valid", input: appA + ".gw.example", setup: func(w *world) { w.bases(w.base("gw.example", now.Add(91*24*time.Hour))) },
		outcome: Refused, by: stepCertificate, reason: dataplane.ReasonTLS, status: finding.Fail, step: stepCertificate, says: "clock"},
	{name: "soon expired", input: appA + "-8080g.gw.example", setup: func(w *world) { w.bases(w.base("gw.example", now.Add(10*24*time.Hour))) },
		outcome: Served, status: finding.Warn, step: stepCertificate, says: "should have been renewed", client: "must offer HTTP/2"},
	{name: "untrusted", input: appA + ".gw.example", setup: func(w *world) {
		w.bases(newWorld(w.t).base("gw.example", now.Add(60*24*time.Hour)))
	}, outcome: Served, status: finding.Warn, step: stepCertificate, says: "does not trust"},

	// tunnel and connect
	{name: "refused port", input: instA + "-8080.gw.example", setup: func(w *world) { w.dials["10.8.0.1:8080"] = refused },
		outcome: Refused, by: stepConnect, reason: dataplane.ReasonDial, status: finding.Fail, step: stepConnect, says: "no instance of 1 accepts a connection on port 8080: refused", hint: "0.0.0.0", client: "empty reply", golden: true},
	{name: "one of two", input: appA + "-8080.gw.example", setup: func(w *world) { w.dials["10.8.0.2:8080"] = hangs }, outcome: Served, status: finding.Warn, step: stepConnect, says: "accepted by 1 of 2 instances; the others cost time: timeout"},
	{name: "dead tunnel", input: instC + "-8080s.gw.example", setup: func(w *world) { w.dials["10.8.0.3:8080"] = hangs },
		outcome: Refused, by: stepTunnel, reason: dataplane.ReasonDial, status: finding.Fail, step: stepTunnel, says: "the tunnel is silent", hint: "every 25 s", client: "gets no answer to its ClientHello", golden: true},
	{name: "no peer", input: instA + "-8080.gw.example", setup: func(w *world) {
		delete(w.table.Peers, key(1))
		w.dials["10.8.0.1:8080"] = fails(unix.ENOKEY)
		w.status.LastError = "no buffer space available"
	}, outcome: Refused, by: stepTunnel, reason: dataplane.ReasonDial, status: finding.Fail, step: stepTunnel, says: "missing on the device", hint: "no buffer space available"},
	{name: "never", input: appS + "-1.gw.example", outcome: Refused, by: stepInstances, reason: dataplane.ReasonNoInstance, status: finding.Fail, step: stepTunnel, says: "without any handshake", hint: "over UDP"},
	{name: "interface down", input: instA + "-8080.gw.example", setup: func(w *world) {
		w.status.Up = false
		w.dials["10.8.0.1:8080"] = fails(unix.ENETUNREACH)
	}, outcome: Refused, by: stepTunnel, reason: dataplane.ReasonDial, status: finding.Fail, step: stepTunnel, says: "wg0 is not up", hint: "ip link set wg0 up"},
	{name: "unmanaged", input: instA + "-8080.gw.example", setup: func(w *world) {
		w.status.Mode = wireguard.Unmanaged
		w.table = &wireguard.Table{}
	}, outcome: Served, status: finding.Warn, step: stepTunnel, hint: "no WireGuard interface"},
	{name: "no WireGuard", input: instA + "-8080.gw.example", setup: func(w *world) { w.status.Mode = wireguard.None }, outcome: Served, status: finding.OK, step: stepTunnel, says: "no WireGuard interface"},

	// app tls
	{name: "plain app", input: instA + "-8080s.gw.example", setup: func(w *world) { w.dials["10.8.0.1:8080"] = answers("HTTP/1.1 400 Bad Request\r\n\r\n") },
		outcome: Broken, status: finding.Fail, step: stepAppTLS, says: "answers plaintext HTTP instead of TLS", hint: instA + "-8080.gw.example, without the s", golden: true},
	{name: "ssh app", input: instA + "-8080s.gw.example", setup: func(w *world) { w.dials["10.8.0.1:8080"] = answers("SSH-2.0-OpenSSH\r\n") },
		outcome: Broken, status: finding.Fail, step: stepAppTLS, says: `its answer begins with "SSH-2"`},
	{name: "silent app", input: instA + "-8080s.gw.example", outcome: Broken, status: finding.Fail, step: stepAppTLS, says: "does not answer a ClientHello"},
	{name: "closing app", input: instA + "-8080s.gw.example", setup: func(w *world) { w.dials["10.8.0.1:8080"] = answers("") }, outcome: Broken, status: finding.Fail, step: stepAppTLS, says: "closes the connection after the ClientHello", hint: "PROXY header"},
	{name: "app with PROXY header", input: instP + "-8443s.gw.example", setup: func(w *world) {
		w.dials["10.8.0.4:8443"] = speaksTLS(w.ca.issue(w.t, now.Add(60*24*time.Hour), "*.gw.example"), 16)
	}, outcome: Served, status: finding.OK, step: stepAppTLS, says: "speaks TLS 1.3"},

	// ids
	{name: "bare app", input: appP, outcome: Unknown, status: finding.Warn, step: stepPolicy, says: "no port was given", golden: true},
	{name: "bare instance with port", input: instP + ":8080", outcome: Served, status: finding.OK, step: stepConnect, says: "port 8080 is accepted"},
	{name: "bare upper case", input: strings.ToUpper(appA) + ":80", outcome: Served, status: finding.Warn, step: stepTarget, says: "app " + appA},
	{name: "bare label", input: instP + "-22", outcome: Refused, by: stepPolicy, reason: dataplane.ReasonPortPolicy, status: finding.Fail},
	{name: "bare passthrough", input: instP + "-8443s", outcome: Served, status: finding.OK, step: stepAppTLS, says: "an id was given"},
	{name: "bare unknown", input: "nobody", outcome: Refused, by: stepTarget, reason: dataplane.ReasonUnknownApp, status: finding.Fail},
	{name: "bare nonsense", input: "no-body-1", outcome: Refused, by: stepLabel, reason: dataplane.ReasonUnknownApp, status: finding.Fail},
}

func TestExplain(t *testing.T) {
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			if tt.setup != nil {
				tt.setup(w)
			}
			r := w.explain(tt.input)
			r.TookMS = 0
			var text bytes.Buffer
			if err := r.WriteText(&text); err != nil {
				t.Fatal(err)
			}
			reason := ""
			if tt.outcome == Refused {
				reason = tt.reason.String()
			}
			if r.Outcome != tt.outcome || r.RefusedBy != tt.by || r.Reason != reason || r.Status() != tt.status {
				t.Errorf("outcome %s by %q (%s), status %s; want %s by %q (%s), status %s", r.Outcome, r.RefusedBy, r.Reason, r.Status(), tt.outcome, tt.by, reason, tt.status)
			}
			if !strings.Contains(r.Client, tt.client) {
				t.Errorf("client: %q, want %q", r.Client, tt.client)
			}
			if tt.step != "" {
				s := find(r, tt.step)
				if s == nil || !strings.Contains(s.Text, tt.says) || !strings.Contains(strings.Join(s.Hints, "\n"), tt.hint) {
					t.Errorf("step %s: %+v, want %q, hint %q", tt.step, s, tt.says, tt.hint)
				}
			}
			checkShape(t, r)
			if tt.golden {
				golden(t, strings.ReplaceAll(tt.name, " ", "_")+".txt", text.Bytes())
			}
			if t.Failed() {
				t.Log(text.String())
			}
		})
	}
}

func find(r *Report, name string) *Step {
	for i := range r.Steps {
		if r.Steps[i].Name == name {
			return &r.Steps[i]
		}
	}
	return nil
}

// checkShape is what holds for every report: each step once and in order, failing
// steps have a remedy, JSON keeps everything.
func checkShape(t *testing.T, r *Report) {
	t.Helper()
	order := []string{stepName, stepListener, stepAddress, stepDomain, stepLabel, stepReserved, stepTXT, stepTarget, stepInstances, stepPolicy, stepLimit, stepCertificate, stepTunnel, stepConnect, stepAppTLS}
	if len(r.Steps) > 1 {
		var got []string
		for _, s := range r.Steps {
			got = append(got, s.Name)
		}
		if !reflect.DeepEqual(got, order) {
			t.Errorf("steps %v", got)
		}
	}
	for _, s := range r.Steps {
		if s.Status == finding.Fail && len(s.Hints) == 0 && s.Name != stepDomain {
			t.Errorf("step %s fails without a hint: %s", s.Name, s.Text)
		}
		if s.Text == "" {
			t.Errorf("step %s says nothing", s.Name)
		}
		switch s.Status {
		case finding.OK, finding.Warn, finding.Fail, finding.Skip:
		default:
			t.Errorf("step %s has status %q", s.Name, s.Status)
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	var x, y bytes.Buffer
	_ = r.WriteText(&x)
	_ = back.WriteText(&y)
	if x.String() != y.String() {
		t.Errorf("text after JSON differs:\n%s\n%s", x.String(), y.String())
	}
	if strings.ContainsAny(x.String(), "\x1b\x00\a") {
		t.Error("control characters in the text")
	}
	for line := range strings.Lines(x.String()) {
		if strings.HasSuffix(line, " \n") {
			t.Errorf("white space at the end of %q", line)
		}
	}
}

// A denied port is never dialled, and no instance more than once.
func TestDialsAreFew(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	count := map[string]int{}
	dial := w.deps.Dial
	w.deps.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		mu.Lock()
		count[address]++
		mu.Unlock()
		return dial(ctx, network, address)
	}
	w.explain(appP + "-22.gw.example")
	w.explain(appU + ".gw.example")
	if len(count) != 0 {
		t.Errorf("ports that the policy closes were dialled: %v", count)
	}
	w.explain(appA + "-8080.gw.example")
	if !reflect.DeepEqual(count, map[string]int{"10.8.0.1:8080": 1, "10.8.0.2:8080": 1}) {
		t.Errorf("dialled %v", count)
	}
}

// A large app is shown in part.
func TestManyInstances(t *testing.T) {
	w := newWorld(t)
	for n := byte(10); n < 100; n++ {
		w.add(appA, fmt.Sprintf("7777%036d", n), n, time.Duration(n)*time.Second, open)
	}
	s := find(w.explain(appA+".gw.example"), stepInstances)
	if len(s.Table.Rows) != maxRows || s.Details["not shown"] != "69 instances" || !strings.Contains(s.Text, "92 of 93 instances healthy, 3 tried") {
		t.Errorf("%d rows, %q, %q", len(s.Table.Rows), s.Details["not shown"], s.Text)
	}
	for i := range 3 {
		if s.Table.Rows[i][0] != fmt.Sprint(i+1) {
			t.Errorf("row %d: %v", i, s.Table.Rows[i])
		}
	}
}

// What the report says is what the data plane's own selection gives.
func TestRankFollowsFailures(t *testing.T) {
	w := newWorld(t)
	w.snap.Instance(instA).State.FailedAt.Store(int64(w.mono - 3*time.Second))
	s := find(w.explain(appA+".gw.example"), stepInstances)
	if s.Table.Rows[0][1] != instB || s.Table.Rows[1][1] != instA || s.Table.Rows[1][6] != "failed 3s ago, tried last" {
		t.Errorf("%v", s.Table.Rows)
	}
}

// A report ends in time whatever hangs.
func TestBoundedTime(t *testing.T) {
	w := newWorld(t)
	w.deps.Timeout = 300 * time.Millisecond
	w.deps.LookupTXT = func(ctx context.Context, name string) (TXT, error) { <-ctx.Done(); return TXT{}, ctx.Err() }
	w.deps.LookupHost = func(ctx context.Context, name string) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }
	w.deps.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) { return hangs(ctx) }
	w.custom("shop.example", appA, 443)
	began := time.Now()
	r := w.explain("shop.example")
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("took %s", took)
	}
	if r.Outcome != Unknown || !strings.Contains(r.Verdict, "no time left") {
		t.Errorf("%s %s", r.Outcome, r.Verdict)
	}
	checkShape(t, r)
}

// More reports than slots wait, and give up.
func TestBoundedConcurrency(t *testing.T) {
	w := newWorld(t)
	w.deps.MaxReports, w.deps.Timeout, w.deps.ProbeTimeout = 1, time.Second, time.Second
	started, release := make(chan struct{}), make(chan struct{})
	w.deps.Dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
		close(started)
		<-release
		return nil, errors.New("enough")
	}
	e, err := New(w.deps)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { e.Explain(t.Context(), instA+"-1.gw.example") })
	<-started
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	r := e.Explain(ctx, "gateway.gw.example")
	if r.Outcome != Unknown || !strings.Contains(r.Verdict, "busy") || len(r.Steps) != 1 {
		t.Errorf("%+v", r)
	}
	close(release)
	wg.Wait()
	if r := e.Explain(t.Context(), "gateway.gw.example"); r.Outcome != Served {
		t.Errorf("%+v", r)
	}
}

func TestDialProblem(t *testing.T) {
	for err, want := range map[error]string{
		unix.ECONNREFUSED: "refused", unix.ENOKEY: "no WireGuard peer", unix.EDESTADDRREQ: "no WireGuard endpoint", unix.EADDRNOTAVAIL: "no free local port",
		unix.EMFILE: "no free descriptor", unix.EHOSTUNREACH: "unreachable", unix.EPERM: "forbidden", unix.ECONNRESET: "reset", unix.ETIMEDOUT: "timeout",
		context.DeadlineExceeded: "timeout", errors.New("odd"): "odd",
	} {
		got, hint := dialProblem(&net.OpError{Op: "dial", Err: err}, 80)
		if want == "odd" {
			want = "dial: odd"
		}
		if got != want || hint == "" {
			t.Errorf("%v: %q, %q", err, got, hint)
		}
	}
}

func TestHandler(t *testing.T) {
	w := newWorld(t)
	e, err := New(w.deps)
	if err != nil {
		t.Fatal(err)
	}
	get := func(method, target, accept string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, target, nil)
		r.Header.Set("Accept", accept)
		rec := httptest.NewRecorder()
		e.Handler().ServeHTTP(rec, r)
		return rec
	}
	if rec := get("GET", "/explain", ""); rec.Code != 400 {
		t.Errorf("no name: %d", rec.Code)
	}
	if rec := get("GET", "/explain?name="+strings.Repeat("a", maxInput+1), ""); rec.Code != 400 {
		t.Errorf("long name: %d", rec.Code)
	}
	if rec := get("POST", "/explain?name=a.b", ""); rec.Code != 405 {
		t.Errorf("POST: %d", rec.Code)
	}
	rec := get("GET", "/explain?name="+url.QueryEscape("https://gateway.gw.example/"), "application/json")
	var r Report
	if err := json.Unmarshal(rec.Body.Bytes(), &r); err != nil || rec.Code != 200 || r.Outcome != Served || r.Name != "gateway.gw.example" {
		t.Errorf("%d %v %s", rec.Code, err, rec.Body)
	}
	if rec := get("GET", "/explain?name=a.b", "text/plain"); !strings.HasPrefix(rec.Body.String(), "a.b at 2026-05-04T03:00:00Z\n") {
		t.Errorf("%s", rec.Body)
	}
}

func TestRunCLI(t *testing.T) {
	w := newWorld(t)
	e, err := New(w.deps)
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "control.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(Path, e.Handler())
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { srv.Serve(ln); close(done) }()
	defer func() { srv.Close(); <-done }()
	for _, tt := range []struct {
		c    CLI
		code int
		says string
	}{
		{CLI{Input: "gateway.gw.example"}, 0, "Served: by the gateway itself"},
		{CLI{Input: "gateway.gw.example", Style: finding.Style{Color: true}}, 0, "\x1b[32mServed:"},
		{CLI{Input: appA + "-8080.gw.example"}, 1, "2 of 3 instances"},
		{CLI{Input: appP + "-22.gw.example"}, 2, "Refused by port policy"},
		{CLI{Input: "gateway.gw.example", JSON: true}, 0, `"outcome": "served"`},
		{CLI{Input: "", Socket: socket}, 2, "400 Bad Request"},
		{CLI{Input: "x\x1b", Socket: socket + "x"}, 2, `cannot explain x\u001b: no gateway answers`},
		{CLI{Input: "x", Socket: socket + "x", JSON: true}, 2, `{"error":"no gateway answers`},
	} {
		if tt.c.Socket == "" {
			tt.c.Socket = socket
		}
		var out bytes.Buffer
		tt.c.Out = &out
		if code := RunCLI(t.Context(), tt.c); code != tt.code || !strings.Contains(out.String(), tt.says) {
			t.Errorf("%+v: exit %d, want %d\n%s", tt.c, code, tt.code, out.String())
		}
	}
}

var (
	_ Registry  = (*world)(nil)
	_ WireGuard = (*wireguard.Device)(nil)
	_ Resolver  = (*customdomain.Resolver)(nil)
	_           = wgtypes.Key{}
	_           = routing.Deny
)
