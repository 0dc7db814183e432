package wire

import (
	"errors"
	"fmt"
	"io"
	"time"
)

// Stream reads messages and transfers from a connection through one buffer, so that what follows a transfer is not
// lost. It serves the bulk and TLS cases, whose connections have a goroutine each.
type Stream struct {
	rw      io.ReadWriter
	pattern *Pattern
	buf     []byte
	r, w    int // buf[r:w] is unread
}

// NewStream returns a Stream over rw with a read buffer of size bytes (at least MaxHello).
func NewStream(rw io.ReadWriter, p *Pattern, size int) *Stream {
	return &Stream{rw: rw, pattern: p, buf: make([]byte, max(size, MaxHello))}
}

// fill reads until n bytes are buffered.
func (s *Stream) fill(n int) error {
	if s.r > 0 && len(s.buf)-s.r < n {
		s.w = copy(s.buf, s.buf[s.r:s.w])
		s.r = 0
	}
	for s.w-s.r < n {
		got, err := s.rw.Read(s.buf[s.w:])
		s.w += got
		if err != nil && s.w-s.r < n {
			if err == io.EOF && s.w > s.r {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

func (s *Stream) take(n int) []byte {
	b := s.buf[s.r : s.r+n]
	s.r += n
	if s.r == s.w {
		s.r, s.w = 0, 0
	}
	return b
}

// Hello reads one TLS record and returns its bytes, valid until the next call.
func (s *Stream) Hello() ([]byte, error) {
	if err := s.fill(recordHeader); err != nil {
		return nil, err
	}
	n, err := HelloLen(s.buf[s.r:s.w])
	if err != nil {
		return nil, err
	}
	if err := s.fill(n); err != nil {
		return nil, err
	}
	return s.take(n), nil
}

// Read reads one message. io.EOF means that the other end closed between two messages.
func (s *Stream) Read() (Message, error) {
	if err := s.fill(Size); err != nil {
		return Message{}, err
	}
	return Parse(s.take(Size))
}

// Expect reads one message and checks that it is want.
func (s *Stream) Expect(want Message) error {
	if err := s.fill(Size); err != nil {
		return fmt.Errorf("waiting for %+v: %w", want, err)
	}
	return Expect(s.take(Size), want)
}

// Write sends one message.
func (s *Stream) Write(m Message) error {
	var b [Size]byte
	m.Put(b[:])
	_, err := s.rw.Write(b[:])
	return err
}

// CloseWrite tells the other end that nothing follows; reading goes on. Only for TCP and TLS connections.
func (s *Stream) CloseWrite() error {
	c, ok := s.rw.(interface{ CloseWrite() error })
	if !ok {
		return fmt.Errorf("half-closing a %T: %w", s.rw, errors.ErrUnsupported)
	}
	return c.CloseWrite()
}

// ExpectEnd waits for the end of the stream.
func (s *Stream) ExpectEnd() error {
	switch err := s.fill(1); err {
	case io.EOF:
		return nil
	case nil:
		return fmt.Errorf("%d bytes after the end of the transfer: %w", s.w-s.r, ErrCorrupt)
	default:
		return fmt.Errorf("waiting for the end of the stream: %w", err)
	}
}

// Send sends whole quanta of connection conn's pattern, at least one, until d has passed, and returns the number of
// payload bytes.
func (s *Stream) Send(conn uint64, hashed bool, d time.Duration) (uint64, error) {
	snd := NewSender(s.pattern, conn, hashed)
	for end := time.Now().Add(d); ; {
		last := !time.Now().Before(end)
		if err := snd.Next(s.rw, last); err != nil {
			return snd.Bytes(), fmt.Errorf("sending bulk data after %d bytes: %w", snd.Bytes(), err)
		}
		if last {
			return snd.Bytes(), nil
		}
	}
}

// Receive reads and verifies a transfer of connection conn and returns the number of payload bytes.
func (s *Stream) Receive(conn uint64, hashed bool) (uint64, error) {
	rcv := NewReceiver(s.pattern, conn, hashed)
	for {
		n, err := rcv.Feed(s.buf[s.r:s.w])
		if err != nil {
			return rcv.Bytes(), err
		}
		s.take(n)
		if rcv.Done() {
			return rcv.Bytes(), nil
		}
		if err := s.fill(1); err != nil {
			return rcv.Bytes(), fmt.Errorf("receiving bulk data after %d verified bytes: %w", rcv.Bytes(), err)
		}
	}
}
