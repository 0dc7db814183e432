package soak

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

func stream(t *testing.T, id uint64) []byte {
	t.Helper()
	var b bytes.Buffer
	s := newSender(&b, id, toApp)
	if err := errors.Join(s.open(Bulk, id, 7, 9), s.data(40000, 5), s.data(1, 0), s.end()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// receive returns the first error, and how many payload bytes were verified before.
func receive(id uint64, in io.Reader) (uint64, error) {
	r := newReceiver(buffered(in), id, toApp)
	for {
		if _, err := r.next(); err != nil {
			if err == io.EOF && !r.ended {
				err = io.ErrUnexpectedEOF
			}
			return r.received, err
		}
	}
}

type chunks struct{ b []byte }

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 1+rand.IntN(3000))], c.b)
	c.b = c.b[n:]
	return n, nil
}

func TestStream(t *testing.T) {
	b := stream(t, 3)
	if n, err := receive(3, &chunks{b}); n != 40001 || err != io.EOF {
		t.Errorf("whole stream: %d bytes, %v", n, err)
	}
	// Every prefix is right as far as it goes.
	for n := 0; n < len(b); n += 1 + n/50 {
		if _, err := receive(3, bytes.NewReader(b[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("prefix of %d bytes: %v", n, err)
		}
	}
}

// What a broken relay does to a stream, each of which must be noticed.
func TestDamage(t *testing.T) {
	b := stream(t, 3)
	cut := func(from, to int) []byte { return append(bytes.Clone(b[:from]), b[to:]...) }
	cases := map[string][]byte{
		"another connection": stream(t, 4),
		"lost byte":          cut(5000, 5001),
		"lost 16 KiB":        cut(5000, 5000+16384),
		"lost frame":         cut(headerSize, 2*headerSize+maxFrame),
		"lost data frame":    cut(headerSize+headerSize+maxFrame, headerSize+2*(headerSize+maxFrame)),
		"repeated byte":      append(bytes.Clone(b[:5000]), b[4999:]...),
		"trailing frame":     append(bytes.Clone(b), b[:headerSize]...),
	}
	for i := 0; i < len(b); i += 1 + rand.IntN(200) {
		c := bytes.Clone(b)
		c[i] ^= 1 << rand.IntN(8)
		if _, err := receive(3, bytes.NewReader(c)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("bit of byte %d flipped: %v", i, err)
		}
	}
	for name, c := range cases {
		if _, err := receive(3, bytes.NewReader(c)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A stream whose tail was replaced by that of a shorter one has right bytes everywhere but in the sum.
	var short bytes.Buffer
	s := newSender(&short, 3, toApp)
	if err := errors.Join(s.open(Bulk, 3, 8, 9), s.data(40000, 5), s.data(1, 0), s.end()); err != nil {
		t.Fatal(err)
	}
	end := headerSize + 32
	mixed := append(bytes.Clone(b[:len(b)-end]), short.Bytes()[short.Len()-end:]...)
	if _, err := receive(3, bytes.NewReader(mixed)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("another stream's sum: %v", err)
	}
}

func TestPlans(t *testing.T) {
	for k := range kindCount {
		for id := range uint64(50) {
			p, q := newPlan(k, id, 1), newPlan(k, id, 1)
			if len(p.requests) != len(q.requests) || len(p.app) != len(q.app) || p.reset != q.reset || p.haste != q.haste {
				t.Fatalf("%v %d: the ends derive different plans", k, id)
			}
			if k != Hasty && len(p.requests) == 0 && (len(p.client) == 0 || len(p.app) == 0) {
				t.Errorf("%v %d: nothing to do", k, id)
			}
			for _, s := range append(p.client, p.app...) {
				if s.bytes == 0 && !s.afterPeer {
					t.Errorf("%v %d: empty step", k, id)
				}
			}
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	seen := map[Kind]int{}
	for range 5000 {
		seen[chooseKind(r)]++
	}
	for k, w := range weights {
		if (w > 0) != (seen[Kind(k)] > 0) {
			t.Errorf("%v with weight %d was chosen %d times", Kind(k), w, seen[Kind(k)])
		}
	}
}
