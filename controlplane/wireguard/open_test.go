package wireguard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
)

// Which implementation is chosen, and what the operator is told.
func TestOpenChoosesTheMode(t *testing.T) {
	inUse := fmt.Errorf("set up: %w", unix.EADDRINUSE)
	for _, tc := range []struct {
		name    string
		ask     Mode
		links   *fakeLinks
		control error // of the adopted or created device
		user    error
		want    Mode
		reason  string // part of Status.Reason, or of the error if want is empty
	}{
		{name: "kernel by itself", ask: Auto, want: Kernel, reason: "created"},
		{name: "default is auto", ask: "", want: Kernel, reason: "created"},
		{name: "no module", ask: Auto, links: &fakeLinks{addErr: unix.EOPNOTSUPP}, want: Userspace, reason: "no WireGuard"},
		{name: "no module, kernel asked for", ask: Kernel, links: &fakeLinks{addErr: unix.EOPNOTSUPP}, reason: "no WireGuard"},
		{name: "userspace asked for", ask: Userspace, want: Userspace, reason: "asked for"},
		{name: "nothing works", ask: Auto, links: &fakeLinks{addErr: unix.EPERM}, user: os.ErrPermission, reason: "CAP_NET_ADMIN"},
		{name: "adopted kernel", ask: Auto, links: &fakeLinks{link: &linkInfo{kind: "wireguard", up: true}}, want: Kernel, reason: "existed"},
		{name: "adopted although userspace was asked for", ask: Userspace, links: &fakeLinks{link: &linkInfo{kind: "wireguard"}}, want: Kernel, reason: "existed"},
		{name: "adopted foreign userspace", ask: Auto, links: &fakeLinks{link: &linkInfo{kind: "tuntap"}}, want: External, reason: "another process"},
		{name: "adopted dummy", ask: Kernel, links: &fakeLinks{link: &linkInfo{kind: "dummy"}}, control: ErrNotWireGuard, want: Unmanaged, reason: `"dummy"`},
		{name: "adopted without right", ask: Kernel, links: &fakeLinks{link: &linkInfo{kind: "wireguard"}}, control: unix.EPERM, want: Unmanaged, reason: "not permitted"},
		{name: "port taken", ask: Auto, links: &fakeLinks{upErr: inUse}, reason: "UDP port 51820 is taken"},
		{name: "none", ask: None, links: &fakeLinks{addErr: errors.New("must not be called")}, want: None, reason: "switched off"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dev := newFakeDevice()
			dev.fail = tc.control
			opt := testOptions()
			opt.Mode = tc.ask
			if tc.links == nil {
				tc.links = &fakeLinks{}
			}
			sys := fakeSystem(dev, tc.links)
			sys.user = func(*Device) (backend, error) { return newMemory(), tc.user }
			d, err := open(context.Background(), opt, sys)
			if tc.want == "" {
				if err == nil {
					d.Close()
					t.Fatal("opened")
				}
				if !strings.Contains(err.Error(), tc.reason) {
					t.Errorf("error %q does not say %q", err, tc.reason)
				}
				if tc.links.link != nil {
					t.Error("a half-made interface was left behind")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			st := d.Status()
			if st.Mode != tc.want || !strings.Contains(st.Reason, tc.reason) {
				t.Errorf("got %s because %q, want %s because %q", st.Mode, st.Reason, tc.want, tc.reason)
			}
			if st.Mode == Kernel && !st.Adopted {
				if !tc.links.link.up || tc.links.lastAddr != opt.Address {
					t.Error("a created interface has no address or is down")
				}
				if dev.own.privateKey != testPrivate || dev.own.listenPort != 51820 {
					t.Error("a created interface has no key or port")
				}
			}
			if st.Adopted && len(dev.applies) != 0 {
				t.Error("an adopted interface was changed by Open")
			}
		})
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for _, tc := range []struct {
		edit func(*Options)
		want string
	}{
		{func(o *Options) { o.Interface = "" }, "core.wg.interface"},
		{func(o *Options) { o.Interface = "a-name-of-16-byt" }, "core.wg.interface"},
		{func(o *Options) { o.Interface = "a/b" }, "core.wg.interface"},
		{func(o *Options) { o.ListenPort = 70000 }, "core.wg.listen_port"},
		{func(o *Options) { o.Address = netip.Prefix{} }, "core.wg.ip"},
		{func(o *Options) { o.Mode = "fast" }, "fast"},
		{func(o *Options) { o.Mode = Unmanaged }, "unmanaged"},
	} {
		opt := testOptions()
		tc.edit(&opt)
		_, err := open(context.Background(), opt, fakeSystem(newFakeDevice(), &fakeLinks{}))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got %v, want %q", err, tc.want)
		}
	}
}

// Mode None is a complete device without a network.
func TestModeNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opt := testOptions()
		opt.Mode, opt.Address = None, netip.Prefix{}
		d, err := Open(t.Context(), opt)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := d.Sync(t.Context(), testPeers(1, 4)); err != nil {
			t.Fatal(err)
		}
		d.Remove(testKey(1))
		if err := d.Apply(t.Context(), testPeer(9)); err != nil {
			t.Fatal(err)
		}
		if err := d.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if st := d.Status(); st.Mode != None || st.Peers != 3 || st.Applied != 3 || !st.InSync {
			t.Errorf("status %+v", st)
		}
		if _, ok := d.Handshakes().Age(testKey(9), d.Handshakes().Taken); ok {
			t.Error("a handshake without a network")
		}
	})
}
