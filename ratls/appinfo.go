package ratls

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

const (
	// maxAppInfo bounds an encoded AppInfo; real ones have about 400 bytes.
	maxAppInfo = 64 << 10
	// MaxInitScripts is how many init scripts an app can have.
	MaxInitScripts = 5
	// maxSkipDepth bounds what is skipped inside an AppInfo.
	maxSkipDepth = 16
)

// AppInfo tells which app, in which version, runs on what (KMS spec 6.6.3).
type AppInfo struct {
	AppID       []byte // 20 bytes
	ComposeHash []byte // SHA-256 of the app's compose file
	InstanceID  []byte // 20 bytes, or none for apps without instance ids
	DeviceID    []byte // 32 bytes
	// MRSystem and MRAggregated digest the measurements without and with the app.
	MRSystem     [32]byte
	MRAggregated [32]byte
	OSImageHash  []byte
	// KeyProviderInfo is JSON text.
	KeyProviderInfo []byte
	// InitScriptHashes is nil when unknown, which differs from none.
	InitScriptHashes [][32]byte
}

// Encode gives the MessagePack array that goes into a certificate: eight
// elements, which every release can read, and a ninth only when there are init
// script hashes, which releases up to 0.5.11 refuse.
func (a *AppInfo) Encode() []byte {
	n := byte(8)
	if len(a.InitScriptHashes) > 0 {
		n = 9
	}
	b := []byte{0x90 | n}
	for _, field := range [][]byte{
		a.AppID, a.ComposeHash, a.InstanceID, a.DeviceID,
		a.MRSystem[:], a.MRAggregated[:], a.OSImageHash, a.KeyProviderInfo,
	} {
		b = appendBin(b, field)
	}
	if n == 9 {
		b = appendArray(b, len(a.InitScriptHashes))
		for _, h := range a.InitScriptHashes {
			b = appendBin(b, h[:])
		}
	}
	return b
}

func appendBin(b, data []byte) []byte {
	switch n := len(data); {
	case n <= 0xff:
		b = append(b, 0xc4, byte(n))
	case n <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, 0xc5), uint16(n))
	default:
		b = binary.BigEndian.AppendUint32(append(b, 0xc6), uint32(n))
	}
	return append(b, data...)
}

func appendArray(b []byte, n int) []byte {
	if n <= 15 {
		return append(b, 0x90|byte(n))
	}
	return binary.BigEndian.AppendUint16(append(b, 0xdc), uint16(n))
}

// MarshalJSON gives the object that authorization webhooks receive: lower-case
// hex under snake_case names, init_script_hashes null when unknown.
func (a *AppInfo) MarshalJSON() ([]byte, error) {
	var scripts []string
	if a.InitScriptHashes != nil {
		scripts = []string{}
	}
	for _, h := range a.InitScriptHashes {
		scripts = append(scripts, hex.EncodeToString(h[:]))
	}
	return json.Marshal(struct {
		AppID            string   `json:"app_id"`
		ComposeHash      string   `json:"compose_hash"`
		InstanceID       string   `json:"instance_id"`
		DeviceID         string   `json:"device_id"`
		MRSystem         string   `json:"mr_system"`
		MRAggregated     string   `json:"mr_aggregated"`
		OSImageHash      string   `json:"os_image_hash"`
		KeyProviderInfo  string   `json:"key_provider_info"`
		InitScriptHashes []string `json:"init_script_hashes"`
	}{
		hex.EncodeToString(a.AppID), hex.EncodeToString(a.ComposeHash),
		hex.EncodeToString(a.InstanceID), hex.EncodeToString(a.DeviceID),
		hex.EncodeToString(a.MRSystem[:]), hex.EncodeToString(a.MRAggregated[:]),
		hex.EncodeToString(a.OSImageHash), hex.EncodeToString(a.KeyProviderInfo),
		scripts,
	})
}

// DecodeAppInfo reads an AppInfo: an array of eight or more elements, of which
// the ninth may be nil and later ones are skipped, or a map with the names of
// MarshalJSON, of which unknown ones are skipped. Byte fields may be bin or
// arrays of integers. Anything behind the value is an error.
func DecodeAppInfo(data []byte) (*AppInfo, error) {
	if len(data) > maxAppInfo {
		return nil, fmt.Errorf("app info has %d bytes, more than the %d that are read", len(data), maxAppInfo)
	}
	r := msgpackReader{rest: data}
	a := new(AppInfo)
	err := a.read(&r)
	if err == nil && len(r.rest) > 0 {
		err = errors.New("data behind the value")
	}
	if err != nil {
		return nil, fmt.Errorf("malformed app info at byte %d: %w", len(data)-len(r.rest), err)
	}
	return a, nil
}

// appInfoFields are the names of the array's elements, in order.
func appInfoFields() []string {
	return []string{
		"app_id", "compose_hash", "instance_id", "device_id", "mr_system", "mr_aggregated",
		"os_image_hash", "key_provider_info", "init_script_hashes",
	}
}

// mandatoryFields is how many of them every AppInfo has.
const mandatoryFields = 8

func (a *AppInfo) read(r *msgpackReader) error {
	names := appInfoFields()
	n, isMap, err := r.container()
	if err != nil {
		return err
	}
	if !isMap {
		if n < mandatoryFields {
			return fmt.Errorf("%d elements, want at least %d", n, mandatoryFields)
		}
		for i := range n {
			if i >= len(names) {
				err = r.skip(0)
			} else if err = a.field(r, names[i]); err != nil {
				err = fmt.Errorf("%s: %w", names[i], err)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	seen := make(map[string]bool, len(names))
	for range n {
		key, err := r.text()
		if err != nil {
			return err
		}
		if !slices.Contains(names, key) {
			if err := r.skip(0); err != nil {
				return err
			}
			continue
		}
		if seen[key] {
			return fmt.Errorf("%s: given twice", key)
		}
		seen[key] = true
		if err := a.field(r, key); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	for _, name := range names[:mandatoryFields] {
		if !seen[name] {
			return fmt.Errorf("%s: missing", name)
		}
	}
	return nil
}

func (a *AppInfo) field(r *msgpackReader, name string) (err error) {
	switch name {
	case "app_id":
		a.AppID, err = r.bytes()
	case "compose_hash":
		a.ComposeHash, err = r.bytes()
	case "instance_id":
		a.InstanceID, err = r.bytes()
	case "device_id":
		a.DeviceID, err = r.bytes()
	case "mr_system":
		a.MRSystem, err = r.hash()
	case "mr_aggregated":
		a.MRAggregated, err = r.hash()
	case "os_image_hash":
		a.OSImageHash, err = r.bytes()
	case "key_provider_info":
		a.KeyProviderInfo, err = r.bytes()
	case "init_script_hashes":
		a.InitScriptHashes, err = r.hashes()
	}
	return err
}

// msgpackReader reads MessagePack from the front of a slice. Lengths are claims
// of the sender: nothing is allocated by them.
type msgpackReader struct{ rest []byte }

var errShort = errors.New("truncated")

func (r *msgpackReader) take(n uint64) ([]byte, error) {
	if n > uint64(len(r.rest)) {
		return nil, errShort
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b, nil
}

func (r *msgpackReader) tag() (byte, error) {
	b, err := r.take(1)
	if err != nil {
		return 0, err
	}
	return b[0], nil
}

// size reads a big-endian length of n bytes.
func (r *msgpackReader) size(n uint64) (uint64, error) {
	b, err := r.take(n)
	if err != nil {
		return 0, err
	}
	var v uint64
	for _, c := range b {
		v = v<<8 | uint64(c)
	}
	return v, nil
}

// container reads the head of an array or map.
func (r *msgpackReader) container() (n int, isMap bool, err error) {
	tag, err := r.tag()
	if err != nil {
		return 0, false, err
	}
	var v uint64
	switch {
	case tag&0xf0 == 0x90:
		v = uint64(tag & 0x0f)
	case tag&0xf0 == 0x80:
		v, isMap = uint64(tag&0x0f), true
	case tag == 0xdc:
		v, err = r.size(2)
	case tag == 0xdd:
		v, err = r.size(4)
	case tag == 0xde:
		v, err = r.size(2)
		isMap = true
	case tag == 0xdf:
		v, err = r.size(4)
		isMap = true
	default:
		return 0, false, fmt.Errorf("found type 0x%02x, want an array or a map", tag)
	}
	return int(v), isMap, err // at most 32 bits
}

func (r *msgpackReader) text() (string, error) {
	tag, err := r.tag()
	if err != nil {
		return "", err
	}
	var n uint64
	switch {
	case tag&0xe0 == 0xa0:
		n = uint64(tag & 0x1f)
	case tag == 0xd9:
		n, err = r.size(1)
	case tag == 0xda:
		n, err = r.size(2)
	case tag == 0xdb:
		n, err = r.size(4)
	default:
		return "", fmt.Errorf("found type 0x%02x, want a string", tag)
	}
	if err != nil {
		return "", err
	}
	b, err := r.take(n)
	return string(b), err
}

func (r *msgpackReader) bytes() ([]byte, error) {
	if len(r.rest) == 0 {
		return nil, errShort
	}
	var width uint64
	switch r.rest[0] {
	case 0xc4:
		width = 1
	case 0xc5:
		width = 2
	case 0xc6:
		width = 4
	default:
		return r.integers()
	}
	r.rest = r.rest[1:]
	n, err := r.size(width)
	if err != nil {
		return nil, err
	}
	b, err := r.take(n)
	if err != nil {
		return nil, err
	}
	return append([]byte{}, b...), nil
}

// integers reads bytes that are written as an array of integers.
func (r *msgpackReader) integers() ([]byte, error) {
	n, isMap, err := r.container()
	if err != nil || isMap {
		return nil, errors.New("want bytes")
	}
	b := []byte{}
	for range n {
		c, err := r.tag()
		if err != nil {
			return nil, err
		}
		if c > 0x7f {
			if c != 0xcc {
				return nil, errors.New("array element is not a byte")
			}
			if c, err = r.tag(); err != nil {
				return nil, err
			}
		}
		b = append(b, c)
	}
	return b, nil
}

func (r *msgpackReader) hash() (h [32]byte, err error) {
	b, err := r.bytes()
	if err != nil {
		return h, err
	}
	if len(b) != len(h) {
		return h, fmt.Errorf("has %d bytes, want %d", len(b), len(h))
	}
	return [32]byte(b), nil
}

func (r *msgpackReader) hashes() ([][32]byte, error) {
	if len(r.rest) > 0 && r.rest[0] == 0xc0 {
		r.rest = r.rest[1:]
		return nil, nil
	}
	n, isMap, err := r.container()
	if err != nil {
		return nil, err
	}
	if isMap {
		return nil, errors.New("want an array")
	}
	if n > MaxInitScripts {
		return nil, fmt.Errorf("%d hashes, at most %d are allowed", n, MaxInitScripts)
	}
	all := make([][32]byte, n)
	for i := range all {
		if all[i], err = r.hash(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// skip drops one value of any type.
func (r *msgpackReader) skip(depth int) error {
	if depth > maxSkipDepth {
		return fmt.Errorf("nested deeper than %d levels", maxSkipDepth)
	}
	tag, err := r.tag()
	if err != nil {
		return err
	}
	// drop skips n bytes, nested n values; the sized ones read n first.
	drop := func(n uint64) error { _, err := r.take(n); return err }
	sized := func(width, extra uint64) error {
		n, err := r.size(width)
		if err != nil {
			return err
		}
		return drop(n + extra)
	}
	nested := func(n uint64) error {
		for range n {
			if err := r.skip(depth + 1); err != nil {
				return err
			}
		}
		return nil
	}
	nestedSized := func(width, perItem uint64) error {
		n, err := r.size(width)
		if err != nil {
			return err
		}
		return nested(n * perItem)
	}
	switch {
	case tag <= 0x7f, tag >= 0xe0, tag == 0xc0, tag == 0xc2, tag == 0xc3:
		return nil // small integers, nil, booleans
	case tag <= 0x8f:
		return nested(2 * uint64(tag&0x0f))
	case tag <= 0x9f:
		return nested(uint64(tag & 0x0f))
	case tag <= 0xbf:
		return drop(uint64(tag & 0x1f))
	}
	switch tag {
	case 0xc4, 0xd9:
		return sized(1, 0)
	case 0xc5, 0xda:
		return sized(2, 0)
	case 0xc6, 0xdb:
		return sized(4, 0)
	case 0xc7:
		return sized(1, 1) // extensions carry a type byte
	case 0xc8:
		return sized(2, 1)
	case 0xc9:
		return sized(4, 1)
	case 0xcc, 0xd0:
		return drop(1)
	case 0xcd, 0xd1, 0xd4:
		return drop(2)
	case 0xca, 0xce, 0xd2:
		return drop(4)
	case 0xcb, 0xcf, 0xd3:
		return drop(8)
	case 0xd5:
		return drop(3)
	case 0xd6:
		return drop(5)
	case 0xd7:
		return drop(9)
	case 0xd8:
		return drop(17)
	case 0xdc:
		return nestedSized(2, 1)
	case 0xdd:
		return nestedSized(4, 1)
	case 0xde:
		return nestedSized(2, 2)
	case 0xdf:
		return nestedSized(4, 2)
	default: // 0xc1
		return errors.New("found type 0xc1, which does not exist")
	}
}
