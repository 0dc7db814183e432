package dev

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/dstack-gw/dstack-gw/dev/cvm"
	"github.com/dstack-gw/dstack-gw/ratls"
)

const (
	gatewayPatience = 30 * time.Second
	cvmPatience     = 30 * time.Second
	linePatience    = 30 * time.Second
	sharePatience   = 30 * time.Second
	shareRequests   = 20
)

// environment is one set of options at work.
type environment struct {
	state
	opt  *Options
	apps []app
	out  io.Writer
	now  func() time.Time
}

func newEnvironment(o *Options, out io.Writer) (*environment, error) {
	apps, err := plan()
	if err != nil {
		return nil, err
	}
	return &environment{state: state{o.StateDir}, opt: o, apps: apps, out: out, now: time.Now}, nil
}

func (e *environment) say(what, format string, args ...any) {
	fmt.Fprintf(e.out, "%-10s %s\n", what, fmt.Sprintf(format, args...))
}

func (e *environment) instances() []instance {
	var all []instance
	for _, a := range e.apps {
		all = append(all, a.instances...)
	}
	return all
}

// Up brings everything up, or what is missing of it, and tries every line that
// it prints. It must run as root. What an error leaves behind can be looked at
// with Status and is repaired by the next Up or removed by Down.
func Up(ctx context.Context, o Options, out io.Writer) error {
	if err := o.Check(); err != nil {
		return err
	}
	e, err := newEnvironment(&o, out)
	if err != nil {
		return err
	}
	if err := checkKernel(); err != nil {
		return err
	}
	if err := installPrograms(out); err != nil {
		return err
	}
	if err := e.create(); err != nil {
		return err
	}
	unlock, err := e.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := e.settle(ctx); err != nil {
		return err
	}
	if err := e.writeFiles(); err != nil {
		return err
	}
	e.say("state", "%s", e.dir)
	if err := e.bringUp(ctx); err != nil {
		return err
	}
	all := lines(e.opt, e.apps)
	if err := e.writeFacts(all); err != nil {
		return err
	}
	outputs, err := check(ctx, all, linePatience)
	if err != nil {
		return fmt.Errorf("these requests fail:\n  %w\nlook at %s", indent(err), e.log("gateway"))
	}
	counts, err := share(ctx, all[1], e.apps[0], shareRequests, sharePatience)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\nTry these; each has just worked:\n")
	for i, l := range all {
		fmt.Fprintf(out, "\n# %s\n%s\n#   %s\n", l.Title, l.Shell(), outputs[i])
	}
	fmt.Fprintf(out, "\nRequests for port 8080 of app web:")
	for _, i := range e.apps[0].instances {
		fmt.Fprintf(out, " %s answered %d", i.name, counts[i.name])
	}
	fmt.Fprintf(out, ".\nKill one with \"dstack dev kill %s\" and ask again. \"dstack dev status\" looks, \"dstack dev down\" removes everything.\n",
		e.apps[0].instances[0].name)
	return nil
}

func indent(err error) error {
	return errors.New(strings.ReplaceAll(err.Error(), "\n", "\n  "))
}

// settle compares with what is there: an environment with other options is taken
// down first, but keeps its keys.
func (e *environment) settle(ctx context.Context) error {
	old, err := e.saved()
	if err != nil {
		return err
	}
	switch {
	case old == nil:
		if err := checkForeign(e.opt, e.instances()); err != nil {
			return err
		}
	case !sameEnvironment(old, e.opt):
		e.say("options", "changed: the environment is built anew")
		was, err := newEnvironment(old, e.out)
		if err != nil {
			return err
		}
		if err := was.takeDown(ctx); err != nil {
			return err
		}
		if err := checkForeign(e.opt, e.instances()); err != nil {
			return err
		}
	}
	if err := checkNetworks(e.opt); err != nil {
		return err
	}
	return e.save(e.opt)
}

// sameEnvironment ignores the programs: whether those changed is seen process by
// process.
func sameEnvironment(a, b *Options) bool {
	x, y := *a, *b
	x.Self, x.Gateway, y.Self, y.Gateway = "", "", "", ""
	return x == y
}

// writeFiles makes all keys, certificates and configurations, or keeps those
// that are still good.
func (e *environment) writeFiles() error {
	o := e.opt
	ca, err := ratls.OpenCA(e.private("ca"), e.now)
	if err != nil {
		return err
	}
	web, err := openWebCA(e.webCA(), e.private("ca", "web-ca.key"), []string{o.BaseDomain, o.CustomDomain}, e.now)
	if err != nil {
		return err
	}
	if err := web.site(e.gateway(fileProxyCert), e.gateway(fileProxyKey), []string{"*." + o.BaseDomain}); err != nil {
		return err
	}
	id := gatewayAppID()
	if err := issue(ca, ratls.App{
		ID: id[:], Subject: "dstack-gateway", Names: []string{o.hostUplink().String()},
		ServerAuth: true, ClientAuth: true,
	}, e.gateway(fileRPCCert), e.gateway(fileRPCKey), e.now); err != nil {
		return err
	}
	if err := ratls.WriteFile(e.gateway(fileRPCCA), ca.CertificatePEM()); err != nil {
		return err
	}
	token, err := e.secret(e.gateway(fileAdminToken))
	if err != nil {
		return err
	}
	key, err := cvm.LoadKey(e.gateway(fileTunnelKey))
	if err != nil {
		return err
	}
	conf, err := gatewayConf(o, token, key)
	if err != nil {
		return fmt.Errorf("render %s: %w", fileGatewayConf, err)
	}
	if err := ratls.WriteFile(e.gateway(fileGatewayConf), conf); err != nil {
		return err
	}
	nginx, ok := find("nginx")
	if !ok {
		return errors.New("there is no program nginx")
	}
	www, err := wwwUser()
	if err != nil {
		return err
	}
	for i := range e.apps {
		for _, in := range e.apps[i].instances {
			if err := e.writeCVM(&e.apps[i], in, ca, web, nginx, www); err != nil {
				return fmt.Errorf("CVM %s: %w", in.name, err)
			}
		}
	}
	return nil
}

func (e *environment) writeCVM(a *app, in instance, ca *ratls.CA, web *webCA, nginx, www string) error {
	o := e.opt
	dir := e.cvm(in.name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	c := &cvm.Config{
		Name: in.name, InstanceID: in.id, Compose: a.compose, ReportPolicy: a.reports,
		GatewayURL: o.rpcURL(), GatewayAppID: gatewayAppIDHex(), WireGuard: o.WireGuard,
		Refresh: o.Refresh, Stale: o.Stale, Poll: o.Poll,
		Uplink: netip.PrefixFrom(o.guestUplink(in.index), o.Uplink.Bits()),
		Nginx:  nginx, NginxUser: www, Dir: dir,
	}
	compose, err := cvm.ParseCompose(a.compose)
	if err != nil {
		return err
	}
	instanceID, err := hex.DecodeString(in.id)
	if err != nil {
		return err
	}
	// There is no TEE to measure anything: the measurements are zero.
	info := &ratls.AppInfo{
		AppID: compose.AppID[:], ComposeHash: compose.Hash[:], InstanceID: instanceID,
		DeviceID: make([]byte, 32), OSImageHash: make([]byte, 32),
		KeyProviderInfo: []byte(`{"name":"dstack dev","id":""}`),
	}
	if err := issue(ca, ratls.App{ID: compose.AppID[:], Info: info, Subject: "dstack-guest-agent", ClientAuth: true},
		c.Path(cvm.FileClientCert), c.Path(cvm.FileClientKey), e.now); err != nil {
		return err
	}
	if err := ratls.WriteFile(c.Path(cvm.FileCA), ca.CertificatePEM()); err != nil {
		return err
	}
	names := []string{a.id + "-443s." + o.BaseDomain, in.id + "-443s." + o.BaseDomain}
	if a.name == e.apps[0].name {
		names = append(names, o.CustomDomain)
	}
	if err := web.site(c.Path(cvm.FileSiteCert), c.Path(cvm.FileSiteKey), names); err != nil {
		return err
	}
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return ratls.WriteFile(c.Path(cvm.FileConfig), text)
}

// bringUp makes the network and the processes, and waits until all work.
func (e *environment) bringUp(ctx context.Context) error {
	o := e.opt
	if err := ensureBridge(o); err != nil {
		return err
	}
	for _, in := range e.instances() {
		if err := ensureCVMNetwork(o, in); err != nil {
			return err
		}
	}
	e.say("network", "bridge %s (%v), overlay %v", o.bridge(), o.Uplink, o.Overlay)

	zone, err := json.Marshal(e.zone())
	if err != nil {
		return err
	}
	if err := ratls.WriteFile(e.private("zone.json"), zone); err != nil {
		return err
	}
	dns, err := e.ensure(process{
		name: "dns", argv: []string{o.Self, "dev", "dns", o.DNS.String(), e.private("zone.json")},
		inputs: []string{e.private("zone.json")},
	})
	if err != nil {
		return err
	}
	if err := e.waitDNS(ctx, dns); err != nil {
		return err
	}
	if err := e.bringUpGateway(ctx); err != nil {
		return err
	}

	var started []*running
	for _, in := range e.instances() {
		path := func(file string) string { return e.private("cvm", in.name, file) }
		r, err := e.ensure(process{
			name: in.name, argv: []string{o.Self, "dev", "cvm", path(cvm.FileConfig)}, namespace: o.namespace(in.name),
			inputs: []string{path(cvm.FileConfig), path(cvm.FileCA), path(cvm.FileClientCert), path(cvm.FileSiteCert)},
		})
		if err != nil {
			return err
		}
		started = append(started, r)
	}
	for i, in := range e.instances() {
		st, err := e.waitCVM(ctx, in, started[i])
		if err != nil {
			return err
		}
		e.say(in.name, "%s, tunnel address %s, %s WireGuard (%s)", started[i], st.ClientIP, st.Mode, st.Reason)
	}
	return nil
}

// String says which process it is.
func (r *running) String() string {
	if r.fresh {
		return fmt.Sprintf("process %d started", r.PID)
	}
	return fmt.Sprintf("process %d runs since %s", r.PID, r.Started.Format(time.DateTime))
}

func (e *environment) bringUpGateway(ctx context.Context) error {
	o := e.opt
	path := e.gateway(fileGatewayConf)
	r, err := e.ensure(process{
		name: "gateway", argv: []string{o.Gateway, "-c", path},
		inputs: []string{path, e.gateway(fileRPCCert), e.gateway(fileRPCCA), e.gateway(fileProxyCert)},
	})
	if err != nil {
		return err
	}
	token, err := e.secret(e.gateway(fileAdminToken))
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := gatewayReady(ctx, o, token, r.died, gatewayPatience); err != nil {
		select {
		case <-r.died:
			err = fmt.Errorf("the gateway does not run: %w", r.exit)
		default:
		}
		return fmt.Errorf("%w\n%s", err, e.tail("gateway", 15))
	}
	if l, err := linkByName(o.tunnel()); err == nil && l != nil {
		// For whoever looks at the machine's interfaces.
		if err := netlink.LinkSetAlias(l, o.owner()); err != nil {
			return fmt.Errorf("mark %s as ours: %w", o.tunnel(), err)
		}
	}
	e.say("gateway", "%s, ready after %.1f s, log %s", r, time.Since(begin).Seconds(), e.log("gateway"))
	return nil
}

// zone is what the DNS server says: the custom domain belongs to the first app,
// and every app is at the proxy's address.
func (e *environment) zone() *Zone {
	return &Zone{
		TXT: map[string]string{
			"_dstack-app-address." + e.opt.CustomDomain: fmt.Sprintf("%s:%d", e.apps[0].id, cvm.PortTLS),
		},
		Domain:  e.opt.BaseDomain,
		Address: e.opt.reach().Addr(),
	}
}

func (e *environment) waitDNS(ctx context.Context, r *running) error {
	for deadline := time.Now().Add(5 * time.Second); ; {
		err := askTXT(ctx, e.opt.DNS, "_dstack-app-address."+e.opt.CustomDomain)
		if err == nil {
			e.say("dns", "%s, at %s", r, e.opt.DNS)
			return nil
		}
		select {
		case <-r.died:
			return fmt.Errorf("the DNS server does not run: %w\n%s", r.exit, e.tail("dns", 5))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the DNS server does not answer: %w\n%s", err, e.tail("dns", 5))
		}
	}
}

// waitCVM waits until the CVM is registered, has a tunnel, and serves.
func (e *environment) waitCVM(ctx context.Context, in instance, r *running) (*cvm.Status, error) {
	path := e.private("cvm", in.name, cvm.FileStatus)
	var last string
	for deadline := time.Now().Add(cvmPatience); ; {
		st, err := cvm.ReadStatus(path)
		switch {
		case err != nil:
			last = err.Error()
		case st.PID != r.PID:
			last = "it has not written its status yet"
		case st.Error != "":
			last = st.Error
		case st.ClientIP == "":
			last = "it is not registered yet"
		case st.Nginx != "":
			last = "nginx: " + st.Nginx
		case st.Handshake.IsZero():
			last = fmt.Sprintf("no WireGuard handshake with the gateway yet (UDP %s:%d; does a firewall on this machine drop what comes from %v?)",
				e.opt.hostUplink(), e.opt.WireGuardPort, e.opt.Uplink)
		default:
			return st, nil
		}
		select {
		case <-r.died:
			return nil, fmt.Errorf("CVM %s does not run: %w\n%s", in.name, r.exit, e.tail(in.name, 15))
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("CVM %s is not up after %v: %s\n%s", in.name, cvmPatience, last, e.tail(in.name, 10))
		}
	}
}

func (e *environment) writeFacts(all []Line) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetIndent("", "  ")
	if err := enc.Encode(Facts{BaseDomain: e.opt.BaseDomain, Proxy: e.opt.reach().String(), WebCA: e.webCA(), Lines: all}); err != nil {
		return err
	}
	return writePublic(e.facts(), b.Bytes())
}
