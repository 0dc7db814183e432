package wire

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
)

// Direction of a bulk transfer, seen from the client.
type Direction uint64

// Directions, and flags added to them in BulkOpen. HashFlag makes both ends compute SHA-256 as well.
const (
	Down   Direction = 0 // backend sends
	Up     Direction = 1 // client sends
	Duplex Direction = 2 // both send at once

	HashFlag = 1 << 8
	// HalfCloseFlag makes each end close its sending side right after its last byte, while the other may go on; the
	// end of the stream then stands for the receipt.
	HalfCloseFlag = 1 << 9
)

// QuantumSize is the payload of one piece of bulk data in bytes.
const QuantumSize = 256 << 10

// period of the pattern in bytes. It shares no factor with QuantumSize or with the 16 KiB and 64 KiB chunks gateways
// move, so a lost, repeated or swapped chunk shows as wrong content.
const period = QuantumSize + 4099

// Pattern is the content of bulk transfers: pseudo-random bytes repeated with a period, entered by every connection
// at a place of its own. It is read-only and may be shared by goroutines.
type Pattern struct{ b []byte }

// NewPattern computes the pattern. It costs about half a millisecond and half a megabyte.
func NewPattern() *Pattern {
	b := make([]byte, period+QuantumSize)
	for i := 0; i < period; i += 8 {
		var w [8]byte
		binary.LittleEndian.PutUint64(w[:], mix(uint64(i)))
		copy(b[i:period], w[:])
	}
	for n := period; n < len(b); n += copy(b[n:], b[:period]) {
	}
	return &Pattern{b: b}
}

// at returns the n bytes (at most QuantumSize) at offset off of connection conn's stream.
func (p *Pattern) at(conn, off uint64, n int) []byte {
	start := (conn*7919*64 + off) % period
	return p.b[start : start+uint64(n)]
}

// Sender produces one direction of a bulk transfer.
type Sender struct {
	pattern *Pattern
	conn    uint64
	seq     uint64
	off     uint64
	sum     hash.Hash
}

// NewSender returns a sender for connection conn. With hashed the stream ends with its SHA-256.
func NewSender(p *Pattern, conn uint64, hashed bool) *Sender {
	s := &Sender{pattern: p, conn: conn}
	if hashed {
		s.sum = sha256.New()
	}
	return s
}

// Next writes one quantum to w, marked as the last one if last is set.
func (s *Sender) Next(w io.Writer, last bool) error {
	var h [Size]byte
	m := Message{Kind: Quantum, Conn: s.conn, Seq: s.seq, A: QuantumSize}
	if last {
		m.B = 1
	}
	m.Put(h[:])
	if _, err := w.Write(h[:]); err != nil {
		return err
	}
	payload := s.pattern.at(s.conn, s.off, QuantumSize)
	if _, err := w.Write(payload); err != nil {
		return err
	}
	s.seq++
	s.off += QuantumSize
	if s.sum == nil {
		return nil
	}
	s.sum.Write(payload)
	if last {
		_, err := w.Write(s.sum.Sum(nil))
		return err
	}
	return nil
}

// Bytes returns the number of payload bytes sent.
func (s *Sender) Bytes() uint64 { return s.off }

// Receiver verifies one direction of a bulk transfer, fed with the stream in pieces of any size.
type Receiver struct {
	pattern *Pattern
	conn    uint64
	seq     uint64
	off     uint64 // payload bytes verified
	left    int    // payload bytes missing of this quantum
	last    bool
	done    bool
	head    [Size]byte
	have    int // bytes in head, or of the SHA-256 after the last quantum
	sum     hash.Hash
}

// NewReceiver returns a receiver for what NewSender with the same arguments sends.
func NewReceiver(p *Pattern, conn uint64, hashed bool) *Receiver {
	r := &Receiver{pattern: p, conn: conn}
	if hashed {
		r.sum = sha256.New()
	}
	return r
}

// Feed verifies the next bytes of the stream and returns how many of them belong to the transfer: all of b, or fewer
// when it ended. Errors wrap ErrCorrupt and name the offset of the first wrong byte.
func (r *Receiver) Feed(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 && !r.done {
		switch {
		case r.left > 0:
			n := min(len(b), r.left)
			want := r.pattern.at(r.conn, r.off, n)
			if !bytes.Equal(b[:n], want) {
				i := 0
				for b[i] == want[i] {
					i++
				}
				return 0, fmt.Errorf("connection %d: byte %d of the transfer is %#02x instead of %#02x: %w",
					r.conn, r.off+uint64(i), b[i], want[i], ErrCorrupt)
			}
			if r.sum != nil {
				r.sum.Write(b[:n])
			}
			r.left -= n
			r.off += uint64(n)
			b = b[n:]
			r.done = r.last && r.left == 0 && r.sum == nil
		case r.last:
			n := copy(r.head[r.have:sha256.Size], b)
			r.have += n
			b = b[n:]
			if r.have == sha256.Size {
				if !bytes.Equal(r.head[:sha256.Size], r.sum.Sum(nil)) {
					return 0, fmt.Errorf("connection %d: SHA-256 over %d bytes differs from the sender's: %w", r.conn, r.off, ErrCorrupt)
				}
				r.done = true
			}
		default:
			n := copy(r.head[r.have:], b)
			r.have += n
			b = b[n:]
			if r.have < Size {
				continue
			}
			m, err := Parse(r.head[:])
			if err != nil {
				return 0, fmt.Errorf("connection %d at byte %d of the transfer: %w", r.conn, r.off, err)
			}
			if m.Kind != Quantum || m.Conn != r.conn || m.Seq != r.seq || m.A != QuantumSize {
				return 0, fmt.Errorf("connection %d at byte %d of the transfer: piece %d expected, got %+v: %w", r.conn, r.off, r.seq, m, ErrCorrupt)
			}
			r.seq++
			r.left, r.last, r.have = QuantumSize, m.B == 1, 0
		}
	}
	return total - len(b), nil
}

// Done reports whether the whole transfer has arrived.
func (r *Receiver) Done() bool { return r.done }

// Bytes returns the number of payload bytes verified so far.
func (r *Receiver) Bytes() uint64 { return r.off }
