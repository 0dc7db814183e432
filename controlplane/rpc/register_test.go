package rpc

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/registry"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/ratls"
)

func request(key string) string { return `{"client_public_key":"` + key + `"}` }

func TestRegisterAnswer(t *testing.T) {
	f := newFixture(t, nil)
	ctx := t.Context()
	for _, n := range []store.Node{
		{ID: 3, UUID: store.UUID{3}, URL: "https://gw3", WGPublicKey: "key3", WGIP: "10.8.128.1/16", WGEndpoint: "203.0.113.7:51820"},
		{ID: 2, UUID: store.UUID{2}, URL: "https://gw2", WGPublicKey: "key2", WGIP: "10.8.64.1/16", WGEndpoint: "203.0.113.6:51820"},
		// What the store remembers of this node gives way to the configuration.
		{ID: 1, UUID: store.UUID{99}, URL: "https://old", WGPublicKey: "old", WGIP: "10.9.0.1/16", WGEndpoint: "192.0.2.1:1"},
	} {
		if _, err := f.store.PutNode(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	f.caller = guest(t, appA, inst1, compose1)
	server := func(pk, ip, ep string) string {
		return `{"pk":"` + pk + `","ip":"` + ip + `","endpoint":"` + ep + `"}`
	}
	node := func(id int, uuid, url, pk, ip, ep string) string {
		return fmt.Sprintf(`{"id":%d,"uuid":"%s","url":"%s","last_seen":0,"wg_public_key":"%s","wg_ip":"%s","wg_endpoint":"%s"}`, id, uuid, url, pk, ip, ep)
	}
	me := server(ownKey, "10.8.0.1/16", "203.0.113.5:51820")
	meNode := node(1, "000102030405060708090a0b0c0d0e0f", "https://gw1.example.com:9202", ownKey, "10.8.0.1/16", "203.0.113.5:51820")
	two := server("key2", "10.8.64.1/16", "203.0.113.6:51820")
	twoNode := node(2, "02000000000000000000000000000000", "https://gw2", "key2", "10.8.64.1/16", "203.0.113.6:51820")
	three := server("key3", "10.8.128.1/16", "203.0.113.7:51820")
	threeNode := node(3, "03000000000000000000000000000000", "https://gw3", "key3", "10.8.128.1/16", "203.0.113.7:51820")
	answer := func(ip, agent string, servers, nodes []string) string {
		return `{"wg":{"client_ip":"` + ip + `","servers":[` + strings.Join(servers, ",") + `]},"agent":` + agent + `,"gateways":[` + strings.Join(nodes, ",") + `]}`
	}
	noDomain := `{"external_port":0,"internal_port":8090,"domain":"","app_address_ns_prefix":"_dstack-app-address"}`
	all := answer("10.8.0.2", noDomain, []string{me, two, three}, []string{meNode, twoNode, threeNode})
	f.equal(f.main, "RegisterCvm", request(wgKey(1)), all)

	// The same again, later: the same bytes, no write, no change of the tunnel.
	f.clock.advance(3 * time.Minute)
	f.equal(f.main, "RegisterCvm", request(wgKey(1)), all)
	f.equal(f.main, "Tproxy.RegisterCvm", request(wgKey(1)), all)
	f.equal(f.main, "Gateway.RegisterCvm", request(wgKey(1)), all)
	if f.writes.count() != 1 || len(f.wg.peers()) != 1 {
		t.Errorf("%d writes and %d peers, want one each", f.writes.count(), len(f.wg.peers()))
	}
	if p := f.wg.peers()[0]; p.ID != inst1 || p.IP != netip.MustParseAddr("10.8.0.2") || p.PublicKey.String() != wgKey(1) {
		t.Errorf("peer %+v", p)
	}
	if i, ok := f.store.Instance(inst1); !ok || i.AppID != appA || i.IP != netip.MustParseAddr("10.8.0.2") || i.RegTime != 1700000000 || i.PolicyHash != compose1 {
		t.Errorf("stored %+v %v", i, ok)
	}

	// Nodes that are down are left out, until they are up again.
	f.equal(f.admin, "SetNodeStatus", `{"id":2,"status":"down"}`, "null")
	f.equal(f.main, "RegisterCvm", request(wgKey(1)), answer("10.8.0.2", noDomain, []string{me, three}, []string{meNode, threeNode}))
	f.equal(f.admin, "SetNodeStatus", `{"id":2,"status":"up"}`, "null")
	f.equal(f.main, "RegisterCvm", request(wgKey(1)), all)

	// The best domain is announced: the highest priority among those served here.
	f.ok(f.admin, "AddZtDomain", `{"domain":"low.example.com","port":443,"priority":1}`)
	f.ok(f.admin, "AddZtDomain", `{"domain":"high.example.com","port":8443,"priority":100}`)
	f.ok(f.admin, "AddZtDomain", `{"domain":"elsewhere.example.com","port":443,"priority":200,"node":2}`)
	f.caller = guest(t, appA, inst2, compose1)
	high := `{"external_port":8443,"internal_port":8090,"domain":"high.example.com","app_address_ns_prefix":"_dstack-app-address"}`
	f.equal(f.main, "RegisterCvm", request(wgKey(2)), answer("10.8.0.3", high, []string{me, two, three}, []string{meNode, twoNode, threeNode}))
	f.equal(f.main, "Info", "null", `{"base_domain":"high.example.com","external_port":8443,"app_address_ns_prefix":"_dstack-app-address","version":"0.6.0"}`)
}

// TestRegisterRefusals has one row for every way of gateway spec 3.2 to fail.
func TestRegisterRefusals(t *testing.T) {
	f := newFixture(t, nil)
	f.caller = guest(t, appA, inst1, compose1)
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	policy := func(ports string) string {
		return `{"client_public_key":"` + wgKey(2) + `","port_policy":{"ports":[` + ports + `],"restrict_mode":true}}`
	}
	for _, tc := range []struct {
		name   string
		caller *ratls.Identity
		body   string
		want   string
	}{
		{"anonymous", nil, request(wgKey(2)), "neither app-info nor attestation provided"},
		{"app id extension alone", &ratls.Identity{AppID: []byte{1}}, request(wgKey(2)), "neither app-info nor attestation provided"},
		{"port too large", guest(t, appA, inst2, compose1), policy(`{"port":80},{"port":65536}`), "port 65536 out of u16 range"},
		{"port zero", guest(t, appA, inst2, compose1), policy(`{"port":0}`), "port must be between 1 and 65535"},
		{"no app id", guest(t, "", inst2, compose1), request(wgKey(2)), "[" + inst2 + "] app id is empty"},
		{"no instance id", guest(t, appA, "", compose1), request(wgKey(2)), "[] instance id is empty"},
		{"key of another", guest(t, appA, inst2, compose1), request(wgKey(1)), "failed to allocate IP address for client: WireGuard public key is already registered to another instance"},
		{"other app", guest(t, appB, inst1, compose1), request(wgKey(1)), "failed to allocate IP address for client: instance_id is already registered to a different app"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.t, f.caller = t, tc.caller
			f.refused(f.main, "RegisterCvm", tc.body, tc.want)
		})
	}
	f.t, f.caller = t, guest(t, appA, inst2, compose1)
	for _, key := range []string{"", "x", "AQEB", wgKey(2)[:43], wgKey(2) + "\n", strings.Replace(wgKey(2), "=", "-", 1), ownKey, hex.EncodeToString(make([]byte, 32))} {
		body := `{"client_public_key":` + quote(strings.ReplaceAll(key, "\n", "")) + `}`
		if strings.HasSuffix(key, "\n") {
			body = `{"client_public_key":"` + wgKey(2) + `\n"}`
		}
		code, out := f.ask(f.main, "RegisterCvm", body)
		if code != 400 || !strings.Contains(out, "["+inst2+"] invalid client public key: ") {
			t.Errorf("key %q: %d %s", key, code, out)
		}
	}
	if f.writes.count() != 1 || f.reg.Len() != 1 {
		t.Errorf("refused registrations left %d writes and %d instances", f.writes.count(), f.reg.Len())
	}

	f.ok(f.admin, "SetNodeStatus", `{"id":1,"status":"down"}`)
	f.refused(f.main, "RegisterCvm", request(wgKey(2)), "this gateway node is marked as down and cannot accept new registrations")
	f.refused(f.debug, "RegisterCvm", request(wgKey(2)), "this gateway node is marked as down and cannot accept new registrations")
	f.ok(f.admin, "SetNodeStatus", `{"id":1,"status":"up"}`)
	f.ok(f.main, "RegisterCvm", request(wgKey(2)))
}

func TestPoolExhausted(t *testing.T) {
	f := newFixture(t, func(d *Deps) {
		var err error
		if d.Registry, err = registry.New(registry.Config{Network: netip.MustParsePrefix("10.8.0.1/24"), Reserved: []netip.Prefix{netip.MustParsePrefix("10.8.0.1/32")},
			ClientRange: netip.MustParsePrefix("10.8.0.0/30")}, d.Now); err != nil {
			t.Fatal(err)
		}
	})
	f.caller = guest(t, appA, inst1, compose1)
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	f.caller = guest(t, appA, inst2, compose1)
	f.refused(f.main, "RegisterCvm", request(wgKey(2)), "failed to allocate IP address for client: IP pool exhausted, no available addresses in client_ip_range")
}

// TestRegisterKnownInstance goes through step 10.
func TestRegisterKnownInstance(t *testing.T) {
	f := newFixture(t, nil)
	withPolicy := func(key, policy string) string {
		return `{"client_public_key":"` + key + `","port_policy":` + policy + `}`
	}
	show := func() string {
		t.Helper()
		return f.ok(f.admin, "GetInstancePortPolicy", `{"instance_id":"`+inst1+`"}`)
	}
	f.caller = guest(t, appA, inst1, compose1)
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	if id := <-f.missing; id != inst1 {
		t.Errorf("policy of %s is said to be missing", id)
	}
	if got := show(); got != `{"effective":null,"source":"none","instance_reported":null,"admin_override":null}` {
		t.Errorf("no policy: %s", got)
	}

	// 10d: a policy comes; of two entries for a port the later wins; ports ascend.
	f.ok(f.main, "RegisterCvm", withPolicy(wgKey(1), `{"ports":[{"port":8080,"pp":true},{"port":443,"pp":true},{"port":8080,"pp":false}],"restrict_mode":true}`))
	reported := `{"ports":[{"port":443,"pp":true},{"port":8080,"pp":false}],"restrict_mode":true}`
	if got := show(); got != `{"effective":`+reported+`,"source":"instance","instance_reported":`+reported+`,"admin_override":null}` {
		t.Errorf("reported policy: %s", got)
	}
	// A registration without one keeps it, for the same compose file.
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	if f.writes.count() != 2 {
		t.Errorf("%d writes, want 2", f.writes.count())
	}
	if len(f.missing) != 0 {
		t.Error("a known policy is said to be missing")
	}
	admin := `{"ports":[{"port":22,"pp":false}],"restrict_mode":true}`
	f.equal(f.admin, "SetInstancePortPolicy", `{"instance_id":"`+inst1+`","policy":`+admin+`}`, "null")

	// 10b, 10c: new key and new compose file: another time, the reported policy is forgotten, the override stays.
	f.clock.advance(time.Hour)
	f.caller = guest(t, appA, inst1, compose2)
	f.ok(f.main, "RegisterCvm", request(wgKey(9)))
	if got := show(); got != `{"effective":`+admin+`,"source":"admin","instance_reported":null,"admin_override":`+admin+`}` {
		t.Errorf("after an upgrade: %s", got)
	}
	if id := <-f.missing; id != inst1 {
		t.Errorf("policy of %s is said to be missing", id)
	}
	i, _ := f.store.Instance(inst1)
	if i.PublicKey != wgKey(9) || i.RegTime != 1700003600 || i.PolicyHash != compose2 || i.IP != netip.MustParseAddr("10.8.0.2") || i.AdminPolicy == nil {
		t.Errorf("stored %+v", i)
	}
	if p := f.wg.peers(); len(p) != 2 || p[1].PublicKey.String() != wgKey(9) {
		t.Errorf("peers %+v", p)
	}

	// An empty policy is a policy: open.
	f.ok(f.main, "RegisterCvm", withPolicy(wgKey(9), `{}`))
	f.ok(f.admin, "ClearInstancePortPolicy", `{"instance_id":"`+inst1+`"}`)
	open := `{"ports":[],"restrict_mode":false}`
	if got := show(); got != `{"effective":`+open+`,"source":"instance","instance_reported":`+open+`,"admin_override":null}` {
		t.Errorf("open policy: %s", got)
	}

	// 10f: an address of another node's range gives way to one of ours; the override stays.
	f.ok(f.admin, "SetInstancePortPolicy", `{"instance_id":"`+inst1+`","policy":`+admin+`}`)
	i, _ = f.reg.Instance(inst1)
	i.IP = netip.MustParseAddr("10.8.64.2")
	if _, err := f.reg.Apply(i); err != nil {
		t.Fatal(err)
	}
	if got := f.ok(f.main, "RegisterCvm", request(wgKey(9))); !strings.Contains(got, `"client_ip":"10.8.0.2"`) {
		t.Errorf("answer %s", got)
	}
	if i, _ = f.store.Instance(inst1); i.AdminPolicy == nil || i.IP != netip.MustParseAddr("10.8.0.2") {
		t.Errorf("stored %+v", i)
	}
}

// TestEvidenceInstead: without app info in the certificate, verified evidence tells who it is; with both, app info does.
func TestEvidenceInstead(t *testing.T) {
	f := newFixture(t, nil)
	f.caller = &ratls.Identity{Attested: appInfo(t, appA, inst1, compose1)}
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	f.caller = &ratls.Identity{Info: appInfo(t, appA, inst2, compose1), Attested: appInfo(t, appA, inst1, compose1)}
	f.ok(f.main, "RegisterCvm", request(wgKey(2)))
	if ids := f.reg.List(); len(ids) != 2 || ids[1].ID != inst2 {
		t.Errorf("registered %+v", ids)
	}
}

// TestVectors are those of gateway spec B.4.
func TestVectors(t *testing.T) {
	f := newFixture(t, nil)
	f.caller = guest(t, appA, inst1, compose1)
	post := func(h http.Handler, path, body string) (int, string, []byte) {
		raw, err := hex.DecodeString(body)
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("POST", path, bytes.NewReader(raw)))
		return w.Code, w.Header().Get("Content-Type"), w.Body.Bytes()
	}
	key := "0a2c415145424151454241514542415145424151454241514542415145424151454241514542415145424151453d"
	for _, tc := range []struct{ name, body, want string }{
		{"no policy", key, `"instance_reported":null`},
		{"empty policy", key + "1200", `"instance_reported":{"ports":[],"restrict_mode":false}`},
		{"restricted", key + "120e0a0508bb0310010a0308903f1001", `"instance_reported":{"ports":[{"port":443,"pp":true},{"port":8080,"pp":false}],"restrict_mode":true}`},
	} {
		code, ct, body := post(f.main, "/prpc/RegisterCvm", tc.body)
		resp := new(gatewaypb.RegisterCvmResponse)
		if err := proto.Unmarshal(body, resp); code != 200 || ct != "application/octet-stream" || err != nil || resp.GetWg().GetClientIp() != "10.8.0.2" {
			t.Errorf("%s: %d %s %x", tc.name, code, ct, body)
		}
		if i, _ := f.reg.Instance(inst1); i.PublicKey != "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=" {
			t.Errorf("%s: key %s", tc.name, i.PublicKey)
		}
		if got := f.ok(f.admin, "GetInstancePortPolicy", `{"instance_id":"`+inst1+`"}`); !strings.Contains(got, tc.want) {
			t.Errorf("%s: %s", tc.name, got)
		}
	}
	if code, _, body := post(f.admin, "/prpc/SetNodeStatus", "08021204646f776e"); code != 200 || len(body) != 0 {
		t.Errorf("SetNodeStatus: %d %x", code, body)
	}
	if got := f.store.NodeStatuses()[2]; got != store.NodeDown {
		t.Errorf("node 2 is %q", got)
	}
	if code, _, body := post(f.main, "/prpc/Foo", ""); code != 400 || hex.EncodeToString(body) != "0a1653657276696365206e6f7420666f756e643a20466f6f" {
		t.Errorf("unknown method: %d %x", code, body)
	}
	f.refused(f.main, "Foo", "", "Service not found: Foo")
	f.refused(f.main, "UpdateState", "{}", "Service not found: UpdateState")
	f.equal(f.admin, "SetNodeStatus", `{"id":2,"status":"up"}`, "null")
	f.equal(f.admin, "Admin.Admin.SetNodeStatus", `{"id":2,"status":"up"}`, "null")
	f.ok(f.main, "RegisterCvm", `{"client_public_key":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","port_policy":{"ports":[{"port":443,"pp":true},{"port":8080,"pp":false}],"restrict_mode":true}}`)
}

func TestDebugRegister(t *testing.T) {
	f := newFixture(t, nil)
	body := `{"client_public_key":"` + wgKey(1) + `","app_id":"testapp","instance_id":"testinst"}`
	first := f.ok(f.debug, "RegisterCvm", body)
	if !strings.Contains(first, `"client_ip":"10.8.0.2"`) {
		t.Errorf("answer %s", first)
	}
	f.equal(f.debug, "Debug.RegisterCvm", body, first)
	if f.writes.count() != 1 {
		t.Errorf("%d writes", f.writes.count())
	}
	f.refused(f.debug, "RegisterCvm", `{"client_public_key":"`+wgKey(1)+`","app_id":"","instance_id":"i"}`, "[i] app id is empty")
	if code, _ := f.ask(f.debug, "RegisterCvm", `{"client_public_key":"`+wgKey(3)+`","app_id":"a b","instance_id":"i"}`); code != 400 {
		t.Errorf("an id with white space: %d", code)
	}
	f.refused(f.main, "DebugRegisterCvm", body, "Service not found: DebugRegisterCvm")
	f.refused(f.admin, "RegisterCvm", body, "Service not found: RegisterCvm")
	f.equal(f.debug, "GetProxyState", "", `{"instances":[{"instance_id":"testinst","app_id":"testapp","ip":"10.8.0.2","public_key":"`+wgKey(1)+`","reg_time":1700000000}],"allocated_addresses":["10.8.0.2"]}`)
	if _, err := f.store.SetPeerAddr(t.Context(), 2, "https://gw2"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.store.PutNode(t.Context(), store.Node{ID: 2, URL: "https://gw2", WGPublicKey: "k", WGEndpoint: "e", WGIP: "i"}); err != nil {
		t.Fatal(err)
	}
	f.equal(f.debug, "GetSyncData", "", `{"my_node_id":1,"peer_addrs":[{"node_id":2,"url":"https://gw2"}],"nodes":[{"node_id":2,"url":"https://gw2","wg_public_key":"k","wg_endpoint":"e","wg_ip":"i"}],`+
		`"instances":[{"instance_id":"testinst","app_id":"testapp","ip":"10.8.0.2","public_key":"`+wgKey(1)+`"}],"persistent_keys":3,"ephemeral_keys":0}`)
	f.equal(f.debug, "Info", "", `{"base_domain":"","external_port":0,"app_address_ns_prefix":"_dstack-app-address","version":"0.6.0"}`)
}

func TestRegistrationSurvivesTunnelAndStoreTrouble(t *testing.T) {
	f := newFixture(t, nil)
	f.wg.fail = errors.New("netlink is gone")
	f.caller = guest(t, appA, inst1, compose1)
	f.ok(f.main, "RegisterCvm", request(wgKey(1)))
	if !strings.Contains(f.log.String(), "netlink is gone") {
		t.Error("the failed tunnel is not logged")
	}
	for _, tc := range []struct {
		name, log string
		d         store.Durability
		err       error
		again     bool
	}{
		{"journaled", "local journal", store.Journaled, nil, false},
		{"volatile", "in memory only", store.Volatile, errDisk, false},
		{"unknown", "may not be stored", 0, errDisk, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.t = t
			f.clock.advance(time.Second)
			f.writes.hook = func(registry.Instance) (store.Durability, error) { return tc.d, tc.err }
			n := f.writes.count()
			key := wgKey(100 + n)
			f.ok(f.main, "RegisterCvm", request(key))
			if f.writes.count() != n+1 {
				t.Fatalf("%d writes, want 1", f.writes.count()-n)
			}
			if !strings.Contains(f.log.String(), tc.log) {
				t.Errorf("the log does not say %q", tc.log)
			}
			// The same registration again writes only if it is not known what became of the record, until that is known.
			f.writes.hook = nil
			f.ok(f.main, "RegisterCvm", request(key))
			f.ok(f.main, "RegisterCvm", request(key))
			want := n + 1
			if tc.again {
				want++
			}
			if f.writes.count() != want {
				t.Errorf("%d writes after repeating, want %d", f.writes.count()-n, want-n)
			}
			if i, _ := f.store.Instance(inst1); tc.again && i.PublicKey != key {
				t.Errorf("the store has %s", i.PublicKey)
			}
		})
	}
}

// TestAnswerWaitsForTheTunnel: the guest begins its handshake as soon as it has the answer.
func TestAnswerWaitsForTheTunnel(t *testing.T) {
	f := newFixture(t, nil)
	f.wg.hold = make(chan struct{})
	f.caller = guest(t, appA, inst1, compose1)
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		f.ask(f.main, "RegisterCvm", request(wgKey(1)))
	}()
	select {
	case <-answered:
		t.Error("answered before the peer was applied")
	case <-time.After(100 * time.Millisecond):
	}
	close(f.wg.hold)
	<-answered
	if len(f.wg.peers()) != 1 {
		t.Errorf("%d peers", len(f.wg.peers()))
	}
}

// TestSlowStoreDelaysOneInstance: others are answered meanwhile, and the guest that hangs up loses nothing.
func TestSlowStoreDelaysOneInstance(t *testing.T) {
	f := newFixture(t, nil)
	release := make(chan struct{})
	f.writes.hook = func(i registry.Instance) (store.Durability, error) {
		if i.ID == "slow" {
			<-release
		}
		return 0, nil
	}
	call := func(id string, key int) error {
		_, err := f.s.DebugRegisterCvm(t.Context(), &gatewaypb.DebugRegisterCvmRequest{ClientPublicKey: wgKey(key), AppId: "app", InstanceId: id})
		return err
	}
	slow := make(chan error, 1)
	go func() { slow <- call("slow", 1) }()
	for n := range 20 {
		if err := call(fmt.Sprintf("fast%d", n), 10+n); err != nil {
			t.Fatal(err)
		}
	}
	unlock := f.s.LockInstance("fast1")
	defer unlock()
	if !f.s.Changing("slow") || f.s.Changing("fast1") {
		t.Errorf("Changing: slow %v, fast %v", f.s.Changing("slow"), f.s.Changing("fast1"))
	}
	select {
	case <-slow:
		t.Error("answered before the record was written")
	default:
	}
	close(release)
	if err := <-slow; err != nil {
		t.Error(err)
	}
	if f.s.Changing("slow") {
		t.Error("still changing")
	}
}

// TestOrderOfWrites: whatever the order in which concurrent registrations of one instance are decided, the store ends
// with what the registry has.
func TestOrderOfWrites(t *testing.T) {
	f := newFixture(t, nil)
	var wg sync.WaitGroup
	var n int
	var mu sync.Mutex
	f.writes.hook = func(registry.Instance) (store.Durability, error) {
		mu.Lock()
		n++
		d := time.Duration(n%3) * 5 * time.Millisecond
		mu.Unlock()
		time.Sleep(d) // earlier writes take longer than later ones, now and then
		return 0, nil
	}
	for k := range 12 {
		for _, id := range []string{"one", "two"} {
			wg.Go(func() {
				key := 1 + k
				if id == "two" {
					key += 100
				}
				if _, err := f.s.DebugRegisterCvm(t.Context(), &gatewaypb.DebugRegisterCvmRequest{ClientPublicKey: wgKey(key), AppId: "app", InstanceId: id}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Go(func() {
			p := &registry.PortPolicy{Ports: map[uint16]registry.PortFlags{uint16(k + 1): {}}}
			if err := f.s.SetReportedPolicy(t.Context(), "one", "", p); err != nil && !errors.Is(err, registry.ErrNotFound) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, id := range []string{"one", "two"} {
		want, _ := f.reg.Instance(id)
		got, ok := f.store.Instance(id)
		if !ok || !got.Equal(want) {
			t.Errorf("%s: stored %+v, registered %+v", id, got, want)
		}
		last := ""
		for _, p := range f.wg.peers() {
			if p.ID == id {
				last = p.PublicKey.String()
			}
		}
		if last != want.PublicKey {
			t.Errorf("%s: tunnel for %s, registered %s", id, last, want.PublicKey)
		}
	}
	if len(f.s.locks.held) != 0 {
		t.Errorf("%d locks are left", len(f.s.locks.held))
	}
}

func TestOldGatewayWordsNeverReachAGuest(t *testing.T) {
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://no attestation provided/")
		w.WriteHeader(307)
	}))
	defer hook.Close()
	f := newFixture(t, func(d *Deps) { d.Webhook = &Webhook{URL: hook.URL, Timeout: time.Second} })
	f.caller = guest(t, appA, inst1, compose1)
	code, out := f.ask(f.main, "RegisterCvm", request(wgKey(1)))
	if code != 400 || strings.Contains(out, oldGateway) || !strings.Contains(out, "attestation is absent") {
		t.Errorf("%d %s", code, out)
	}
	wrapped := fmt.Errorf("x: %w: no attestation provided", errDisk)
	if err := safeForGuests(wrapped); !errors.Is(err, errDisk) || strings.Contains(err.Error(), oldGateway) {
		t.Errorf("%v", err)
	}
	if err := safeForGuests(errDisk); err != errDisk {
		t.Errorf("%v", err)
	}
}

// BenchmarkUnchangedRegistration is what every CVM does every three minutes. Target: 50 µs and no write.
func BenchmarkUnchangedRegistration(b *testing.B) {
	f := newFixture(b, nil)
	for n := range 10_000 {
		f.reg.Apply(registry.Instance{ID: fmt.Sprintf("%040d", n), AppID: appA, IP: netip.AddrFrom4([4]byte{10, 8, byte(100 + n>>8), byte(n)}), PublicKey: wgKey(1000 + n), RegTime: 1})
	}
	ctx := ratls.WithIdentity(b.Context(), guest(b, appA, inst1, compose1))
	req := &gatewaypb.RegisterCvmRequest{ClientPublicKey: wgKey(1), PortPolicy: &gatewaypb.PortPolicy{Ports: []*gatewaypb.PortAttrs{{Port: 443}, {Port: 8080, Pp: true}}, RestrictMode: true}}
	if _, err := f.s.RegisterCvm(ctx, req); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.s.RegisterCvm(ctx, req); err != nil {
			b.Fatal(err)
		}
	}
	if f.writes.count() != 1 {
		b.Fatalf("%d writes", f.writes.count())
	}
}

// BenchmarkUnchangedOverHTTP adds decoding, encoding and dispatch.
func BenchmarkUnchangedOverHTTP(b *testing.B) {
	f := newFixture(b, nil)
	f.caller = guest(b, appA, inst1, compose1)
	body := `{"client_public_key":"` + wgKey(1) + `","port_policy":{"ports":[{"port":443,"pp":true}],"restrict_mode":true}}`
	f.ok(f.main, "RegisterCvm", body)
	b.ReportAllocs()
	for b.Loop() {
		f.ok(f.main, "RegisterCvm", body)
	}
	if f.writes.count() != 1 {
		b.Fatalf("%d writes", f.writes.count())
	}
}
