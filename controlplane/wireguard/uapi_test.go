package wireguard

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestEncodeUAPI(t *testing.T) {
	key1, key2, key3 := testKey(1), testKey(2), testKey(3)
	port := 51820
	hex := func(first string) string { return first + "0000" + strings.Repeat("00", 28) + "01" }
	got := string(encodeUAPI(change{
		privateKey: &testPrivate,
		listenPort: &port,
		peers: []peerChange{
			{key: key1, remove: true},
			{key: key2, ip: netip.MustParseAddr("10.0.0.2")},
			{key: key3, ip: netip.MustParseAddr("10.0.0.3"), endpoint: netip.MustParseAddrPort("[2001:db8::1]:9182"), keepalive: true},
		},
	}))
	want := "private_key=4007" + strings.Repeat("00", 29) + "41\nlisten_port=51820\n" +
		"public_key=" + hex("01") + "\nremove=true\n" +
		"public_key=" + hex("02") + "\nreplace_allowed_ips=true\nallowed_ip=10.0.0.2/32\n" +
		"public_key=" + hex("03") + "\nreplace_allowed_ips=true\nallowed_ip=10.0.0.3/32\nendpoint=[2001:db8::1]:9182\npersistent_keepalive_interval=25\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if b := encodeUAPI(change{}); len(b) != 0 {
		t.Errorf("an empty change is %q", b)
	}
}

const uapiAnswer = "private_key=4007000000000000000000000000000000000000000000000000000000000041\n" +
	"listen_port=51820\nfwmark=7\n" +
	"public_key=0100000000000000000000000000000000000000000000000000000000000001\n" +
	"preshared_key=0000000000000000000000000000000000000000000000000000000000000000\n" +
	"protocol_version=1\nendpoint=192.0.2.1:9182\nlast_handshake_time_sec=1700000000\nlast_handshake_time_nsec=5\n" +
	"tx_bytes=20\nrx_bytes=10\npersistent_keepalive_interval=25\nallowed_ip=10.0.0.2/32\nallowed_ip=10.0.0.9/32\n" +
	"public_key=0200000000000000000000000000000000000000000000000000000000000001\n" +
	"last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\npersistent_keepalive_interval=0\n"

func TestParseUAPI(t *testing.T) {
	got, err := parseUAPI([]byte(uapiAnswer))
	if err != nil {
		t.Fatal(err)
	}
	want := &devState{privateKey: testPrivate, listenPort: 51820, peers: []devPeer{
		{key: testKey(1), endpoint: netip.MustParseAddrPort("192.0.2.1:9182"), handshake: time.Unix(1700000000, 5),
			rx: 10, tx: 20, keepalive: keepalive, allowed: netip.MustParsePrefix("10.0.0.2/32"), nAllowed: 2},
		{key: testKey(2)},
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	if got, err := parseUAPI(nil); err != nil || len(got.peers) != 0 {
		t.Errorf("an empty answer gives %+v, %v", got, err)
	}
	for _, bad := range []string{
		"garbage\n",
		"private_key=zz\n",
		"listen_port=x\n",
		"public_key=01\n",
		strings.Replace(uapiAnswer, "rx_bytes=10", "rx_bytes=-1", 1),
		strings.Replace(uapiAnswer, "endpoint=192.0.2.1:9182", "endpoint=nowhere", 1),
	} {
		if _, err := parseUAPI([]byte(bad)); err == nil {
			t.Errorf("accepted %q", bad[:min(40, len(bad))])
		} else if strings.Contains(err.Error(), "zz") {
			t.Errorf("the error shows a private key: %v", err)
		}
	}
}

func FuzzParseUAPI(f *testing.F) {
	f.Add([]byte(uapiAnswer))
	f.Add([]byte("public_key="))
	f.Fuzz(func(t *testing.T, text []byte) {
		st, err := parseUAPI(text)
		if (st == nil) == (err == nil) {
			t.Fatal("neither or both of result and error")
		}
	})
}
