package wire

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

func TestMessageRoundTrip(t *testing.T) {
	for _, m := range []Message{
		{Kind: Request, Conn: 1, Seq: 2},
		{Kind: HelloAck, Conn: 1<<64 - 1, Seq: 1 << 63, A: 7, B: 1 << 40},
		{},
	} {
		var b [Size]byte
		m.Put(b[:])
		got, err := Parse(b[:])
		if err != nil || got != m {
			t.Errorf("%+v: got %+v, %v", m, got, err)
		}
		if err := Expect(b[:], m); err != nil {
			t.Errorf("Expect(%+v): %v", m, err)
		}
	}
}

// Every flipped bit must be noticed, also those in the filler.
func TestMessageDamage(t *testing.T) {
	var b [Size]byte
	Message{Kind: Reply, Conn: 3, Seq: 4, A: 5, B: 6}.Put(b[:])
	for i := range Size * 8 {
		c := b
		c[i/8] ^= 1 << (i % 8)
		if _, err := Parse(c[:]); !errors.Is(err, ErrCorrupt) {
			t.Errorf("bit %d flipped: %v", i, err)
		}
	}
	if _, err := Parse(b[:Size-1]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("short message: %v", err)
	}
	if err := Expect(b[:], Message{Kind: Reply, Conn: 3, Seq: 5, A: 5, B: 6}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("stale sequence number: %v", err)
	}
}

func TestHello(t *testing.T) {
	for _, c := range []struct {
		pq       bool
		min, max int
	}{{false, 150, 600}, {true, 1300, 2000}} {
		h, err := Hello("0123-443s.bench.test", c.pq)
		if err != nil {
			t.Fatal(err)
		}
		if len(h) < c.min || len(h) > c.max {
			t.Errorf("post-quantum %v: %d bytes, want %d to %d", c.pq, len(h), c.min, c.max)
		}
		if !bytes.Contains(h, []byte("0123-443s.bench.test")) {
			t.Errorf("post-quantum %v: name missing", c.pq)
		}
		for n := range len(h) {
			want := 0
			if n >= recordHeader {
				want = len(h)
			}
			if got, err := HelloLen(h[:n]); got != want || err != nil {
				t.Fatalf("HelloLen of %d bytes = %d, %v", n, got, err)
			}
		}
	}
	for _, b := range [][]byte{[]byte("GET / HTTP/1.1"), {22, 2}, {23}, {22, 3, 1, 0x40, 1}} {
		if _, err := HelloLen(b); !errors.Is(err, ErrNotHello) {
			t.Errorf("HelloLen(% x): %v", b, err)
		}
	}
}

func transfer(t *testing.T, conn uint64, quanta int, hashed bool) []byte {
	t.Helper()
	var buf bytes.Buffer
	s := NewSender(NewPattern(), conn, hashed)
	for i := range quanta {
		if err := s.Next(&buf, i == quanta-1); err != nil {
			t.Fatal(err)
		}
	}
	if s.Bytes() != uint64(quanta)*QuantumSize {
		t.Fatalf("sender counted %d bytes", s.Bytes())
	}
	return buf.Bytes()
}

func feed(p *Pattern, conn uint64, hashed bool, stream []byte, chunk func() int) (*Receiver, error) {
	r := NewReceiver(p, conn, hashed)
	for len(stream) > 0 {
		n := min(len(stream), chunk())
		used, err := r.Feed(stream[:n])
		if err != nil {
			return r, err
		}
		if used < n {
			return r, fmt.Errorf("%d bytes after the end: %w", len(stream)-used, ErrCorrupt)
		}
		stream = stream[n:]
	}
	return r, nil
}

func TestBulkRoundTrip(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, hashed := range []bool{false, true} {
		stream := transfer(t, 5, 3, hashed)
		r, err := feed(NewPattern(), 5, hashed, stream, func() int { return 1 + rnd.IntN(70000) })
		if err != nil || !r.Done() || r.Bytes() != 3*QuantumSize {
			t.Errorf("hashed %v: done %v after %d bytes: %v", hashed, r.Done(), r.Bytes(), err)
		}
		if r, err := feed(NewPattern(), 5, hashed, stream[:len(stream)-1], func() int { return 1 << 20 }); err != nil || r.Done() {
			t.Errorf("hashed %v, last byte missing: done %v, %v", hashed, r.Done(), err)
		}
	}
}

// What a broken relay does to a stream, each of which must be noticed.
func TestBulkDamage(t *testing.T) {
	p := NewPattern()
	stream := transfer(t, 2, 4, false)
	cut := func(from, to int) []byte { return append(bytes.Clone(stream[:from]), stream[to:]...) }
	at := Size + QuantumSize + Size + 1000
	flipped := bytes.Clone(stream)
	flipped[at] ^= 0x80
	swapped := bytes.Clone(stream)
	copy(swapped[at:], stream[at+16384:at+32768])
	copy(swapped[at+16384:], stream[at:at+16384])
	for name, b := range map[string][]byte{
		"flipped bit":         flipped,
		"lost 16 KiB":         cut(at, at+16384),
		"lost quantum":        cut(Size+QuantumSize, 2*(Size+QuantumSize)),
		"repeated quantum":    append(bytes.Clone(stream[:2*(Size+QuantumSize)]), stream[Size+QuantumSize:]...),
		"swapped chunks":      swapped,
		"trailing byte":       append(bytes.Clone(stream), 0),
		"another connection":  transfer(t, 3, 4, false),
		"header lost":         stream[Size:],
		"one byte duplicated": append(append(bytes.Clone(stream[:at]), stream[at-1]), stream[at:]...),
	} {
		if _, err := feed(p, 2, false, b, func() int { return 65536 }); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	hashed := transfer(t, 2, 2, true)
	hashed[len(hashed)-1] ^= 1
	if _, err := feed(p, 2, true, hashed, func() int { return 65536 }); !errors.Is(err, ErrCorrupt) {
		t.Errorf("wrong SHA-256: %v", err)
	}
}
