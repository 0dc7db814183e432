package prpc

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Unmarshal reads the JSON form that Marshal writes into a fresh message.
//
// A missing field keeps its default and an unknown field is ignored. null means
// absent for messages and optionals and is an error anywhere else, and so are
// wrong types, numbers that do not fit, bytes that are not hex (any number of
// leading 0x is removed), a field given twice, nesting beyond 64 levels and
// anything behind the object. Empty accepts every input unread.
//
// Errors name the field and the position, never the value: it may be a secret.
func Unmarshal(data []byte, m proto.Message) error {
	r := m.ProtoReflect()
	if r.Descriptor().FullName() == emptyName {
		return nil
	}
	if err := checkMapping(r.Descriptor(), nil); err != nil {
		return err
	}
	d := decoder{data: data}
	d.space()
	if err := d.message(r, 0); err != nil {
		return err
	}
	d.space()
	if d.pos != len(d.data) {
		return d.errorf("data behind the object")
	}
	return nil
}

// decoder reads one JSON text (RFC 8259) without building a tree of it.
type decoder struct {
	data []byte
	pos  int
}

func (d *decoder) errorf(format string, args ...any) error {
	return fmt.Errorf(format+" at byte %d", append(args, d.pos)...)
}

// peek gives the next byte, 0 at the end. A NUL in the input begins no token,
// so the two cannot be confused.
func (d *decoder) peek() byte {
	if d.pos < len(d.data) {
		return d.data[d.pos]
	}
	return 0
}

func (d *decoder) space() {
	for d.pos < len(d.data) {
		switch d.data[d.pos] {
		case ' ', '\t', '\n', '\r':
			d.pos++
		default:
			return
		}
	}
}

// found names what is at the current position, for errors.
func (d *decoder) found() string {
	switch c := d.peek(); {
	case d.pos >= len(d.data):
		return "the end"
	case c == '{':
		return "an object"
	case c == '[':
		return "an array"
	case c == '"':
		return "a string"
	case c == '-' || c >= '0' && c <= '9':
		return "a number"
	case c == 't' || c == 'f':
		return "a boolean"
	case c == 'n':
		return "null"
	default:
		return "something that is not JSON"
	}
}

func (d *decoder) expected(what string) error {
	return d.errorf("expected %s, found %s", what, d.found())
}

// word consumes a literal if it is there. What follows it is judged by the
// caller, who needs a comma or a bracket.
func (d *decoder) word(w string) bool {
	if len(d.data)-d.pos >= len(w) && string(d.data[d.pos:d.pos+len(w)]) == w {
		d.pos += len(w)
		return true
	}
	return false
}

// object walks the members of an object; value must consume the member's value.
func (d *decoder) object(depth int, value func(key string) error) error {
	if depth >= maxDepth {
		return d.errorf("nested deeper than %d levels", maxDepth)
	}
	if d.peek() != '{' {
		return d.expected("an object")
	}
	d.pos++
	d.space()
	if d.peek() == '}' {
		d.pos++
		return nil
	}
	for {
		if d.peek() != '"' {
			return d.expected("a member name")
		}
		key, err := d.string()
		if err != nil {
			return err
		}
		d.space()
		if d.peek() != ':' {
			return d.errorf("expected a colon")
		}
		d.pos++
		d.space()
		if err := value(key); err != nil {
			return err
		}
		d.space()
		switch d.peek() {
		case ',':
			d.pos++
			d.space()
		case '}':
			d.pos++
			return nil
		default:
			return d.errorf("expected a comma or the end of an object")
		}
	}
}

// array walks the elements of an array.
func (d *decoder) array(depth int, value func(i int) error) error {
	if depth >= maxDepth {
		return d.errorf("nested deeper than %d levels", maxDepth)
	}
	if d.peek() != '[' {
		return d.expected("an array")
	}
	d.pos++
	d.space()
	if d.peek() == ']' {
		d.pos++
		return nil
	}
	for i := 0; ; i++ {
		if err := value(i); err != nil {
			return err
		}
		d.space()
		switch d.peek() {
		case ',':
			d.pos++
			d.space()
		case ']':
			d.pos++
			return nil
		default:
			return d.errorf("expected a comma or the end of an array")
		}
	}
}

// skip consumes a value of any type.
func (d *decoder) skip(depth int) error {
	switch c := d.peek(); {
	case c == '{':
		return d.object(depth, func(string) error { return d.skip(depth + 1) })
	case c == '[':
		return d.array(depth, func(int) error { return d.skip(depth + 1) })
	case c == '"':
		_, err := d.string()
		return err
	case c == '-' || c >= '0' && c <= '9':
		_, _, err := d.number()
		return err
	case d.word("true"), d.word("false"), d.word("null"):
		return nil
	default:
		return d.expected("a value")
	}
}

// number consumes a number and returns its text and whether it is written as an
// integer.
func (d *decoder) number() (text string, integer bool, err error) {
	start := d.pos
	digits := func() bool {
		from := d.pos
		for c := d.peek(); c >= '0' && c <= '9'; c = d.peek() {
			d.pos++
		}
		return d.pos > from
	}
	if d.peek() == '-' {
		d.pos++
	}
	switch c := d.peek(); {
	case c == '0':
		d.pos++
	case !digits():
		return "", false, d.errorf("malformed number")
	}
	integer = true
	if d.peek() == '.' {
		integer = false
		d.pos++
		if !digits() {
			return "", false, d.errorf("malformed number")
		}
	}
	if c := d.peek(); c == 'e' || c == 'E' {
		integer = false
		d.pos++
		if c := d.peek(); c == '+' || c == '-' {
			d.pos++
		}
		if !digits() {
			return "", false, d.errorf("malformed number")
		}
	}
	return string(d.data[start:d.pos]), integer, nil
}

// string consumes a string. Invalid UTF-8 and half surrogate pairs are errors:
// neither can be put into a protobuf string.
func (d *decoder) string() (string, error) {
	d.pos++ // the opening quote, seen by the caller
	start := d.pos
	var built []byte // used from the first escape on
	for {
		if d.pos >= len(d.data) {
			return "", d.errorf("unterminated string")
		}
		switch c := d.data[d.pos]; {
		case c == '"':
			s := d.data[start:d.pos]
			if built != nil {
				s = append(built, s...)
			}
			if !utf8.Valid(s) {
				return "", d.errorf("string is not valid UTF-8, ending")
			}
			d.pos++
			return string(s), nil
		case c == '\\':
			built = append(built, d.data[start:d.pos]...)
			d.pos++
			var err error
			if built, err = d.escape(built); err != nil {
				return "", err
			}
			start = d.pos
		case c < 0x20:
			return "", d.errorf("control character in a string")
		default:
			d.pos++
		}
	}
}

// escape consumes what follows a backslash.
func (d *decoder) escape(b []byte) ([]byte, error) {
	c := d.peek()
	if c == 'u' {
		return d.unicode(b)
	}
	i := strings.IndexByte(`"\/bfnrt`, c)
	if i < 0 {
		return nil, d.errorf("unknown escape in a string")
	}
	d.pos++
	return append(b, "\"\\/\b\f\n\r\t"[i]), nil
}

// unicode consumes uXXXX, twice for a surrogate pair.
func (d *decoder) unicode(b []byte) ([]byte, error) {
	u, err := d.unit()
	if err != nil {
		return nil, err
	}
	r := rune(u)
	if u >= 0xd800 && u <= 0xdfff {
		if u >= 0xdc00 || !d.word(`\`) {
			return nil, d.errorf("half a surrogate pair in a string")
		}
		low, err := d.unit()
		if err != nil {
			return nil, err
		}
		if low < 0xdc00 || low > 0xdfff {
			return nil, d.errorf("half a surrogate pair in a string")
		}
		r = (r-0xd800)<<10 + rune(low) - 0xdc00 + 0x10000
	}
	return utf8.AppendRune(b, r), nil
}

func (d *decoder) unit() (uint16, error) {
	if !d.word("u") || len(d.data)-d.pos < 4 {
		return 0, d.errorf("malformed escape in a string")
	}
	var b [2]byte
	if _, err := hex.Decode(b[:], d.data[d.pos:d.pos+4]); err != nil {
		return 0, d.errorf("malformed escape in a string")
	}
	d.pos += 4
	return uint16(b[0])<<8 | uint16(b[1]), nil
}

// fieldSet remembers which fields of a message were seen.
type fieldSet struct {
	low  uint64
	high map[int]bool
}

// add reports false when i is in the set already.
func (s *fieldSet) add(i int) bool {
	if i < 64 {
		seen := s.low&(1<<i) != 0
		s.low |= 1 << i
		return !seen
	}
	if s.high[i] {
		return false
	}
	if s.high == nil {
		s.high = make(map[int]bool)
	}
	s.high[i] = true
	return true
}

func (d *decoder) message(m protoreflect.Message, depth int) error {
	fields := m.Descriptor().Fields()
	var seen fieldSet
	return d.object(depth, func(key string) error {
		fd := fields.ByName(protoreflect.Name(key))
		if fd == nil {
			return d.skip(depth + 1)
		}
		if !seen.add(fd.Index()) {
			return d.errorf("%s: given twice", fd.Name())
		}
		if err := d.field(m, fd, depth+1); err != nil {
			return fmt.Errorf("%s: %w", fd.Name(), err)
		}
		return nil
	})
}

func (d *decoder) field(m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) error {
	switch {
	case fd.IsMap():
		return d.mapField(m.Mutable(fd).Map(), fd, depth)
	case fd.IsList():
		list := m.Mutable(fd).List()
		return d.array(depth, func(i int) error {
			v, err := d.value(fd, list.NewElement, depth+1)
			if err != nil {
				return fmt.Errorf("[%d]: %w", i, err)
			}
			list.Append(v)
			return nil
		})
	case fd.HasPresence() && d.word("null"):
		return nil
	}
	v, err := d.value(fd, func() protoreflect.Value { return m.NewField(fd) }, depth)
	if err != nil {
		return err
	}
	m.Set(fd, v)
	return nil
}

func (d *decoder) mapField(m protoreflect.Map, fd protoreflect.FieldDescriptor, depth int) error {
	return d.object(depth, func(key string) error {
		k, err := parseScalar(fd.MapKey(), key)
		if err != nil {
			return d.errorf("member name: %w", err)
		}
		if m.Has(k.MapKey()) {
			return d.errorf("member given twice")
		}
		v, err := d.value(fd.MapValue(), m.NewValue, depth+1)
		if err != nil {
			return fmt.Errorf("member value: %w", err)
		}
		m.Set(k.MapKey(), v)
		return nil
	})
}

// value reads one value of the field's element type. fresh makes the message
// that a message-typed value is read into.
func (d *decoder) value(fd protoreflect.FieldDescriptor, fresh func() protoreflect.Value, depth int) (protoreflect.Value, error) {
	var none protoreflect.Value
	switch fd.Kind() {
	case protoreflect.MessageKind:
		v := fresh()
		if v.Message().Descriptor().FullName() == emptyName {
			return v, d.skip(depth)
		}
		return v, d.message(v.Message(), depth)
	case protoreflect.BoolKind:
		switch {
		case d.word("true"):
			return protoreflect.ValueOfBool(true), nil
		case d.word("false"):
			return protoreflect.ValueOfBool(false), nil
		}
		return none, d.expected("a boolean")
	case protoreflect.StringKind, protoreflect.BytesKind:
		if d.peek() != '"' {
			return none, d.expected("a string")
		}
		s, err := d.string()
		if err != nil {
			return none, err
		}
		v, err := parseScalar(fd, s)
		if err != nil {
			return none, d.errorf("%w, ending", err)
		}
		return v, nil
	default: // numbers
		if c := d.peek(); c != '-' && (c < '0' || c > '9') {
			return none, d.expected("a number")
		}
		text, integer, err := d.number()
		if err != nil {
			return none, err
		}
		// What is written as -0 is a floating point number to upstream.
		if isInteger(fd) && (!integer || text == "-0") {
			return none, d.errorf("%w, ending", errNotInteger)
		}
		v, err := parseScalar(fd, text)
		if err != nil {
			return none, d.errorf("%w, ending", err)
		}
		return v, nil
	}
}

var (
	errNotInteger = errors.New("not an integer")
	errRange      = errors.New("number out of range")
	errHex        = errors.New("not an even number of hexadecimal digits")
	errUTF8       = errors.New("not valid UTF-8")
	errBool       = errors.New("neither true nor false")
	errNumber     = errors.New("not a number")
)

func isInteger(fd protoreflect.FieldDescriptor) bool {
	return fd.Kind() != protoreflect.FloatKind && fd.Kind() != protoreflect.DoubleKind
}

// parseScalar reads the text of a string, of a number, or of a scalar in a
// query or a map key.
func parseScalar(fd protoreflect.FieldDescriptor, s string) (protoreflect.Value, error) {
	var none protoreflect.Value
	switch fd.Kind() {
	case protoreflect.BoolKind:
		switch s {
		case "true":
			return protoreflect.ValueOfBool(true), nil
		case "false":
			return protoreflect.ValueOfBool(false), nil
		}
		return none, errBool
	case protoreflect.StringKind:
		if !utf8.ValidString(s) {
			return none, errUTF8
		}
		return protoreflect.ValueOfString(s), nil
	case protoreflect.BytesKind:
		b, err := decodeHex(s)
		if err != nil {
			return none, err
		}
		return protoreflect.ValueOfBytes(b), nil
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		n, err := strconv.ParseInt(s, 10, 32)
		return protoreflect.ValueOfInt32(int32(n)), numberError(err)
	case protoreflect.EnumKind:
		n, err := strconv.ParseInt(s, 10, 32)
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(n)), numberError(err)
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		n, err := strconv.ParseInt(s, 10, 64)
		return protoreflect.ValueOfInt64(n), numberError(err)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		n, err := parseUint(s, 32)
		return protoreflect.ValueOfUint32(uint32(n)), err
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		n, err := parseUint(s, 64)
		return protoreflect.ValueOfUint64(n), err
	case protoreflect.FloatKind:
		f, err := strconv.ParseFloat(s, 32)
		return protoreflect.ValueOfFloat32(float32(f)), numberError(err)
	case protoreflect.DoubleKind:
		f, err := strconv.ParseFloat(s, 64)
		return protoreflect.ValueOfFloat64(f), numberError(err)
	default:
		return none, errors.New("a message where a scalar is wanted")
	}
}

func parseUint(s string, bits int) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, bits)
	if err != nil && strings.HasPrefix(s, "-") {
		return 0, errRange
	}
	return n, numberError(err)
}

// numberError drops the offending text from a strconv error.
func numberError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, strconv.ErrRange):
		return errRange
	default:
		return errNumber
	}
}

// decodeHex reads hex of either case behind any number of 0x (not 0X).
func decodeHex(s string) ([]byte, error) {
	for strings.HasPrefix(s, "0x") {
		s = s[2:]
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil, errHex
	}
	return b, nil
}
