package clienthello

import (
	"errors"
	"unicode/utf8"
)

const (
	// MaxSize is the number of client bytes SNI looks at: 16 KiB of handshake
	// message and the headers of sixteen records. A buffer of this size is
	// enough for every caller: once it is full SNI no longer answers
	// ErrIncomplete.
	MaxSize = 16384 + 16*recordHeaderSize

	// MaxNameSize is the longest server name returned, in bytes. A dst of this
	// capacity is never grown.
	MaxNameSize = 255

	recordHeaderSize    = 5
	recordTypeHandshake = 22
	helloTypeClient     = 1
	extServerName       = 0
	nameTypeHost        = 0
)

// Errors of SNI. Only ErrIncomplete can be cured by more bytes.
var (
	ErrIncomplete = errors.New("client hello is incomplete")
	ErrNotTLS     = errors.New("not a TLS handshake record")
	ErrNoSNI      = errors.New("client hello carries no server name")
	ErrMalformed  = errors.New("malformed client hello")
	ErrTooLarge   = errors.New("no server name within the size limit of a client hello")
)

// errRecords says that the record layer contradicts itself. It never leaves the
// package.
var errRecords = errors.New("inconsistent records")

// SNI looks for the host name of the server_name extension (RFC 6066 3) in b,
// all the bytes the client has sent so far. The name is appended to dst[:0] with
// its ASCII letters folded to lower case and without one trailing dot; it is
// valid UTF-8 of 1 to MaxNameSize bytes. Nothing is allocated when dst has a
// capacity of MaxNameSize.
//
// The errors are ErrIncomplete, ErrNotTLS, ErrNoSNI, ErrMalformed and
// ErrTooLarge, returned as they are.
//
// The hello may be split over any number of records. Versions are not looked
// at and declared lengths do not end the search (gateway spec 4.2): they only
// tell a hello that has no name from one that is still arriving.
func SNI(b []byte, dst []byte) ([]byte, error) {
	full := len(b) >= MaxSize
	if full {
		b = b[:MaxSize]
	}
	if len(b) == 0 {
		return nil, ErrIncomplete
	}
	if b[0] != recordTypeHandshake {
		return nil, ErrNotTLS
	}
	c := cursor{b: b}
	name, err := c.serverName(dst)
	if err == errRecords {
		// No TLS stack completes a handshake with such a client, but the peers we
		// replace do not read record lengths at all and would have routed it.
		c = cursor{b: b, flat: true}
		name, err = c.serverName(dst)
	}
	if err == ErrIncomplete && full {
		err = ErrTooLarge
	}
	return name, err
}

// cursor reads the handshake stream inside b. Record headers are stepped over
// where the lengths of the records put them or, when flat is set, taken to be
// absent after the first one.
type cursor struct {
	b    []byte
	flat bool

	off  int // next byte of b
	left int // bytes of the current record not consumed yet
	pos  int // handshake bytes consumed
}

// fill makes at least one byte of the handshake stream available to take,
// entering the next record if needed.
func (c *cursor) fill() error {
	if c.left == 0 {
		h := c.b[c.off:]
		if len(h) > 0 && h[0] != recordTypeHandshake {
			return errRecords
		}
		if len(h) < recordHeaderSize {
			return ErrIncomplete
		}
		c.off += recordHeaderSize
		switch c.left = int(h[3])<<8 | int(h[4]); {
		case c.flat:
			c.left = MaxSize
		case c.left == 0:
			return errRecords // RFC 8446 5.1 forbids empty handshake fragments
		}
	}
	if c.off == len(c.b) {
		return ErrIncomplete
	}
	return nil
}

// take consumes up to n of the bytes that fill made available.
func (c *cursor) take(n int) []byte {
	n = min(n, c.left, len(c.b)-c.off)
	part := c.b[c.off : c.off+n]
	c.off += n
	c.left -= n
	c.pos += n
	return part
}

func (c *cursor) skip(n int) error {
	for n > 0 {
		if err := c.fill(); err != nil {
			return err
		}
		n -= len(c.take(n))
	}
	return nil
}

// uint reads a big-endian number of size bytes.
func (c *cursor) uint(size int) (int, error) {
	v := 0
	for range size {
		if err := c.fill(); err != nil {
			return 0, err
		}
		v = v<<8 | int(c.take(1)[0])
	}
	return v, nil
}

// skipVector skips a vector whose length is written in size bytes.
func (c *cursor) skipVector(size int) error {
	n, err := c.uint(size)
	if err != nil {
		return err
	}
	return c.skip(n)
}

// serverName walks the hello, from its first record header on.
func (c *cursor) serverName(dst []byte) ([]byte, error) {
	typ, err := c.uint(1)
	if err != nil {
		return nil, err
	}
	if typ != helloTypeClient {
		return nil, ErrMalformed
	}
	n, err := c.uint(3)
	if err != nil {
		return nil, err
	}
	end := c.pos + n
	name, err := c.extensions(dst)
	if (err == ErrIncomplete || err == errRecords) && c.pos >= end {
		// The hello is over. What follows it, early data for example, is no part of
		// the search and nothing to wait for.
		return nil, ErrNoSNI
	}
	return name, err
}

// extensions walks from the version of the hello to its host name. It runs until
// the bytes do, whatever the lengths say.
func (c *cursor) extensions(dst []byte) ([]byte, error) {
	if err := c.skip(2 + 32); err != nil { // version, random
		return nil, err
	}
	for _, size := range [...]int{1, 2, 1} { // session id, cipher suites, compression methods
		if err := c.skipVector(size); err != nil {
			return nil, err
		}
	}
	if err := c.skip(2); err != nil { // length of all extensions
		return nil, err
	}
	for {
		typ, err := c.uint(2)
		if err != nil {
			return nil, err
		}
		if typ != extServerName {
			if err := c.skipVector(2); err != nil {
				return nil, err
			}
			continue
		}
		name, err := c.hostName(dst)
		if name != nil || err != nil {
			return name, err
		}
	}
}

// hostName reads a server_name extension from its length on. It returns nil when
// the extension holds names of other types only.
func (c *cursor) hostName(dst []byte) ([]byte, error) {
	n, err := c.uint(2)
	if err != nil {
		return nil, err
	}
	end := c.pos + n
	if err := c.skip(2); err != nil { // length of the list
		return nil, err
	}
	for {
		typ, err := c.uint(1)
		if err != nil {
			return nil, err
		}
		if typ == nameTypeHost {
			return c.name(dst)
		}
		if err := c.skipVector(2); err != nil {
			return nil, err
		}
		if c.pos >= end {
			return nil, nil
		}
	}
}

// name reads one host name from its length on and brings it into the form that
// SNI promises.
func (c *cursor) name(dst []byte) ([]byte, error) {
	n, err := c.uint(2)
	if err != nil {
		return nil, err
	}
	if n == 0 || n > MaxNameSize {
		return nil, ErrMalformed
	}
	name := dst[:0]
	for len(name) < n {
		if err := c.fill(); err != nil {
			return nil, err
		}
		part := c.take(n - len(name))
		name = append(name, part...)
	}
	if !utf8.Valid(name) {
		return nil, ErrMalformed
	}
	if name[n-1] == '.' {
		name = name[:n-1]
	}
	if len(name) == 0 {
		return nil, ErrMalformed
	}
	for i, b := range name {
		if 'A' <= b && b <= 'Z' {
			name[i] = b + ('a' - 'A')
		}
	}
	return name, nil
}
