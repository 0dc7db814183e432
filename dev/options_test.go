package dev

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestDefaultsAreGood(t *testing.T) {
	o := Defaults()
	if err := o.Check(); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		for _, name := range []string{o.bridge(), o.tunnel(), o.veth(i)} {
			if len(name) > 15 {
				t.Errorf("interface name %s is longer than 15 bytes", name)
			}
		}
		if a := o.guestUplink(i); !o.Uplink.Contains(a) || a == o.hostUplink() {
			t.Errorf("CVM %d gets the address %v", i, a)
		}
	}
}

func TestOptionsCheck(t *testing.T) {
	for _, tt := range []struct {
		want   string
		change func(*Options)
	}{
		{"state directory", func(o *Options) { o.StateDir = "here" }},
		{"state directory", func(o *Options) { o.StateDir = "/" }},
		{"name", func(o *Options) { o.Name = "" }},
		{"name", func(o *Options) { o.Name = "Dev" }},
		{"name", func(o *Options) { o.Name = strings.Repeat("a", 12) }},
		{"name", func(o *Options) { o.Name = "../x" }},
		{"base domain", func(o *Options) { o.BaseDomain = "localhost" }},
		{"base domain", func(o *Options) { o.BaseDomain = "apps.Example.test" }},
		{"base domain", func(o *Options) { o.BaseDomain = `a"b.test` }},
		{"custom domain", func(o *Options) { o.CustomDomain = "-a.test" }},
		{"directly under the base domain", func(o *Options) { o.CustomDomain = "www." + o.BaseDomain }},
		{"uplink network", func(o *Options) { o.Uplink = netip.MustParsePrefix("10.213.0.1/24") }},
		{"uplink network", func(o *Options) { o.Uplink = netip.MustParsePrefix("10.213.0.0/29") }},
		{"overlay network", func(o *Options) { o.Overlay = netip.MustParsePrefix("fd00::/64") }},
		{"overlap", func(o *Options) { o.Overlay = netip.MustParsePrefix("10.0.0.0/8") }},
		{"proxy address", func(o *Options) { o.Proxy = netip.MustParseAddrPort("[::1]:8443") }},
		{"proxy address", func(o *Options) { o.Proxy = netip.MustParseAddrPort("127.0.0.1:0") }},
		{"loopback", func(o *Options) { o.Admin = netip.MustParseAddrPort("0.0.0.0:8011") }},
		{"loopback", func(o *Options) { o.DNS = netip.MustParseAddrPort("192.0.2.1:53") }},
		{"must not be 0", func(o *Options) { o.RPCPort = 0 }},
		{"none of auto", func(o *Options) { o.WireGuard = "none" }},
		{"refresh", func(o *Options) { o.Refresh = time.Millisecond }},
	} {
		o := Defaults()
		tt.change(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want an error with %q", err, tt.want)
		}
	}
}

// Ids do not depend on the machine: the README shows them.
func TestPlanIsTheSameEverywhere(t *testing.T) {
	apps, err := plan()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, a := range apps {
		got = append(got, a.name+" "+a.id)
		for _, i := range a.instances {
			got = append(got, i.name+" "+i.id)
		}
	}
	want := []string{
		"web b8a436f1759c813f99b2a08cd56150d7f68eb5fd",
		"web-1 cb577ba7115b4793ccf3a53e50c203c1ea021e8e",
		"web-2 d54bca4461c557eb52d9f562fba84924cfc29681",
		"api b9177e9cb1e0387b095807d530e26d3ae369b691",
		"api-1 d76517b891cc426758efd2e0c7121d3dc42219ee",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if apps[0].instances[1].index != 1 || apps[1].instances[0].index != 2 {
		t.Error("two CVMs share a place in the network")
	}
}
