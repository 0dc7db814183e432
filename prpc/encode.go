package prpc

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Marshal renders a message as compact JSON in the mapping of gateway spec 2.3:
// every field in declaration order under its proto name, 64-bit integers as
// numbers, bytes as lower-case hex, absent messages and optionals as null,
// absent repeated as []. Map keys are sorted, so equal messages give equal
// bytes. Code points beyond ASCII are escaped: some SDKs count characters where
// Content-Length counts bytes (guest spec 2.5). Empty is null.
//
// It fails only for message types with groups or oneofs.
func Marshal(m proto.Message) ([]byte, error) {
	r := m.ProtoReflect()
	if err := checkMapping(r.Descriptor(), nil); err != nil {
		return nil, fmt.Errorf("encode JSON: %w", err)
	}
	return appendMessage(nil, r), nil
}

func appendMessage(b []byte, m protoreflect.Message) []byte {
	md := m.Descriptor()
	if md.FullName() == emptyName {
		return append(b, "null"...)
	}
	b = append(b, '{')
	fields := md.Fields()
	first := true
	for i := range fields.Len() {
		fd := fields.Get(i)
		has := m.Has(fd)
		if !has && omitEmpty(fd) {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(b, '"')
		b = append(b, fd.Name()...) // an identifier: nothing to escape
		b = append(b, `":`...)
		switch {
		case fd.IsMap():
			b = appendMap(b, fd, m.Get(fd).Map())
		case fd.IsList():
			b = appendList(b, fd, m.Get(fd).List())
		case fd.HasPresence() && !has:
			b = append(b, "null"...)
		default:
			b = appendValue(b, fd, m.Get(fd))
		}
	}
	return append(b, '}')
}

func appendList(b []byte, fd protoreflect.FieldDescriptor, l protoreflect.List) []byte {
	b = append(b, '[')
	for i := range l.Len() {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendValue(b, fd, l.Get(i))
	}
	return append(b, ']')
}

func appendMap(b []byte, fd protoreflect.FieldDescriptor, m protoreflect.Map) []byte {
	keys := make([]protoreflect.MapKey, 0, m.Len())
	for k := range m.Range {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(x, y protoreflect.MapKey) int { return compareKeys(fd.MapKey(), x, y) })
	b = append(b, '{')
	for i, k := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, k.String()) // decimal for integers
		b = append(b, ':')
		b = appendValue(b, fd.MapValue(), m.Get(k))
	}
	return append(b, '}')
}

func compareKeys(fd protoreflect.FieldDescriptor, x, y protoreflect.MapKey) int {
	switch fd.Kind() {
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind,
		protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return cmp.Compare(x.Int(), y.Int())
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return cmp.Compare(x.Uint(), y.Uint())
	default:
		return cmp.Compare(x.String(), y.String())
	}
}

func appendValue(b []byte, fd protoreflect.FieldDescriptor, v protoreflect.Value) []byte {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return strconv.AppendBool(b, v.Bool())
	case protoreflect.EnumKind:
		return strconv.AppendInt(b, int64(v.Enum()), 10)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind,
		protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return strconv.AppendInt(b, v.Int(), 10)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(b, v.Uint(), 10)
	case protoreflect.FloatKind:
		return appendFloat(b, v.Float(), 32)
	case protoreflect.DoubleKind:
		return appendFloat(b, v.Float(), 64)
	case protoreflect.StringKind:
		return appendString(b, v.String())
	case protoreflect.BytesKind:
		b = append(b, '"')
		b = hex.AppendEncode(b, v.Bytes())
		return append(b, '"')
	default: // messages; groups were refused
		return appendMessage(b, v.Message())
	}
}

// appendFloat writes null for what JSON cannot say.
func appendFloat(b []byte, f float64, bits int) []byte {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return append(b, "null"...)
	}
	return strconv.AppendFloat(b, f, 'g', -1, bits)
}

const hexDigits = "0123456789abcdef"

// appendString writes a JSON string of ASCII characters only.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	clean := 0 // start of what was looked at and needs no escape
	for i := 0; i < len(s); {
		c := s[i]
		if c >= 0x20 && c < utf8.RuneSelf && c != '"' && c != '\\' {
			i++
			continue
		}
		b = append(b, s[clean:i]...)
		if c < utf8.RuneSelf {
			b = appendEscaped(b, c)
			i++
		} else {
			r, n := utf8.DecodeRuneInString(s[i:]) // U+FFFD for invalid bytes
			if r > 0xffff {
				r -= 0x10000
				b = appendUnit(b, 0xd800+uint16(r>>10))
				b = appendUnit(b, 0xdc00+uint16(r&0x3ff))
			} else {
				b = appendUnit(b, uint16(r))
			}
			i += n
		}
		clean = i
	}
	b = append(b, s[clean:]...)
	return append(b, '"')
}

func appendEscaped(b []byte, c byte) []byte {
	switch c {
	case '"', '\\':
		return append(b, '\\', c)
	case '\b':
		return append(b, `\b`...)
	case '\f':
		return append(b, `\f`...)
	case '\n':
		return append(b, `\n`...)
	case '\r':
		return append(b, `\r`...)
	case '\t':
		return append(b, `\t`...)
	default:
		return appendUnit(b, uint16(c))
	}
}

// appendUnit writes one UTF-16 code unit as an escape.
func appendUnit(b []byte, u uint16) []byte {
	return append(b, '\\', 'u', hexDigits[u>>12], hexDigits[u>>8&0xf], hexDigits[u>>4&0xf], hexDigits[u&0xf])
}
