package rpc

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

// populate registers three instances of two apps; the first two have handshakes.
func populate(f *fixture) {
	for n, id := range []string{inst1, inst2, "0303030303030303030303030303030303030303"} {
		app := appA
		if n == 2 {
			app = appB
		}
		f.caller = guest(f.t, app, id, compose1)
		f.ok(f.main, "RegisterCvm", request(wgKey(n+1)))
	}
	f.caller = nil
	f.setHandshake(wgKey(1), 1699999990)
	f.setHandshake(wgKey(2), 1699999700)
	f.conns[inst1], f.conns[inst2] = 5, 2
}

const inst3 = "0303030303030303030303030303030303030303"

func TestStatus(t *testing.T) {
	f := newFixture(t, func(d *Deps) { d.Splice, d.KTLS = relay.Gate{AfterBytes: 65536}, KTLSNoULP })
	populate(f)
	if _, err := f.store.PutNode(t.Context(), store.Node{ID: 2, UUID: store.UUID{2}, URL: "https://gw2", WGPublicKey: "key2", WGIP: "10.8.64.1/16", WGEndpoint: "203.0.113.6:51820"}); err != nil {
		t.Fatal(err)
	}
	f.ok(f.admin, "SetNodeStatus", `{"id":2,"status":"down"}`)
	f.ok(f.admin, "AddZtDomain", `{"domain":"app.example.com","port":443}`)
	host := func(id, ip, app string, handshake, conns string) string {
		return `{"instance_id":"` + id + `","ip":"` + ip + `","app_id":"` + app + `","base_domain":"app.example.com","latest_handshake":` + handshake + `,"num_connections":` + conns + `}`
	}
	one := host(inst1, "10.8.0.2", appA, "1699999990", "5")
	f.equal(f.admin, "Status", "", `{"id":1,"url":"https://gw1.example.com:9202","bootnode_url":"https://boot.example.com","num_connections":12,"hosts":[`+
		one+`,`+host(inst2, "10.8.0.3", appA, "1699999700", "2")+`,`+host(inst3, "10.8.0.4", appB, "0", "0")+`],"nodes":[`+
		`{"id":1,"uuid":"000102030405060708090a0b0c0d0e0f","url":"https://gw1.example.com:9202","last_seen":1700000000,"wg_public_key":"`+ownKey+`","wg_ip":"10.8.0.1/16","wg_endpoint":"203.0.113.5:51820"},`+
		`{"id":2,"uuid":"02000000000000000000000000000000","url":"https://gw2","last_seen":0,"wg_public_key":"key2","wg_ip":"10.8.64.1/16","wg_endpoint":"203.0.113.6:51820"}],`+
		`"uuid":"000102030405060708090a0b0c0d0e0f","accel":{"ktls_mode":"disabled (kernel has no TLS ULP)","splice_mode":"after 64 KiB","ktls_offloaded":0,"ktls_offload_failed":0,"splice_engaged":3}}`)
	if f.wg.refreshed != 1 {
		t.Errorf("handshakes read %d times", f.wg.refreshed)
	}
	f.equal(f.admin, "GetInfo", `{"id":"`+inst1+`"}`, `{"found":true,"info":`+one+`}`)
	f.equal(f.admin, "GetInfo", `{"id":"`+appA+`"}`, `{"found":false,"info":null}`)
	f.equal(f.admin, "GetInfo", `{}`, `{"found":false,"info":null}`)
	// Exactly 300 s is not online any more.
	f.equal(f.admin, "GetMeta", "", `{"registered":3,"online":1}`)
	f.clock.advance(-time.Second)
	f.equal(f.admin, "GetMeta", "", `{"registered":3,"online":2}`)
	f.equal(f.admin, "GetInstanceHandshakes", `{"instance_id":"`+inst2+`"}`, `{"handshakes":[{"observer_node_id":1,"timestamp":1699999700}]}`)
	f.equal(f.admin, "GetInstanceHandshakes", `{"instance_id":"`+inst3+`"}`, `{"handshakes":[{"observer_node_id":1,"timestamp":0}]}`)
	f.equal(f.admin, "GetInstanceHandshakes", `{"instance_id":"nobody"}`, `{"handshakes":[]}`)
	f.equal(f.admin, "GetGlobalConnections", "", `{"total_connections":7,"node_connections":{"1":7}}`)
}

// TestStatusWithoutDevice: a device that cannot be read costs freshness, not the answer.
func TestStatusWithoutDevice(t *testing.T) {
	f := newFixture(t, nil)
	f.wg.fail = errors.New("no such device")
	if got := f.ok(f.admin, "Status", ""); !strings.Contains(got, `"hosts":[]`) || !strings.Contains(got, `"accel":{"ktls_mode":"off","splice_mode":"auto"`) {
		t.Error(got)
	}
}

func TestNodeURL(t *testing.T) {
	f := newFixture(t, nil)
	for _, good := range []string{"https://gw2.example.com:9202", "http://10.0.0.1:8000/base", "https://[::1]:1"} {
		f.equal(f.admin, "SetNodeUrl", `{"id":2,"url":"`+good+`"}`, "null")
		if got := f.store.PeerAddrs()[2]; got != good {
			t.Errorf("stored %q, want %q", got, good)
		}
	}
	for _, tc := range []struct{ url, want string }{
		{"", `invalid node url: scheme "" is neither http nor https`},
		{"gw2:9202", `invalid node url: scheme "gw2" is neither http nor https`},
		{"ftp://gw2", `invalid node url: scheme "ftp" is neither http nor https`},
		{"https://", "invalid node url: it has no host"},
		{"https://:9202/x", "invalid node url: it has no host"},
		{"https://user:hunter2@gw2", "invalid node url: it must not contain credentials"},
		{"https://user@gw2", "invalid node url: it must not contain credentials"},
		{"https://gw2:port", `invalid node url: invalid port ":port" after host`},
	} {
		f.refused(f.admin, "SetNodeUrl", `{"id":2,"url":"`+tc.url+`"}`, tc.want)
	}
	if got := f.store.PeerAddrs()[2]; got != "https://[::1]:1" {
		t.Errorf("a refused url was stored: %q", got)
	}
}

func TestNodeStatus(t *testing.T) {
	f := newFixture(t, nil)
	f.equal(f.admin, "GetNodeStatuses", "", `{"statuses":[]}`)
	for _, bad := range []string{"", "UP", "Down", "up ", "gone"} {
		f.refused(f.admin, "SetNodeStatus", `{"id":1,"status":"`+bad+`"}`, "invalid status: expected 'up' or 'down'")
	}
	f.equal(f.admin, "SetNodeStatus", `{"id":10,"status":"up"}`, "null")
	f.equal(f.admin, "SetNodeStatus", `{"id":2,"status":"down"}`, "null")
	f.equal(f.admin, "SetNodeStatus", `{"id":2,"status":"down"}`, "null")
	f.equal(f.admin, "GetNodeStatuses", "", `{"statuses":[{"node_id":2,"status":"down"},{"node_id":10,"status":"up"}]}`)
}

func TestWaveKvStatus(t *testing.T) {
	f := newFixture(t, nil)
	populate(f)
	st := f.store.Status()
	got := f.ok(f.admin, "WaveKvStatus", "")
	for _, want := range []string{`{"enabled":false,"persistent":{"name":"persistent","node_id":1,"n_keys":3,"next_seq":`, `"dirty":false,"wal_enabled":true,"peers":[{"id":1,"local_ack":`,
		`"buffered_logs":0,"last_seen":[{"node_id":1,"timestamp":1700000000}]}]},"ephemeral":{"name":"ephemeral","node_id":1,"n_keys":0,"next_seq":1,"dirty":false,"wal_enabled":false,` +
			`"peers":[{"id":1,"local_ack":0,"peer_ack":0,"buffered_logs":0,"last_seen":[{"node_id":1,"timestamp":1700000000}]}]}}`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s lacks %s (store %+v)", got, want, st)
		}
	}
}

func TestExit(t *testing.T) {
	f := newFixture(t, nil)
	f.equal(f.admin, "Exit", `{}`, "null")
	f.equal(f.admin, "Exit", "", "null")
	f.equal(f.admin, "Exit", `{"force":true}`, "null")
	if len(f.exits) != 3 || f.exits[0] || f.exits[1] || !f.exits[2] {
		t.Errorf("exits %v", f.exits)
	}
}

func TestPortPolicyOverrides(t *testing.T) {
	f := newFixture(t, nil)
	populate(f)
	n := f.writes.count()
	f.refused(f.admin, "SetInstancePortPolicy", `{"instance_id":"`+inst1+`"}`, "port policy is required")
	f.refused(f.admin, "SetInstancePortPolicy", `{"instance_id":"`+inst1+`","policy":null}`, "port policy is required")
	f.refused(f.admin, "SetInstancePortPolicy", `{"instance_id":"`+inst1+`","policy":{"ports":[{"port":65536}]}}`, "port 65536 out of u16 range")
	f.refused(f.admin, "SetInstancePortPolicy", `{"instance_id":"zz","policy":{}}`, "instance zz not found")
	f.refused(f.admin, "ClearInstancePortPolicy", `{"instance_id":"zz"}`, "instance zz not found")
	f.refused(f.admin, "GetInstancePortPolicy", `{"instance_id":"zz"}`, "instance zz not found")
	if f.writes.count() != n {
		t.Error("refused changes were written")
	}
	f.equal(f.admin, "ClearInstancePortPolicy", `{"instance_id":"`+inst1+`"}`, "null")
	if f.writes.count() != n {
		t.Error("nothing was cleared, yet it was written")
	}
	set := `{"instance_id":"` + inst1 + `","policy":{"ports":[{"port":443},{"port":0},{"port":22,"pp":true}],"restrict_mode":true}}`
	f.equal(f.admin, "SetInstancePortPolicy", set, "null")
	f.equal(f.admin, "SetInstancePortPolicy", set, "null")
	policy := `{"ports":[{"port":0,"pp":false},{"port":22,"pp":true},{"port":443,"pp":false}],"restrict_mode":true}`
	f.equal(f.admin, "GetInstancePortPolicy", `{"instance_id":"`+inst1+`"}`, `{"effective":`+policy+`,"source":"admin","instance_reported":null,"admin_override":`+policy+`}`)
	if i, _ := f.store.Instance(inst1); i.AdminPolicy == nil || len(i.AdminPolicy.Ports) != 3 || f.writes.count() != n+1 {
		t.Errorf("stored %+v with %d writes", i, f.writes.count()-n)
	}
	f.equal(f.admin, "ClearInstancePortPolicy", `{"instance_id":"`+inst1+`"}`, "null")
	f.equal(f.admin, "GetInstancePortPolicy", `{"instance_id":"`+inst1+`"}`, `{"effective":null,"source":"none","instance_reported":null,"admin_override":null}`)
	if i, _ := f.store.Instance(inst1); i.AdminPolicy != nil {
		t.Error("the override is still stored")
	}
}
