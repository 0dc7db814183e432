package terminate

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
)

// forger is a TLS client that, once the handshake is over, writes records crypto/tls
// would never write. Reading stays with crypto/tls.
type forger struct {
	*tls.Conn
	t       testing.TB
	raw     net.Conn
	version uint16
	secret  []byte // TLS 1.3: of our traffic
	aead    cipher.AEAD
	iv      []byte
	seq     uint64
}

// Record types and the messages that the tests forge.
const (
	typeAlert       = 21
	typeHandshake   = 22
	typeApplication = 23
)

// keyUpdate is the message of RFC 8446 4.6.3; ask is update_requested.
func keyUpdate(ask bool) []byte {
	m := []byte{24, 0, 0, 1, 0}
	if ask {
		m[4] = 1
	}
	return m
}

type tap struct {
	net.Conn
	mu  sync.Mutex
	got bytes.Buffer
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	c.got.Write(p[:n])
	c.mu.Unlock()
	return n, err
}

// forge performs a handshake of the given version over raw and takes its keys.
func forge(t testing.TB, raw net.Conn, cfg *tls.Config, version uint16) *forger {
	t.Helper()
	cfg = cfg.Clone()
	cfg.MinVersion, cfg.MaxVersion = version, version
	cfg.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	var keys bytes.Buffer
	cfg.KeyLogWriter = &keys
	rec := &tap{Conn: raw}
	f := &forger{Conn: tls.Client(rec, cfg), t: t, raw: raw, version: version}
	if err := f.Handshake(); err != nil {
		t.Fatal(err)
	}
	label := "CLIENT_TRAFFIC_SECRET_0"
	if version == tls.VersionTLS12 {
		label = "CLIENT_RANDOM"
	} else if s := f.ConnectionState().CipherSuite; s != tls.TLS_AES_128_GCM_SHA256 {
		t.Skipf("this machine negotiates %s; the forger speaks AES-128-GCM", tls.CipherSuiteName(s))
	}
	for line := range strings.Lines(keys.String()) {
		if p := strings.Fields(line); p[0] == label {
			f.secret, _ = hex.DecodeString(p[2])
			if version == tls.VersionTLS12 {
				clientRandom, _ := hex.DecodeString(p[1])
				rec.mu.Lock()
				serverRandom := rec.got.Bytes()[5+4+2:][:32]
				rec.mu.Unlock()
				block := prf12(f.secret, append(append([]byte("key expansion"), serverRandom...), clientRandom...), 40)
				f.setKey(block[:16], block[32:36])
				f.seq = 1 // 0 was Finished
				return f
			}
			f.deriveKey()
			return f
		}
	}
	t.Fatal("no key was logged")
	return nil
}

func (f *forger) setKey(key, iv []byte) {
	b, err := aes.NewCipher(key)
	if err != nil {
		f.t.Fatal(err)
	}
	if f.aead, err = cipher.NewGCM(b); err != nil {
		f.t.Fatal(err)
	}
	f.iv, f.seq = iv, 0
}

func (f *forger) expand(label string, n int) []byte {
	label = "tls13 " + label
	info := string([]byte{byte(n >> 8), byte(n), byte(len(label))}) + label + "\x00"
	out, err := hkdf.Expand(sha256.New, f.secret, info, n)
	if err != nil {
		f.t.Fatal(err)
	}
	return out
}

func (f *forger) deriveKey() { f.setKey(f.expand("key", 16), f.expand("iv", 12)) }

// update moves our keys on, as after a KeyUpdate of ours.
func (f *forger) update() {
	f.secret = f.expand("traffic upd", 32)
	f.deriveKey()
}

// seal returns one protected record.
func (f *forger) seal(typ byte, body []byte) []byte {
	nonce := make([]byte, 12)
	if f.version == tls.VersionTLS12 {
		copy(nonce, f.iv)
		binary.BigEndian.PutUint64(nonce[4:], f.seq)
		aad := binary.BigEndian.AppendUint64(nil, f.seq)
		aad = append(aad, typ, 3, 3, byte(len(body)>>8), byte(len(body)))
		f.seq++
		n := 8 + len(body) + 16
		rec := append([]byte{typ, 3, 3, byte(n >> 8), byte(n)}, nonce[4:]...)
		return f.aead.Seal(rec, nonce, body, aad)
	}
	copy(nonce, f.iv)
	for i := range 8 {
		nonce[4+i] ^= byte(f.seq >> (56 - 8*i))
	}
	f.seq++
	n := len(body) + 1 + 16
	head := []byte{typeApplication, 3, 3, byte(n >> 8), byte(n)}
	return f.aead.Seal(head[:5:5], nonce, append(body[:len(body):len(body)], typ), head)
}

func prf12(secret, seed []byte, n int) (out []byte) {
	mac := func(b []byte) []byte {
		h := hmac.New(sha256.New, secret)
		h.Write(b)
		return h.Sum(nil)
	}
	for a := mac(seed); len(out) < n; a = mac(a) {
		out = append(out, mac(append(a[:len(a):len(a)], seed...))...)
	}
	return out[:n]
}

func (f *forger) send(records ...[]byte) {
	f.t.Helper()
	if _, err := f.raw.Write(bytes.Join(records, nil)); err != nil {
		f.t.Fatal(fmt.Errorf("write forged records: %w", err))
	}
}
