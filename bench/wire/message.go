package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Size is the length of every message in bytes: the "64 B" of the request/response cases.
const Size = 64

// Kind says what a message is.
type Kind uint8

// Kinds of messages. A and B are the message's two operands.
const (
	// Request asks for a Reply with the same Conn, Seq, A and B.
	Request Kind = 1 + iota
	// Reply answers a Request.
	Reply
	// HelloAck answers a ClientHello: A is its CRC-32C, B its length in bytes.
	HelloAck
	// BulkOpen prepares a transfer: A is its duration in nanoseconds, B its Direction and flags.
	BulkOpen
	// BulkReady answers BulkOpen.
	BulkReady
	// BulkStart starts the transfer both ends have prepared.
	BulkStart
	// Quantum precedes a piece of bulk payload: Seq counts from 0, A is the payload's length, B is 1 on the last piece.
	Quantum
	// BulkDone is the receiver's receipt: A is the number of payload bytes it verified.
	BulkDone
)

// ErrCorrupt says that received bytes are not what the other end sent.
var ErrCorrupt = errors.New("content damaged on the way")

var magic = [4]byte{'d', 'g', 'w', 'b'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Message is the only fixed frame of the protocol, Size bytes on the wire, little endian:
//
//	0  magic "dgwb"   4 kind   5..7 zero   8 conn   16 seq   24 a   32 b   40..59 filler   60 crc-32c of 0..59
type Message struct {
	Kind Kind
	Conn uint64
	Seq  uint64
	A, B uint64
}

// Put encodes m into b, which must have room for Size bytes.
func (m Message) Put(b []byte) {
	_ = b[Size-1]
	copy(b, magic[:])
	b[4], b[5], b[6], b[7] = byte(m.Kind), 0, 0, 0
	binary.LittleEndian.PutUint64(b[8:], m.Conn)
	binary.LittleEndian.PutUint64(b[16:], m.Seq)
	binary.LittleEndian.PutUint64(b[24:], m.A)
	binary.LittleEndian.PutUint64(b[32:], m.B)
	f := mix(m.Conn ^ m.Seq<<32 ^ uint64(m.Kind))
	binary.LittleEndian.PutUint64(b[40:], f)
	binary.LittleEndian.PutUint64(b[48:], mix(f))
	binary.LittleEndian.PutUint32(b[56:], uint32(f>>16))
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

// Parse decodes the first Size bytes of b. Errors wrap ErrCorrupt.
func Parse(b []byte) (Message, error) {
	if len(b) < Size {
		return Message{}, fmt.Errorf("message of %d bytes, want %d: %w", len(b), Size, ErrCorrupt)
	}
	if [4]byte(b[:4]) != magic {
		return Message{}, fmt.Errorf("message starts with % x instead of % x: %w", b[:4], magic, ErrCorrupt)
	}
	if got, want := crc32.Checksum(b[:60], castagnoli), binary.LittleEndian.Uint32(b[60:]); got != want {
		return Message{}, fmt.Errorf("message CRC is %08x, its sender computed %08x: %w", got, want, ErrCorrupt)
	}
	return Message{
		Kind: Kind(b[4]),
		Conn: binary.LittleEndian.Uint64(b[8:]),
		Seq:  binary.LittleEndian.Uint64(b[16:]),
		A:    binary.LittleEndian.Uint64(b[24:]),
		B:    binary.LittleEndian.Uint64(b[32:]),
	}, nil
}

// Expect parses b and checks that it is the message want. Errors wrap ErrCorrupt.
func Expect(b []byte, want Message) error {
	got, err := Parse(b)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("received message %+v, expected %+v (lost, repeated or of another connection): %w", got, want, ErrCorrupt)
	}
	return nil
}

// Checksum is the CRC-32C a HelloAck carries.
func Checksum(b []byte) uint64 { return uint64(crc32.Checksum(b, castagnoli)) }

// mix is the finalizer of splitmix64: a cheap bijection whose output looks random.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
