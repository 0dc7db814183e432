package explain

import (
	"strings"
	"testing"

	"github.com/dstack-gw/dstack-gw/dataplane/clienthello"
)

func TestParseInput(t *testing.T) {
	long := strings.Repeat("a.", 127) + "a"
	for _, tt := range []struct {
		in   string
		want input
		err  string
	}{
		{in: "app.example.com", want: input{name: "app.example.com"}},
		{in: " APP.Example.com. \n", want: input{name: "app.example.com", folded: true}},
		{in: "app.example.com:8443", want: input{name: "app.example.com", port: 8443}},
		{in: "HTTPS://user:pw@app.example.com:8443/a:b@c?d#e", want: input{name: "app.example.com", port: 8443, scheme: "https"}},
		{in: "<https://app.example.com>", want: input{name: "app.example.com", scheme: "https"}},
		{in: "`app.example.com/`", want: input{name: "app.example.com"}},
		{in: "app.example.com?x", want: input{name: "app.example.com"}},
		{in: "Bücher.example", want: input{name: "xn--bcher-kva.example", unicode: true}},
		{in: "a_b.example", want: input{name: "a_b.example"}},
		{in: "ABC", want: input{name: "ABC", bare: true}},
		{in: "abc:8080", want: input{name: "abc", bare: true, port: 8080}},
		{in: "abc-8080s", want: input{name: "abc-8080s", bare: true}},
		{in: long, want: input{name: long}},

		{in: "", err: "no host name"},
		{in: "https://", err: "no host name"},
		{in: ".", err: "no host name"},
		{in: ":443", err: "no host name"},
		{in: "192.0.2.1", err: "IP address"},
		{in: "192.0.2.1:443", err: "IP address"},
		{in: "2001:db8::1", err: "IP address"},
		{in: "https://[2001:db8::1]:443/", err: "IP address"},
		{in: "a.b:0", err: "not a port"},
		{in: "a.b:65536", err: "not a port"},
		{in: "a.b:https", err: "not a port"},
		{in: "*.example.com", err: "wildcard"},
		{in: "a b.example", err: "space or control"},
		{in: "a\x00.example", err: "space or control"},
		{in: "a\xff.example", err: "not UTF-8"},
		{in: "\u0338a.example", err: "ASCII name"},
		{in: long + "aa", err: "257 bytes"},
	} {
		got, err := parseInput(tt.in)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: %+v, %v; want an error with %q", tt.in, got, err, tt.err)
			}
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("%q: %+v, %v; want %+v", tt.in, got, err, tt.want)
		}
	}
}

// FuzzParseInput: what is taken for a host name is one that a ClientHello can carry
// and stays itself.
func FuzzParseInput(f *testing.F) {
	for _, s := range []string{"https://a.b:1/", "[::1]", "a@b@c.d", "Ü.example", "a..b", "abc:80", "*.x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		in, err := parseInput(s)
		if err != nil {
			return
		}
		if in.name == "" || strings.ContainsAny(in.name, " \t\r\n/:@\x00") && !in.bare {
			t.Fatalf("%q gives %q", s, in.name)
		}
		if in.bare {
			return
		}
		if len(in.name) > clienthello.MaxNameSize || !isASCII(in.name) || in.name != strings.ToLower(in.name) {
			t.Fatalf("%q gives %q", s, in.name)
		}
	})
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "abc", 0}, {"abc", "abd", 1}, {"abc", "ab", 1}, {"abc", "xabc", 1}, {"abc", "cba", 2}, {"abc", "xyz", 3}, {"a", "abcdefg", 3}} {
		if got := distance(tt.a, tt.b, 3); got != tt.want {
			t.Errorf("distance(%q, %q) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

func TestPortRanges(t *testing.T) {
	for want, ports := range map[string][]uint16{
		"": nil, "443": {443}, "443-445": {443, 444, 445}, "80, 443-444, 8443": {80, 443, 444, 8443}, "65534-65535": {65534, 65535},
		"1, 3, 5, 7, 9, 11, 13, 15 and 1 more": {1, 3, 5, 7, 9, 11, 13, 15, 17},
	} {
		if got := portRanges(ports); got != want {
			t.Errorf("%v: %q, want %q", ports, got, want)
		}
	}
}
