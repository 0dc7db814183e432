package soak

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"sync"
)

// ErrCorrupt says that bytes arrived that were not sent like this.
var ErrCorrupt = errors.New("wrong bytes")

const (
	headerSize = 40
	magic      = 0x50a4
	maxFrame   = 16 << 10
	// period of the content: a prime, so that no power of two of bytes lost or repeated goes unnoticed.
	period = 1048573
)

// frameType of a frame; a stream is one open frame (client to app only), data frames, and one end frame.
type frameType uint8

const (
	frameOpen frameType = 1 + iota
	frameData
	frameEnd
)

// header of a frame: 40 bytes with a CRC-32C.
type header struct {
	typ  frameType
	kind Kind
	len  uint32 // bytes that follow
	// open: id, seed, checksum of the ClientHello; data: offset of the payload in the stream's payload, bytes wanted
	// in return; end: payload bytes of the whole stream.
	a, b, c uint64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (h header) put(b []byte) {
	binary.BigEndian.PutUint16(b, magic)
	b[2], b[3] = byte(h.typ), byte(h.kind)
	binary.BigEndian.PutUint32(b[4:], h.len)
	binary.BigEndian.PutUint64(b[8:], h.a)
	binary.BigEndian.PutUint64(b[16:], h.b)
	binary.BigEndian.PutUint64(b[24:], h.c)
	binary.BigEndian.PutUint32(b[32:], 0)
	binary.BigEndian.PutUint32(b[36:], crc32.Checksum(b[:36], castagnoli))
}

func parseHeader(b []byte) (header, error) {
	if len(b) < headerSize || binary.BigEndian.Uint16(b) != magic ||
		binary.BigEndian.Uint32(b[36:]) != crc32.Checksum(b[:36], castagnoli) {
		return header{}, fmt.Errorf("frame header % x: %w", b, ErrCorrupt)
	}
	return header{
		typ: frameType(b[2]), kind: Kind(b[3]), len: binary.BigEndian.Uint32(b[4:]),
		a: binary.BigEndian.Uint64(b[8:]), b: binary.BigEndian.Uint64(b[16:]), c: binary.BigEndian.Uint64(b[24:]),
	}, nil
}

// content is what all streams are cut from; each begins at another place.
var content = sync.OnceValue(func() []byte {
	b := make([]byte, period+maxFrame)
	var seed [32]byte
	copy(seed[:], "soak")
	rand.NewChaCha8(seed).Read(b[:period])
	copy(b[period:], b)
	return b
})

// direction of a stream.
type direction uint64

const (
	toApp direction = iota
	toClient
)

// place returns where the content of a stream begins.
func place(id uint64, d direction) int {
	x := (id*2 + uint64(d) + 1) * 0x9e3779b97f4a7c15
	x ^= x >> 29
	return int(x * 0xbf58476d1ce4e5b9 >> 11 % period)
}

// sender writes one direction of a connection. For one goroutine.
type sender struct {
	w     io.Writer
	sum   hash.Hash
	start int
	sent  uint64 // payload bytes
}

func newSender(w io.Writer, id uint64, d direction) *sender {
	return &sender{w: w, sum: sha256.New(), start: place(id, d)}
}

var frames = sync.Pool{New: func() any { b := make([]byte, headerSize+maxFrame); return &b }}

// write sends one frame of h and n bytes of content in one call.
func (s *sender) write(h header, n int) error {
	p := frames.Get().(*[]byte)
	defer frames.Put(p)
	h.len = uint32(n)
	b := (*p)[:headerSize+n]
	h.put(b)
	at := (s.start + int(s.sent%period)) % period
	copy(b[headerSize:], content()[at:at+n])
	s.sum.Write(b)
	if _, err := s.w.Write(b); err != nil {
		return err
	}
	s.sent += uint64(n)
	return nil
}

func (s *sender) open(k Kind, id, seed uint64, hello uint32) error {
	return s.write(header{typ: frameOpen, kind: k, a: id, b: seed, c: uint64(hello)}, 0)
}

// data sends n bytes in frames; the last asks for want bytes.
func (s *sender) data(n int, want uint64) error {
	for n > 0 {
		m := min(n, maxFrame)
		n -= m
		h := header{typ: frameData, a: s.sent}
		if n == 0 {
			h.b = want
		}
		if err := s.write(h, m); err != nil {
			return err
		}
	}
	return nil
}

// end sends the length and the SHA-256 of all that was sent before.
func (s *sender) end() error {
	var b [headerSize + sha256.Size]byte
	header{typ: frameEnd, len: sha256.Size, a: s.sent}.put(b[:])
	s.sum.Sum(b[:headerSize])
	_, err := s.w.Write(b[:])
	return err
}

// receiver verifies one direction of a connection. For one goroutine.
type receiver struct {
	r        *bufio.Reader
	sum      hash.Hash
	start    int
	received uint64 // payload bytes, all verified
	ended    bool
}

func newReceiver(r *bufio.Reader, id uint64, d direction) *receiver {
	return &receiver{r: r, sum: sha256.New(), start: place(id, d)}
}

// next reads and verifies one frame. io.EOF is an end between frames.
func (r *receiver) next() (header, error) {
	var b [headerSize]byte
	if _, err := io.ReadFull(r.r, b[:]); err != nil {
		return header{}, err
	}
	if r.ended {
		return header{}, fmt.Errorf("bytes after the end of the stream: % x: %w", b, ErrCorrupt)
	}
	h, err := parseHeader(b[:])
	if err != nil {
		return h, err
	}
	switch h.typ {
	case frameOpen:
		if h.len != 0 {
			return h, fmt.Errorf("open frame with %d bytes: %w", h.len, ErrCorrupt)
		}
		r.sum.Write(b[:])
	case frameData:
		if h.a != r.received || h.len > maxFrame {
			return h, fmt.Errorf("data frame for offset %d of %d bytes, offset %d expected: %w", h.a, h.len, r.received, ErrCorrupt)
		}
		r.sum.Write(b[:])
		err = r.payload(int(h.len))
	case frameEnd:
		var got [sha256.Size]byte
		if _, err := io.ReadFull(r.r, got[:]); err != nil {
			return h, truncated(err)
		}
		if h.a != r.received || !bytes.Equal(got[:], r.sum.Sum(nil)) {
			return h, fmt.Errorf("stream of %d bytes with SHA-256 %x, received %d with %x: %w", h.a, got, r.received, r.sum.Sum(nil), ErrCorrupt)
		}
		r.ended = true
	default:
		return h, fmt.Errorf("frame of type %d: %w", h.typ, ErrCorrupt)
	}
	return h, err
}

// payload compares n bytes with the content.
func (r *receiver) payload(n int) error {
	for n > 0 {
		if r.r.Buffered() == 0 {
			if _, err := r.r.Peek(1); err != nil {
				return truncated(err)
			}
		}
		b, err := r.r.Peek(min(n, r.r.Buffered()))
		if err != nil {
			return truncated(err)
		}
		at := (r.start + int(r.received%period)) % period
		if want := content()[at : at+len(b)]; !bytes.Equal(b, want) {
			i := 0
			for b[i] == want[i] {
				i++
			}
			return fmt.Errorf("byte %d of the stream is %#02x, not %#02x: %w", r.received+uint64(i), b[i], want[i], ErrCorrupt)
		}
		r.sum.Write(b)
		r.received += uint64(len(b))
		n -= len(b)
		r.r.Discard(len(b))
	}
	return nil
}

// truncated tells an end within a frame from one between frames.
func truncated(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
