package proxyproto_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/dataplane/proxyproto"
)

var (
	ap  = netip.MustParseAddrPort
	sig = "0d0a0d0a000d0a515549540a"
	v1s = func(s string) string { return hex.EncodeToString([]byte(s)) }
)

// vectors are headers that are written and read the same way. The first three are
// those of gateway spec B.5.
var vectors = []struct {
	name   string
	header proxyproto.Header
	hex    string
}{
	{"v2 TCP4", proxyproto.Header{Version: 2, Family: proxyproto.TCP4, Src: ap("9.8.7.6:1234"), Dst: ap("1.2.3.4:443")},
		"0d0a0d0a000d0a515549540a2111000c090807060102030404d201bb"},
	{"v2 TCP6", proxyproto.Header{Version: 2, Family: proxyproto.TCP6, Src: ap("[2001:db8::1]:1234"), Dst: ap("[2001:db8::2]:443")},
		"0d0a0d0a000d0a515549540a2121002420010db800000000000000000000000120010db800000000000000000000000204d201bb"},
	{"v2 LOCAL", proxyproto.Header{Version: 2, Local: true},
		"0d0a0d0a000d0a515549540a20000000"},
	{"v2 unspec", proxyproto.Header{Version: 2}, sig + "21000000"},
	{"v2 LOCAL with addresses", proxyproto.Header{Version: 2, Local: true, Family: proxyproto.TCP4, Src: ap("9.8.7.6:1234"), Dst: ap("1.2.3.4:443")},
		sig + "2011000c090807060102030404d201bb"},
	{"v2 UDP4", proxyproto.Header{Version: 2, Family: proxyproto.UDP4, Src: ap("9.8.7.6:1"), Dst: ap("1.2.3.4:65535")},
		sig + "2112000c09080706010203040001ffff"},
	{"v2 UDP6", proxyproto.Header{Version: 2, Family: proxyproto.UDP6, Src: ap("[::1]:1"), Dst: ap("[::2]:2")},
		sig + "21220024" + strings.Repeat("00", 15) + "01" + strings.Repeat("00", 15) + "0200010002"},
	{"v1 TCP4", proxyproto.Header{Version: 1, Family: proxyproto.TCP4, Src: ap("9.8.7.6:1234"), Dst: ap("1.2.3.4:443")},
		v1s("PROXY TCP4 9.8.7.6 1.2.3.4 1234 443\r\n")},
	{"v1 TCP6", proxyproto.Header{Version: 1, Family: proxyproto.TCP6, Src: ap("[2001:db8::1]:1234"), Dst: ap("[::ffff:1.2.3.4]:0")},
		v1s("PROXY TCP6 2001:db8::1 ::ffff:1.2.3.4 1234 0\r\n")},
	{"v1 unknown", proxyproto.Header{Version: 1}, v1s("PROXY UNKNOWN\r\n")},
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.name, func(t *testing.T) {
			wire := unhex(t, v.hex)
			if got := v.header.Append([]byte("x")); !bytes.Equal(got, append([]byte("x"), wire...)) {
				t.Errorf("Append wrote %x, want %x", got[1:], wire)
			}
			accept(t, wire, v.header)
		})
	}
}

// TestAccepted holds headers that are read but written in another way.
func TestAccepted(t *testing.T) {
	tcp4 := proxyproto.Header{Version: 2, Family: proxyproto.TCP4, Src: ap("9.8.7.6:1234"), Dst: ap("1.2.3.4:443")}
	for _, v := range []struct {
		name   string
		header proxyproto.Header
		hex    string
		again  string // what Append writes
	}{
		{"vectors are dropped", tcp4, sig + "21110011" + "090807060102030404d201bb" + "0400020001", vectors[0].hex},
		{"as long as can be", tcp4, sig + "211107f0" + "090807060102030404d201bb" + strings.Repeat("aa", 2048-28), vectors[0].hex},
		{"unspec with vectors", proxyproto.Header{Version: 2}, sig + "210000050400020001", sig + "21000000"},
		{"inet of unspecified protocol", proxyproto.Header{Version: 2}, sig + "2110000c090807060102030404d201bb", sig + "21000000"},
		{"unix", proxyproto.Header{Version: 2}, sig + "213100d8" + strings.Repeat("2f", 216), sig + "21000000"},
		{"LOCAL ignores the family", proxyproto.Header{Version: 2, Local: true}, sig + "20ff0003aabbcc", sig + "20000000"},
		{"LOCAL ignores short addresses", proxyproto.Header{Version: 2, Local: true}, sig + "20110003aabbcc", sig + "20000000"},
		{"v1 unknown with addresses", proxyproto.Header{Version: 1},
			v1s("PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n"), v1s("PROXY UNKNOWN\r\n")},
		{"v1 as long as can be", proxyproto.Header{Version: 1},
			v1s("PROXY UNKNOWN " + strings.Repeat("a", 91) + "\r\n"), v1s("PROXY UNKNOWN\r\n")},
		{"v1 address in long form", proxyproto.Header{Version: 1, Family: proxyproto.TCP6, Src: ap("[2001:db8::1]:80"), Dst: ap("[::1]:443")},
			v1s("PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:0001 0:0:0:0:0:0:0:1 80 443\r\n"),
			v1s("PROXY TCP6 2001:db8::1 ::1 80 443\r\n")},
	} {
		t.Run(v.name, func(t *testing.T) {
			accept(t, unhex(t, v.hex), v.header)
			if got := v.header.Append(nil); hex.EncodeToString(got) != v.again {
				t.Errorf("Append wrote %x, want %s", got, v.again)
			}
		})
	}
}

// accept checks that wire is read as want, that it needs all its bytes and no
// more, and that it is never refused on the way.
func accept(t *testing.T, wire []byte, want proxyproto.Header) {
	t.Helper()
	for i := range wire {
		if h, n, err := proxyproto.Parse(wire[:i]); err != proxyproto.ErrIncomplete || n != 0 || h != (proxyproto.Header{}) {
			t.Fatalf("after %d of %d bytes: %+v, %d, %v; want ErrIncomplete", i, len(wire), h, n, err)
		}
	}
	for _, tail := range []string{"", "\x16\x03\x01", strings.Repeat("\r\n", 2000)} {
		got, n, err := proxyproto.Parse(append(bytes.Clone(wire), tail...))
		if err != nil || n != len(wire) || got != want {
			t.Fatalf("with %d bytes behind it: %+v, %d, %v; want %+v, %d", len(tail), got, n, err, want, len(wire))
		}
	}
}

// TestRefused checks what is refused and after how many bytes.
func TestRefused(t *testing.T) {
	for _, v := range []struct {
		name string
		hex  string
		at   int // bytes that suffice
		err  error
		text string
	}{
		{"TLS", "1603010200", 1, proxyproto.ErrNotProxy, "no valid proxy protocol header detected"},
		{"HTTP", v1s("GET / HTTP/1.1\r\n"), 1, proxyproto.ErrNotProxy, "no valid proxy protocol header detected"},
		{"HTTP POST", v1s("POST / HTTP/1.1\r\n"), 2, proxyproto.ErrNotProxy, "no valid proxy protocol header detected"},
		{"lower case", v1s("proxy TCP4"), 1, proxyproto.ErrNotProxy, ""},
		{"blank lines", "0d0a0d0a0d0a", 5, proxyproto.ErrNotProxy, "no valid proxy protocol header detected"},
		{"signature ends wrong", "0d0a0d0a000d0a515549540b", 12, proxyproto.ErrNotProxy, ""},
		{"v2 version 1", sig + "11", 13, proxyproto.ErrNotProxy, ""},
		{"v2 command 2", sig + "22", 13, proxyproto.ErrNotProxy, ""},
		{"v2 family 4", sig + "2141", 14, proxyproto.ErrNotProxy, ""},
		{"v2 protocol 3", sig + "2113", 14, proxyproto.ErrNotProxy, ""},
		{"v2 short TCP4", sig + "2111000b", 16, proxyproto.ErrNotProxy, "no valid proxy protocol header detected: v2 header with 11 bytes of addresses, its family needs 12"},
		{"v2 short TCP6", sig + "21210023", 16, proxyproto.ErrNotProxy, ""},
		{"v2 short unix", sig + "213100d7", 16, proxyproto.ErrNotProxy, ""},
		{"v2 too long", sig + "211107f1", 16, proxyproto.ErrTooLong, "v2 proxy protocol header is too long"},
		{"v2 LOCAL too long", sig + "2000ffff", 16, proxyproto.ErrTooLong, ""},
		{"v1 no space", v1s("PROXYTCP4"), 6, proxyproto.ErrNotProxy, "no valid proxy protocol header detected"},
		{"v1 family", v1s("PROXY UDP4 "), 8, proxyproto.ErrNotProxy, ""},
		{"v1 TCP5", v1s("PROXY TCP5 "), 10, proxyproto.ErrNotProxy, ""},
		{"v1 no family", v1s("PROXY \r\n"), 7, proxyproto.ErrNotProxy, ""},
		{"v1 cut family", v1s("PROXY UNKNOW\r\n"), 13, proxyproto.ErrNotProxy, ""},
		{"v1 only word", v1s("PROXY\r\n"), 6, proxyproto.ErrNotProxy, ""},
		{"v1 no addresses", v1s("PROXY TCP4 \r\n"), 13, proxyproto.ErrNotProxy, ""},
		{"v1 no line end", v1s("PROXY UNKNOWN " + strings.Repeat("a", 93)), 107, proxyproto.ErrNotProxy, ""},
		{"v1 line end one late", v1s("PROXY UNKNOWN " + strings.Repeat("a", 92) + "\r\n"), 107, proxyproto.ErrNotProxy, ""},
		{"v1 bare LF", v1s("PROXY TCP4 9.8.7.6 1.2.3.4 1 2\n" + strings.Repeat(" ", 76)), 107, proxyproto.ErrNotProxy, ""},
		{"v1 IPv6 in TCP4", v1s("PROXY TCP4 ::1 ::2 1 2\r\n"), 24, proxyproto.ErrNotProxy, ""},
		{"v1 IPv4 in TCP6", v1s("PROXY TCP6 1.2.3.4 ::2 1 2\r\n"), 28, proxyproto.ErrNotProxy, ""},
		{"v1 zone", v1s("PROXY TCP6 fe80::1%a ::2 1 2\r\n"), 30, proxyproto.ErrNotProxy, ""},
		{"v1 port range", v1s("PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n"), 36, proxyproto.ErrNotProxy, ""},
		{"v1 port sign", v1s("PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n"), 33, proxyproto.ErrNotProxy, ""},
		{"v1 missing port", v1s("PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n"), 30, proxyproto.ErrNotProxy, ""},
		{"v1 surplus", v1s("PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n"), 34, proxyproto.ErrNotProxy, ""},
		{"v1 two spaces", v1s("PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n"), 33, proxyproto.ErrNotProxy, ""},
	} {
		t.Run(v.name, func(t *testing.T) {
			wire := unhex(t, v.hex)
			for i := range v.at {
				if _, _, err := proxyproto.Parse(wire[:i]); err != proxyproto.ErrIncomplete {
					t.Fatalf("after %d bytes: %v, want ErrIncomplete", i, err)
				}
			}
			for i := v.at; i <= len(wire); i++ {
				h, n, err := proxyproto.Parse(wire[:i])
				if !errors.Is(err, v.err) || n != 0 || h != (proxyproto.Header{}) {
					t.Fatalf("after %d bytes: %+v, %d, %v; want %v", i, h, n, err, v.err)
				}
				if v.text != "" && err.Error() != v.text {
					t.Fatalf("text %q, want %q", err, v.text)
				}
			}
		})
	}
}

func TestNew(t *testing.T) {
	none := proxyproto.Header{Version: 2}
	for _, tt := range []struct {
		name     string
		src, dst netip.AddrPort
		want     proxyproto.Header
	}{
		{"IPv4", ap("9.8.7.6:1234"), ap("1.2.3.4:443"), vectors[0].header},
		{"mapped", ap("[::ffff:9.8.7.6]:1234"), ap("[::ffff:1.2.3.4]:443"), vectors[0].header},
		{"IPv6", ap("[2001:db8::1]:1234"), ap("[2001:db8::2]:443"), vectors[1].header},
		{"mixed", ap("9.8.7.6:1"), ap("[::1]:2"),
			proxyproto.Header{Version: 2, Family: proxyproto.TCP6, Src: ap("[::ffff:9.8.7.6]:1"), Dst: ap("[::1]:2")}},
		{"zone", ap("[fe80::1%eth0]:1"), ap("[fe80::2%eth0]:2"),
			proxyproto.Header{Version: 2, Family: proxyproto.TCP6, Src: ap("[fe80::1]:1"), Dst: ap("[fe80::2]:2")}},
		{"no source", netip.AddrPort{}, ap("1.2.3.4:443"), none},
		{"no destination", ap("1.2.3.4:443"), netip.AddrPort{}, none},
	} {
		got := proxyproto.New(tt.src, tt.dst)
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
		if read, _, err := proxyproto.Parse(got.Append(nil)); err != nil || read != got {
			t.Errorf("%s: read back as %+v, %v", tt.name, read, err)
		}
	}
}

// TestFromAddrs uses sockets, whose addresses come in 16-byte form for IPv4.
func TestFromAddrs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	h := proxyproto.FromAddrs(s.RemoteAddr(), s.LocalAddr())
	if h.Family != proxyproto.TCP4 || h.Src.String() != c.LocalAddr().String() || h.Dst.String() != l.Addr().String() || len(h.Append(nil)) != 28 {
		t.Errorf("header of %v to %v: %+v", c.LocalAddr(), l.Addr(), h)
	}
	for _, a := range []net.Addr{nil, (*net.TCPAddr)(nil), &net.UnixAddr{Name: "x"}} {
		if got := proxyproto.FromAddrs(a, s.LocalAddr()); got != (proxyproto.Header{Version: 2}) {
			t.Errorf("header from %v: %+v", a, got)
		}
	}
}

// TestAppendMismatch covers headers that only a caller can build.
func TestAppendMismatch(t *testing.T) {
	v4, v6 := ap("1.2.3.4:5"), ap("[::1]:6")
	for _, tt := range []struct {
		name   string
		header proxyproto.Header
		hex    string
	}{
		{"zero", proxyproto.Header{}, sig + "21000000"},
		{"TCP4 of IPv6", proxyproto.Header{Version: 2, Family: proxyproto.TCP4, Src: v6, Dst: v4}, sig + "21000000"},
		{"TCP6 of IPv4", proxyproto.Header{Version: 2, Family: proxyproto.TCP6, Src: v6, Dst: v4}, sig + "21000000"},
		{"TCP4 of nothing", proxyproto.Header{Version: 2, Family: proxyproto.TCP4}, sig + "21000000"},
		{"unknown family", proxyproto.Header{Version: 2, Family: 99, Src: v4, Dst: v4}, sig + "21000000"},
		{"v1 UDP4", proxyproto.Header{Version: 1, Family: proxyproto.UDP4, Src: v4, Dst: v4}, v1s("PROXY UNKNOWN\r\n")},
		{"v1 TCP4 of IPv6", proxyproto.Header{Version: 1, Family: proxyproto.TCP4, Src: v6, Dst: v6}, v1s("PROXY UNKNOWN\r\n")},
	} {
		if got := hex.EncodeToString(tt.header.Append(nil)); got != tt.hex {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.hex)
		}
	}
}

func TestFamilyString(t *testing.T) {
	for f, want := range map[proxyproto.Family]string{
		proxyproto.Unspec: "UNKNOWN", proxyproto.TCP4: "TCP4", proxyproto.TCP6: "TCP6",
		proxyproto.UDP4: "UDP4", proxyproto.UDP6: "UDP6", proxyproto.Family(9): "family(9)",
	} {
		if got := f.String(); got != want {
			t.Errorf("Family(%d).String() = %q, want %q", uint8(f), got, want)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	wire := unhex(t, vectors[1].hex)
	buf := make([]byte, 0, 128)
	n := testing.AllocsPerRun(100, func() {
		h, _, err := proxyproto.Parse(wire)
		if err != nil {
			t.Fatal(err)
		}
		buf = h.Append(buf[:0])
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkParse(b *testing.B) {
	for _, i := range []int{0, 7} {
		wire, err := hex.DecodeString(vectors[i].hex)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(vectors[i].name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := proxyproto.Parse(wire); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// FuzzParse checks that the verdict does not depend on how the bytes arrive and
// that an accepted header survives being written and read again.
func FuzzParse(f *testing.F) {
	for _, v := range vectors {
		wire, err := hex.DecodeString(v.hex)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Add([]byte("PROXY UNKNOWN a b c d\r\n"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x11\x09\x08\x07\x06\x01\x02\x03\x04\x04\xd2\x01\xbb\x04\x00\x02\x00\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		want, wantN, wantErr := proxyproto.Parse(b)
		for i := range b {
			h, n, err := proxyproto.Parse(b[:i])
			if err == proxyproto.ErrIncomplete {
				continue
			}
			if h != want || n != wantN || (err == nil) != (wantErr == nil) {
				t.Fatalf("after %d bytes %+v, %d, %v; after all %d %+v, %d, %v", i, h, n, err, len(b), want, wantN, wantErr)
			}
			break
		}
		switch {
		case wantErr == nil:
			wire := want.Append(nil)
			again, n, err := proxyproto.Parse(wire)
			if err != nil || again != want || n != len(wire) {
				t.Fatalf("%+v was written and read as %+v, %v", want, again, err)
			}
		case wantErr == proxyproto.ErrIncomplete:
			if len(b) >= proxyproto.MaxSize {
				t.Fatalf("still incomplete after %d bytes", len(b))
			}
		case !errors.Is(wantErr, proxyproto.ErrNotProxy) && !errors.Is(wantErr, proxyproto.ErrTooLong):
			t.Fatalf("unknown error %v", wantErr)
		}
	})
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
