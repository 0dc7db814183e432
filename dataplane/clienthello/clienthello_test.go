package clienthello_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/dstack-gw/dstack-gw/dataplane/clienthello"
)

// capture is a first flight recorded from a real client.
type capture struct {
	file string
	name string // "" when the client sent none
	wire []byte
}

// captures reads testdata/hello: hex with a "# name: ..." comment that tells
// what to find.
func captures(t testing.TB) []capture {
	t.Helper()
	files, err := filepath.Glob("testdata/hello/*.hex")
	if err != nil || len(files) < 10 {
		t.Fatalf("found %d captures in testdata/hello, %v; want at least 10", len(files), err)
	}
	var out []capture
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		c := capture{file: filepath.Base(file)}
		var digits strings.Builder
		named := false
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			if name, ok := strings.CutPrefix(line, "# name: "); ok {
				named = true
				if name != "none" {
					c.name = name
				}
			}
			if !strings.HasPrefix(line, "#") {
				digits.WriteString(line)
			}
		}
		if c.wire, err = hex.DecodeString(digits.String()); err != nil || !named {
			t.Fatalf("%s: name given: %v, hex: %v", file, named, err)
		}
		out = append(out, c)
	}
	for _, name := range []string{"", "go.example.com"} {
		out = append(out, capture{"crypto/tls " + name, name, goHello(t, name)})
	}
	return out
}

// goHello returns the first flight of a crypto/tls client with its default
// groups, X25519MLKEM768 among them.
func goHello(t testing.TB, name string) []byte {
	t.Helper()
	var sent bytes.Buffer
	cfg := &tls.Config{ServerName: name, InsecureSkipVerify: name == ""}
	if err := tls.Client(recorder{w: &sent}, cfg).HandshakeContext(context.Background()); err == nil {
		t.Fatal("a handshake with nobody succeeded")
	}
	return sent.Bytes()
}

// recorder is the connection of a client that is never answered.
type recorder struct {
	net.Conn
	w io.Writer
}

func (r recorder) Write(b []byte) (int, error) { return r.w.Write(b) }
func (r recorder) Read([]byte) (int, error)    { return 0, io.EOF }
func (r recorder) Close() error                { return nil }

// message returns the handshake bytes in the records of wire.
func message(wire []byte) []byte {
	var m []byte
	for len(wire) >= 5 {
		n := min(int(binary.BigEndian.Uint16(wire[3:])), len(wire)-5)
		m = append(m, wire[5:5+n]...)
		wire = wire[5+n:]
	}
	return m
}

// records puts a handshake message into records of at most size bytes.
func records(message []byte, size int) []byte {
	var wire []byte
	for part := range slices.Chunk(message, size) {
		wire = append(wire, 22, 3, 1, byte(len(part)>>8), byte(len(part)))
		wire = append(wire, part...)
	}
	return wire
}

// parts are the pieces of a synthetic hello; every length is as it should be
// unless a test spoils it afterwards.
type parts struct {
	session    int
	before     []byte // extensions before server_name
	serverName []byte // body of server_name, nil for none
	after      []byte
}

func (p parts) message() []byte {
	vec := func(size int, body []byte) []byte {
		n := binary.BigEndian.AppendUint64(nil, uint64(len(body)))
		return append(n[8-size:], body...)
	}
	exts := p.before
	if p.serverName != nil {
		exts = slices.Concat(exts, []byte{0, 0}, vec(2, p.serverName))
	}
	exts = slices.Concat(exts, p.after)
	body := slices.Concat([]byte{3, 3}, make([]byte, 32),
		vec(1, make([]byte, p.session)), vec(2, []byte{0x13, 0x01}), vec(1, []byte{0}), vec(2, exts))
	return append([]byte{1}, vec(3, body)...)
}

func hostList(names ...string) []byte {
	var list []byte
	for _, name := range names {
		list = append(list, 0)
		list = binary.BigEndian.AppendUint16(list, uint16(len(name)))
		list = append(list, name...)
	}
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(list))), list...)
}

func extension(typ, size int) []byte {
	e := binary.BigEndian.AppendUint16(nil, uint16(typ))
	return append(binary.BigEndian.AppendUint16(e, uint16(size)), make([]byte, size)...)
}

func hello(names ...string) []byte {
	return records(parts{session: 32, serverName: hostList(names...)}.message(), 1<<14)
}

// check feeds wire byte by byte and wants ErrIncomplete until the verdict, and
// the same verdict from then on. It returns the number of bytes that sufficed.
func check(t *testing.T, wire []byte, want string, wantErr error) int {
	t.Helper()
	at := -1
	for i := 0; i <= len(wire); i++ {
		got, err := clienthello.SNI(wire[:i], nil)
		if at < 0 && err == clienthello.ErrIncomplete && wantErr != err {
			continue
		}
		if at < 0 {
			at = i
		}
		if string(got) != want || err != wantErr {
			t.Fatalf("after %d of %d bytes: %q, %v; want %q, %v", i, len(wire), got, err, want, wantErr)
		}
	}
	if at < 0 {
		t.Fatalf("still incomplete after all %d bytes; want %q, %v", len(wire), want, wantErr)
	}
	return at
}

func TestCaptures(t *testing.T) {
	for _, c := range captures(t) {
		t.Run(c.file, func(t *testing.T) {
			var wantErr error
			if c.name == "" {
				wantErr = clienthello.ErrNoSNI
			}
			at := check(t, c.wire, c.name, wantErr)
			switch {
			case c.name == "" && at != len(c.wire):
				t.Errorf("decided after %d bytes that there is no name, the hello has %d", at, len(c.wire))
			case c.name != "" && !strings.EqualFold(string(c.wire[at-len(c.name):at]), c.name):
				t.Errorf("found the name only after %d bytes", at)
			}
			for _, size := range []int{1, 5, 64, 500} {
				// check takes quadratic time.
				if wire := records(message(c.wire), size); len(wire) < 4096 {
					check(t, wire, c.name, wantErr)
				}
			}
		})
	}
}

func TestNames(t *testing.T) {
	long := strings.Repeat("a", 255)
	for _, tt := range []struct {
		what, sent, want string
		err              error
	}{
		{"plain", "app.example.com", "app.example.com", nil},
		{"upper case", "APP.Example.COM", "app.example.com", nil},
		{"trailing dot", "app.example.com.", "app.example.com", nil},
		{"two trailing dots", "app.example.com..", "app.example.com.", nil},
		{"one letter", "A", "a", nil},
		{"not a DNS name", "a_b c!", "a_b c!", nil},
		{"address", "192.0.2.1", "192.0.2.1", nil},
		{"UTF-8 keeps its case", "BÜCHER.example", "bÜcher.example", nil},
		{"longest", long, long, nil},
		{"too long", long + "a", "", clienthello.ErrMalformed},
		{"much too long", strings.Repeat("a", 5000), "", clienthello.ErrMalformed},
		{"empty", "", "", clienthello.ErrMalformed},
		{"only a dot", ".", "", clienthello.ErrMalformed},
		{"invalid UTF-8", "app\xff.example.com", "", clienthello.ErrMalformed},
		{"cut UTF-8", "app.example\xc3", "", clienthello.ErrMalformed},
	} {
		t.Run(tt.what, func(t *testing.T) { check(t, hello(tt.sent), tt.want, tt.err) })
	}
}

func TestServerNameLists(t *testing.T) {
	other := []byte{9, 0, 3, 'x', 'y', 'z'}
	list := func(entries ...byte) []byte {
		return append(binary.BigEndian.AppendUint16(nil, uint16(len(entries))), entries...)
	}
	host := []byte{0, 0, 1, 'a'}
	for _, tt := range []struct {
		what string
		p    parts
		want string
		err  error
	}{
		{"first of two", parts{serverName: hostList("a", "b")}, "a", nil},
		{"behind another type", parts{serverName: list(append(slices.Clone(other), host...)...)}, "a", nil},
		{"other types only", parts{serverName: list(other...)}, "", clienthello.ErrNoSNI},
		{"other types only, more extensions", parts{serverName: list(other...), after: extension(16, 9)}, "", clienthello.ErrNoSNI},
		{"no extensions", parts{}, "", clienthello.ErrNoSNI},
		{"other extensions", parts{before: extension(16, 20), after: extension(51, 1200)}, "", clienthello.ErrNoSNI},
		{"empty extension", parts{serverName: []byte{}}, "", clienthello.ErrNoSNI},
		{"empty list", parts{serverName: list()}, "", clienthello.ErrNoSNI},
		{"last extension", parts{before: extension(51, 1200), serverName: hostList("a")}, "a", nil},
		{"longest session id", parts{session: 255, serverName: hostList("a")}, "a", nil},
	} {
		t.Run(tt.what, func(t *testing.T) {
			m := tt.p.message()
			check(t, records(m, 1<<14), tt.want, tt.err)
			check(t, records(m, 11), tt.want, tt.err)
		})
	}
}

// TestEarly checks how few bytes suffice for a verdict.
func TestEarly(t *testing.T) {
	for _, tt := range []struct {
		what, wire string
		at         int
		err        error
	}{
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", 1, clienthello.ErrNotTLS},
		{"SSH", "SSH-2.0-OpenSSH_9.2\r\n", 1, clienthello.ErrNotTLS},
		{"zeroes", "\x00\x00\x00", 1, clienthello.ErrNotTLS},
		{"alert record", "\x15\x03\x01\x00\x02\x01\x00", 1, clienthello.ErrNotTLS},
		{"SSL 2 hello", "\x80\x2e\x01\x03\x01", 1, clienthello.ErrNotTLS},
		{"server hello", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", 6, clienthello.ErrMalformed},
		{"hello request", "\x16\x03\x01\x00\x04\x00\x00\x00\x00", 6, clienthello.ErrMalformed},
		{"empty hello", "\x16\x03\x01\x00\x04\x01\x00\x00\x00", 9, clienthello.ErrNoSNI},
	} {
		t.Run(tt.what, func(t *testing.T) {
			if at := check(t, []byte(tt.wire), "", tt.err); at != tt.at {
				t.Errorf("needed %d bytes, want %d", at, tt.at)
			}
		})
	}
}

// TestLenient spoils what the peers we replace do not look at.
func TestLenient(t *testing.T) {
	const name = "app.example.com"
	p := parts{session: 32, before: extension(16, 6), serverName: hostList(name), after: extension(51, 40)}
	base := records(p.message(), 1<<14)
	nameAt := bytes.Index(base, []byte(name))
	put := func(at int, b ...byte) []byte {
		wire := bytes.Clone(base)
		copy(wire[at:], b)
		return wire
	}
	extensionsAt := 5 + 4 + 34 + 1 + 32 + 2 + 2 + 1 + 1
	for _, tt := range []struct {
		what string
		wire []byte
	}{
		{"record version", put(1, 0xff, 0xff)},
		{"record length 0", put(3, 0, 0)},
		{"record length 1", put(3, 0, 1)},
		{"record length 30", put(3, 0, 30)},
		{"record length 65535", put(3, 0xff, 0xff)},
		{"message length 65536", put(6, 1, 0, 0)},
		{"hello version", put(9, 0, 0)},
		{"extensions length 0", put(extensionsAt, 0, 0)},
		{"extensions length 65535", put(extensionsAt, 0xff, 0xff)},
		{"list length 0", put(nameAt-5, 0, 0)},
		{"list length 65535", put(nameAt-5, 0xff, 0xff)},
		{"server_name length 0", put(nameAt-7, 0, 0)},
		{"server_name length 65535", put(nameAt-7, 0xff, 0xff)},
	} {
		t.Run(tt.what, func(t *testing.T) {
			if at := check(t, tt.wire, name, nil); at != nameAt+len(name) {
				t.Errorf("found after %d bytes, want %d", at, nameAt+len(name))
			}
		})
	}
	// A length of the message that is too small is indistinguishable from the end
	// of a nameless hello while the bytes trickle in, but not once they are there.
	if got, err := clienthello.SNI(put(6, 0, 0, 0), nil); string(got) != name || err != nil {
		t.Errorf("message length 0: %q, %v", got, err)
	}
}

// TestEarlyData puts records of other types behind a hello, as TLS 1.3 clients
// with early data do.
func TestEarlyData(t *testing.T) {
	tail := []byte("\x14\x03\x03\x00\x01\x01\x17\x03\x03\x00\x05hello")
	for _, size := range []int{20, 1 << 14} {
		check(t, append(records(parts{serverName: hostList("a")}.message(), size), tail...), "a", nil)
		check(t, append(records(parts{after: extension(42, 0)}.message(), size), tail...), "", clienthello.ErrNoSNI)
	}
}

// TestSize puts the name behind more and more bytes of other extensions.
func TestSize(t *testing.T) {
	padded := func(total int) []byte { // message of total bytes that ends with the name
		bare := parts{serverName: hostList("app.example.com")}
		bare.before = extension(21, total-len(bare.message())-4)
		return bare.message()
	}
	for _, total := range []int{300, 4096, 4200, 8192, 16383, 16384} {
		for _, size := range []int{1100, 4096, 1 << 14} {
			wire := records(padded(total), size)
			if got, err := clienthello.SNI(wire, nil); string(got) != "app.example.com" || err != nil {
				t.Errorf("message of %d bytes in records of %d: %q, %v", total, size, got, err)
			}
		}
	}
	atLimit := records(padded(clienthello.MaxSize-2*5), 1<<14)
	if len(atLimit) != clienthello.MaxSize {
		t.Fatalf("built %d bytes, want %d", len(atLimit), clienthello.MaxSize)
	}
	if got, err := clienthello.SNI(atLimit, nil); string(got) != "app.example.com" || err != nil {
		t.Errorf("at the limit: %q, %v", got, err)
	}
	if _, err := clienthello.SNI(atLimit[:len(atLimit)-1], nil); err != clienthello.ErrIncomplete {
		t.Errorf("one byte before the limit: %v, want ErrIncomplete", err)
	}
	beyond := records(padded(clienthello.MaxSize-2*5+1), 1<<14)
	for _, wire := range [][]byte{beyond[:clienthello.MaxSize], beyond} {
		if _, err := clienthello.SNI(wire, nil); err != clienthello.ErrTooLarge {
			t.Errorf("%d bytes of a hello beyond the limit: %v, want ErrTooLarge", len(wire), err)
		}
	}
}

// TestDst checks that dst is used and that nothing else is touched.
func TestDst(t *testing.T) {
	wire := hello("App.Example.com")
	before := bytes.Clone(wire)
	dst := []byte("something that was there before")
	got, err := clienthello.SNI(wire, dst)
	if err != nil || string(got) != "app.example.com" || &got[0] != &dst[0] {
		t.Errorf("got %q, %v, in dst: %v", got, err, &got[0] == &dst[0])
	}
	if !bytes.Equal(wire, before) {
		t.Error("the input was changed")
	}
	if got, err := clienthello.SNI(wire, make([]byte, 0, 3)); err != nil || string(got) != "app.example.com" {
		t.Errorf("into a small dst: %q, %v", got, err)
	}
}

func TestNoAllocation(t *testing.T) {
	dst := make([]byte, 0, clienthello.MaxNameSize)
	inputs := map[string][]byte{
		"longest name": hello(strings.Repeat("a", 255)),
		"one a record": records(message(hello("app.example.com")), 1),
		"HTTP":         []byte("GET / HTTP/1.1\r\n"),
		"incomplete":   hello("app.example.com")[:90],
	}
	for _, c := range captures(t) {
		inputs[c.file] = c.wire
	}
	for what, wire := range inputs {
		if n := testing.AllocsPerRun(100, func() { clienthello.SNI(wire, dst) }); n != 0 {
			t.Errorf("%s: %v allocations", what, n)
		}
	}
}

func BenchmarkSNI(b *testing.B) {
	dst := make([]byte, 0, clienthello.MaxNameSize)
	for _, c := range captures(b) {
		if c.name == "" {
			continue
		}
		for _, size := range []int{1 << 14, 64} {
			wire := records(message(c.wire), size)
			b.Run(fmt.Sprintf("%s/record=%d", c.file, size), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					if _, err := clienthello.SNI(wire, dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// cryptoTLS returns the server name that a crypto/tls server reads from wire,
// and whether it got as far as asking for a configuration.
func cryptoTLS(wire []byte) (name string, parsed bool) {
	errStop := errors.New("seen enough")
	server := tls.Server(player{r: bytes.NewReader(wire)}, &tls.Config{
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			name, parsed = h.ServerName, true
			return nil, errStop
		},
	})
	if err := server.HandshakeContext(context.Background()); err == nil {
		panic("a handshake without a certificate succeeded")
	}
	return name, parsed
}

// player is the connection of a server whose client does not listen.
type player struct {
	net.Conn
	r io.Reader
}

func (p player) Read(b []byte) (int, error)  { return p.r.Read(b) }
func (p player) Write(b []byte) (int, error) { return len(b), nil }
func (p player) Close() error                { return nil }

// TestCryptoTLSReadsCaptures keeps the differential check of FuzzSNI honest.
func TestCryptoTLSReadsCaptures(t *testing.T) {
	for _, c := range captures(t) {
		for _, size := range []int{100, 1 << 14} {
			name, parsed := cryptoTLS(records(message(c.wire), size))
			if !parsed || !strings.EqualFold(name, c.name) {
				t.Errorf("%s in records of %d bytes: crypto/tls parsed it: %v, name %q; want %q", c.file, size, parsed, name, c.name)
			}
		}
	}
}

// flatWalk reads a hello by the letter of gateway spec 4.2, as the peers we
// replace do: one record header, no lengths enforced. It returns the offset
// behind the name.
func flatWalk(b []byte) (name []byte, end int, ok bool) {
	defer func() {
		if recover() != nil { // out of bytes
			name, end, ok = nil, 0, false
		}
	}()
	b = slices.Clip(b) // or slicing would go on to its capacity
	u16 := func(at int) int { return int(b[at])<<8 | int(b[at+1]) }
	if len(b) < 10 || b[5] != 1 {
		return nil, 0, false
	}
	at := 5 + 4 + 34
	at += 1 + int(b[at])
	at += 2 + u16(at)
	at += 1 + int(b[at])
	at += 2
	for u16(at) != 0 {
		at += 4 + u16(at+2)
	}
	at += 4 + 2
	if b[at] != 0 {
		return nil, 0, false // a first name of another type: the text does not say
	}
	n := u16(at + 1)
	name = b[at+3 : at+3+n]
	return name, at + 3 + n, utf8.Valid(name)
}

// FuzzSNI checks SNI against crypto/tls, against the flat walk, and against
// itself given the same bytes in smaller portions.
func FuzzSNI(f *testing.F) {
	for _, c := range captures(f) {
		f.Add(c.wire)
	}
	f.Add(records(message(hello("app.example.com")), 50))
	f.Add(records(parts{}.message(), 1<<14))
	f.Fuzz(func(t *testing.T, wire []byte) {
		dst := make([]byte, 0, clienthello.MaxNameSize)
		name, err := clienthello.SNI(wire, dst)
		switch err {
		case nil:
			if len(name) == 0 || len(name) > clienthello.MaxNameSize || !utf8.Valid(name) || &name[0] != &dst[:1][0] {
				t.Fatalf("name %q", name)
			}
		case clienthello.ErrIncomplete:
			if len(wire) >= clienthello.MaxSize {
				t.Fatalf("still incomplete after %d bytes", len(wire))
			}
		case clienthello.ErrNotTLS, clienthello.ErrNoSNI, clienthello.ErrMalformed, clienthello.ErrTooLarge:
		default:
			t.Fatalf("unknown error %v", err)
		}

		// A name, once found, stays; so does the verdict that there can be none.
		for i := range min(len(wire), 2048) {
			early, earlyErr := clienthello.SNI(wire[:i], nil)
			if earlyErr == clienthello.ErrIncomplete {
				continue
			}
			if (earlyErr != err || !bytes.Equal(early, name)) && earlyErr != clienthello.ErrNoSNI {
				t.Fatalf("after %d bytes %q, %v; after all %d %q, %v", i, early, earlyErr, len(wire), name, err)
			}
		}

		if len(wire) <= clienthello.MaxSize {
			againstCryptoTLS(t, wire, name, err)
			againstFlatWalk(t, wire, name, err)
		}
	})
}

func againstCryptoTLS(t *testing.T, wire, name []byte, err error) {
	theirs, parsed := cryptoTLS(wire)
	if !parsed {
		return
	}
	if theirs == "" {
		// We may have found something behind the end of the hello, but not in it.
		m := message(wire)
		n := 4 + (int(m[1])<<16 | int(m[2])<<8 | int(m[3]))
		if name, err = clienthello.SNI(records(m[:n], 1<<14), nil); err != clienthello.ErrNoSNI {
			t.Fatalf("crypto/tls sees no name, we see %q, %v", name, err)
		}
		return
	}
	if len(theirs) > clienthello.MaxNameSize || !utf8.ValidString(theirs) {
		if err != clienthello.ErrMalformed {
			t.Fatalf("crypto/tls sees the unusable name %q, we see %q, %v", theirs, name, err)
		}
		return
	}
	if err != nil || string(name) != lower(theirs) {
		t.Fatalf("crypto/tls sees %q, we see %q, %v", theirs, name, err)
	}
}

func againstFlatWalk(t *testing.T, wire, name []byte, err error) {
	theirs, end, ok := flatWalk(wire)
	if !ok || wire[0] != 22 || len(theirs) > clienthello.MaxNameSize {
		return
	}
	want := strings.TrimSuffix(lower(string(theirs)), ".")
	if want == "" {
		return
	}
	// Where the name continues in another record we know better, and where hello
	// and record both end before the name, it is not part of the hello.
	first := 5 + int(binary.BigEndian.Uint16(wire[3:]))
	over := 5 + 4 + (int(wire[6])<<16 | int(wire[7])<<8 | int(wire[8]))
	if first > 5 && first < end && (wire[first] == 22 || over <= first) {
		return
	}
	if err != nil || string(name) != want {
		t.Fatalf("the flat walk sees %q, we see %q, %v", theirs, name, err)
	}
}

func lower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 32
		}
	}
	return string(b)
}
