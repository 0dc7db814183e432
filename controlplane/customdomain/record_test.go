package customdomain

import (
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestCanonical(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	name253 := strings.Repeat(label63+".", 3) + strings.Repeat("b", 61)
	for _, tt := range []struct {
		in, want string
		ok       bool
	}{
		{"www.shop.example", "www.shop.example", true},
		{"WWW.Shop.Example", "www.shop.example", true},
		{"www.shop.example.", "www.shop.example", true},
		{"localhost", "localhost", true},
		{"_x.a-b.-c-.example", "_x.a-b.-c-.example", true},
		{"1.2.3.4a", "1.2.3.4a", true},
		{"xn--bcher-kva.example", "xn--bcher-kva.example", true},
		{label63 + ".x", label63 + ".x", true},
		{name253, name253, true},
		{name253 + ".", name253, true},

		{"", "", false},
		{".", "", false},
		{"a..b", "", false},
		{".a", "", false},
		{"a.b..", "", false},
		{"192.0.2.1", "", false},
		{"[::1]", "", false},
		{"::1", "", false},
		{"a.123", "", false},
		{"*.example", "", false},
		{"a b.example", "", false},
		{"a\\.b.example", "", false},
		{"a\x00.example", "", false},
		{"bücher.example", "", false},
		{label63 + "a.x", "", false},
		{name253 + "b", "", false},
	} {
		if got, ok := canonical(tt.in); got != tt.want || ok != tt.ok {
			t.Errorf("canonical(%q) = %q, %v; want %q, %v", tt.in, got, ok, tt.want, tt.ok)
		}
	}
}

// values is the grammar "<id>:<port>" of gateway spec 4.5.
var values = []struct {
	in   string
	want Answer
	text string // part of the error, "" for none
}{
	{in: id + ":443", want: Answer{id, 443}},
	{in: "app:1", want: Answer{"app", 1}},
	{in: "app:65535", want: Answer{"app", 65535}},
	{in: "app:0443", want: Answer{"app", 443}},
	{in: "app:+443", want: Answer{"app", 443}},
	{in: "gateway:80", want: Answer{"gateway", 80}},
	{in: "localhost:8080", want: Answer{"localhost", 8080}},
	{in: "App-1.x y:80", want: Answer{"App-1.x y", 80}},
	{in: "bücher:80", want: Answer{"bücher", 80}},
	{in: "", text: "no colon"},
	{in: id, text: "no colon"},
	{in: "v=spf1 -all", text: "no colon"},
	{in: ":80", text: "id is empty"},
	{in: ":", text: "id is empty"},
	{in: "app:", text: "port"},
	{in: "app:0", text: "port"},
	{in: "app:65536", text: "port"},
	{in: "app:-1", text: "port"},
	{in: "app:++1", text: "port"},
	{in: "app:80 ", text: "port"},
	{in: "app: 80", text: "port"},
	{in: "app:80:81", text: "port"},
	{in: "app:http", text: "port"},
	{in: "app:0x50", text: "port"},
	{in: "app:8_0", text: "port"},
	{in: "app\xff:80", text: "UTF-8"},
}

func TestParseValue(t *testing.T) {
	for _, tt := range values {
		got, err := parseValue(tt.in)
		if tt.text == "" && (err != nil || got != tt.want) {
			t.Errorf("parseValue(%q) = %+v, %v; want %+v", tt.in, got, err, tt.want)
		}
		if tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text) || got != (Answer{})) {
			t.Errorf("parseValue(%q) = %+v, %v; want an error with %q", tt.in, got, err, tt.text)
		}
	}
}

// txtMessage returns a message in which name owns one TXT record with the given
// character-string.
func txtMessage(value string) []byte {
	const header = "\x12\x34\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00"
	const owner = "\x01a\x07example\x00"
	n := len(value)
	return []byte(header + owner + "\x00\x10\x00\x01" +
		"\xc0\x0c\x00\x10\x00\x01\x00\x00\x00\x3c" + string([]byte{byte((n + 1) >> 8), byte(n + 1), byte(n)}) + value)
}

// FuzzValue carries a character-string through the wire format and the
// presentation format of the library, neither of which may change it.
func FuzzValue(f *testing.F) {
	for _, tt := range values {
		f.Add(tt.in)
	}
	f.Add(`a\b"c` + "\x00\x7f\xff:1")
	f.Add(`\000\`)
	f.Fuzz(func(t *testing.T, value string) {
		if len(value) > 255 {
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(txtMessage(value)); err != nil {
			t.Fatal(err)
		}
		a := readTXT(m, "a.example.")
		if !a.found || unescape(a.value) != value {
			t.Fatalf("%q came out as %q, found: %v", value, unescape(a.value), a.found)
		}
		got, err := parseValue(value)
		if err != nil {
			return
		}
		id, port, _ := strings.Cut(value, ":")
		if got.ID != id || got.Port == 0 || strings.Trim(port, "+0123456789") != "" {
			t.Fatalf("parseValue(%q) = %+v", value, got)
		}
	})
}

// FuzzMessage reads messages of any content.
func FuzzMessage(f *testing.F) {
	f.Add(txtMessage("app:443"))
	for _, lines := range [][]string{
		{"a.example. 60 IN CNAME b.example.", `b.example. 4294967295 IN TXT "app:1" "x"`},
		{"a.example. 60 IN CNAME b.example.", "b.example. 5 IN CNAME a.example."},
		{"a.example. 60 IN CNAME b.example."},
	} {
		m := new(dns.Msg).SetQuestion("a.example.", dns.TypeTXT)
		m.Response, m.Answer, m.Ns = true, rrs(lines...), rrs(soa)
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	q := new(dns.Msg).SetQuestion("a.example.", dns.TypeTXT)
	q.Id = 0x1234
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if err := m.Unpack(b); err != nil && !m.Truncated || !matches(q, m) {
			return
		}
		a := readTXT(m, "a.example.")
		if a.ttl < 0 || a.ttl > longestTTL || a.found && a.alias != "" || a.hops > maxAliases+1 {
			t.Fatalf("%+v from %v", a, m)
		}
		unescape(a.value)
	})
}
