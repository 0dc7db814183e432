package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
)

// formatVersion is raised only by changes that an older reader must not take for its own format; new optional fields
// do not raise it.
const formatVersion = 1

// envelope is the form of every value in etcd, the journal and the backup:
//
//	{"v":1,"at":1700000000123,"by":1,"data":{...}}
//
// At is the time of the write in milliseconds since the epoch, forced to grow with every write to a key; it decides
// which of two writes of a key is the later one. By is the node that wrote. Secrets have "sealed" in place of "data".
type envelope struct {
	V      int             `json:"v"`
	At     int64           `json:"at"`
	By     uint32          `json:"by"`
	Data   json.RawMessage `json:"data,omitempty"`
	Sealed []byte          `json:"sealed,omitempty"`
}

// writtenAt returns the time stamp of a value, 0 if there is none to be read.
func writtenAt(value []byte) int64 {
	var e struct {
		At int64 `json:"at"`
	}
	if json.Unmarshal(value, &e) != nil {
		return 0
	}
	return e.At
}

// codec translates between records and values.
type codec struct {
	node uint32
	seal cipher.AEAD // nil: secrets are stored in clear
}

// newCodec derives the sealing key from secret; an empty secret switches sealing off.
func newCodec(node uint32, secret []byte) (*codec, error) {
	c := &codec{node: node}
	if len(secret) == 0 {
		return c, nil
	}
	if len(secret) < 16 {
		return nil, fmt.Errorf("store: the sealing secret has %d bytes, at least 16 are needed", len(secret))
	}
	key, err := hkdf.Key(sha256.New, secret, nil, "dstack-gw-store-v1", 32)
	if err != nil {
		return nil, fmt.Errorf("store: deriving the sealing key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("store: preparing the sealing cipher: %w", err)
	}
	if c.seal, err = cipher.NewGCM(block); err != nil {
		return nil, fmt.Errorf("store: preparing the sealing cipher: %w", err)
	}
	return c, nil
}

func (c *codec) encode(key string, at int64, record any) ([]byte, error) {
	data, err := json.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("store: encoding %s: %w", key, err)
	}
	e := envelope{V: formatVersion, At: at, By: c.node, Data: data}
	if c.seal != nil && sealedKey(key) {
		nonce := make([]byte, c.seal.NonceSize(), c.seal.NonceSize()+len(data)+c.seal.Overhead())
		if _, err := rand.Read(nonce); err != nil {
			return nil, fmt.Errorf("store: sealing %s: %w", key, err)
		}
		// The key is authenticated too: a value cannot be moved to another name.
		e.Data, e.Sealed = nil, c.seal.Seal(nonce, nonce, data, []byte(key))
	}
	value, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("store: encoding %s: %w", key, err)
	}
	return value, nil
}

// decode reads a value into record. Errors name the key and never contain the value.
func (c *codec) decode(key string, value []byte, record any) error {
	var e envelope
	if err := json.Unmarshal(value, &e); err != nil {
		return fmt.Errorf("store: value of %s is not the store's JSON: %w", key, redactJSON(err))
	}
	if e.V != formatVersion {
		return fmt.Errorf("store: value of %s has format version %d, this release reads %d (written by a newer gateway?)", key, e.V, formatVersion)
	}
	data := []byte(e.Data)
	if len(e.Sealed) > 0 {
		if c.seal == nil {
			return fmt.Errorf("store: value of %s is sealed but no sealing secret is configured", key)
		}
		n := c.seal.NonceSize()
		if len(e.Sealed) < n {
			return fmt.Errorf("store: value of %s is sealed but too short", key)
		}
		var err error
		if data, err = c.seal.Open(nil, e.Sealed[:n], e.Sealed[n:], []byte(key)); err != nil {
			return fmt.Errorf("store: value of %s cannot be unsealed (other sealing secret, or the value was changed): %w", key, err)
		}
	}
	if err := json.Unmarshal(data, record); err != nil {
		return fmt.Errorf("store: value of %s does not decode: %w", key, redactJSON(err))
	}
	return nil
}

// redactJSON keeps the kind and place of a JSON error and drops what it quotes.
func redactJSON(err error) error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("syntax error at byte %d", syntax.Offset)
	}
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		return fmt.Errorf("field %q: want %s", typ.Field, typ.Type)
	}
	return errors.New("wrong content")
}
