package wire

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// One connection carries a hello, messages and two transfers back to back; nothing may get lost between them.
func TestStream(t *testing.T) {
	a, b := net.Pipe()
	p := NewPattern()
	hello, err := Hello("name.test", true)
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan uint64, 2)
	fail := make(chan error, 1)
	go func() {
		fail <- func() error {
			defer a.Close()
			s := NewStream(a, p, 1<<16)
			if _, err := a.Write(hello); err != nil {
				return err
			}
			for i, hashed := range []bool{true, false} {
				if err := s.Write(Message{Kind: BulkStart, Seq: uint64(i)}); err != nil {
					return err
				}
				n, err := s.Send(9, hashed, 5*time.Millisecond)
				if err != nil {
					return err
				}
				sent <- n
			}
			return s.Write(Message{Kind: BulkDone})
		}()
	}()
	s := NewStream(b, p, 1<<18)
	got, err := s.Hello()
	if err != nil || string(got) != string(hello) {
		t.Fatalf("hello of %d bytes, want %d: %v", len(got), len(hello), err)
	}
	for i, hashed := range []bool{true, false} {
		if err := s.Expect(Message{Kind: BulkStart, Seq: uint64(i)}); err != nil {
			t.Fatal(err)
		}
		n, err := s.Receive(9, hashed)
		if want := <-sent; err != nil || n != want || n == 0 {
			t.Fatalf("received %d of %d: %v", n, want, err)
		}
	}
	if m, err := s.Read(); err != nil || m.Kind != BulkDone {
		t.Fatalf("got %+v, %v", m, err)
	}
	if _, err := s.Read(); err != io.EOF {
		t.Fatalf("at the end: %v", err)
	}
	if err := <-fail; err != nil {
		t.Fatal(err)
	}
}

func TestStreamTruncated(t *testing.T) {
	a, b := net.Pipe()
	go func() {
		var m [Size]byte
		Message{Kind: Request}.Put(m[:])
		a.Write(m[:Size/2])
		a.Close()
	}()
	if _, err := NewStream(b, nil, 0).Read(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half a message: %v", err)
	}
}
