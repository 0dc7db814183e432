package wireguard

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The text protocol of https://www.wireguard.com/xplatform/, spoken here to the
// device in this process.

// encodeUAPI returns the body of a set operation for c.
func encodeUAPI(c change) []byte {
	b := make([]byte, 0, 160+220*len(c.peers))
	if c.privateKey != nil {
		b = appendKey(b, "private_key=", *c.privateKey)
	}
	if c.listenPort != nil {
		b = append(b, "listen_port="...)
		b = strconv.AppendInt(b, int64(*c.listenPort), 10)
		b = append(b, '\n')
	}
	for i := range c.peers {
		p := &c.peers[i]
		b = appendKey(b, "public_key=", p.key)
		if p.remove {
			b = append(b, "remove=true\n"...)
			continue
		}
		b = append(b, "replace_allowed_ips=true\nallowed_ip="...)
		b = netip.PrefixFrom(p.ip, p.ip.BitLen()).AppendTo(b)
		if p.endpoint.IsValid() {
			b = append(b, "\nendpoint="...)
			b = p.endpoint.AppendTo(b)
		}
		if p.keepalive {
			b = append(b, "\npersistent_keepalive_interval="...)
			b = strconv.AppendInt(b, int64(keepalive/time.Second), 10)
		}
		b = append(b, '\n')
	}
	return b
}

func appendKey(b []byte, name string, key wgtypes.Key) []byte {
	b = append(b, name...)
	b = hex.AppendEncode(b, key[:])
	return append(b, '\n')
}

// parseUAPI reads the answer of a get operation. Keys it does not know are
// skipped, so that a newer library adds nothing but fields.
func parseUAPI(text []byte) (*devState, error) {
	st := &devState{peers: make([]devPeer, 0, bytes.Count(text, []byte("public_key=")))}
	var p *devPeer
	var sec, nsec int64
	finish := func() {
		if p != nil && (sec > 0 || nsec > 0) {
			p.handshake = time.Unix(sec, nsec)
		}
		sec, nsec = 0, 0
	}
	for line := range bytes.Lines(text) {
		line = bytes.TrimSuffix(line, []byte{'\n'})
		name, value, ok := bytes.Cut(line, []byte{'='})
		if !ok {
			return nil, errors.New("read the device's answer: a line has no '='")
		}
		var err error
		if string(name) == "public_key" {
			finish()
			st.peers = append(st.peers, devPeer{})
			p = &st.peers[len(st.peers)-1]
			p.key, err = parseHexKey(value)
		} else if p == nil {
			switch string(name) {
			case "private_key":
				if st.privateKey, err = parseHexKey(value); err != nil {
					// The value must not get into the log.
					return nil, errors.New("read the device's answer: malformed private key")
				}
			case "listen_port":
				st.listenPort, err = strconv.Atoi(string(value))
			}
		} else {
			switch string(name) {
			case "endpoint":
				p.endpoint, err = netip.ParseAddrPort(string(value))
				p.endpoint = netip.AddrPortFrom(p.endpoint.Addr().Unmap(), p.endpoint.Port())
			case "last_handshake_time_sec":
				sec, err = strconv.ParseInt(string(value), 10, 64)
			case "last_handshake_time_nsec":
				nsec, err = strconv.ParseInt(string(value), 10, 64)
			case "rx_bytes":
				p.rx, err = strconv.ParseUint(string(value), 10, 64)
			case "tx_bytes":
				p.tx, err = strconv.ParseUint(string(value), 10, 64)
			case "persistent_keepalive_interval":
				var n uint64
				n, err = strconv.ParseUint(string(value), 10, 16)
				p.keepalive = time.Duration(n) * time.Second
			case "allowed_ip":
				p.nAllowed++
				if p.nAllowed == 1 {
					p.allowed, err = netip.ParsePrefix(string(value))
				}
			}
		}
		if err != nil {
			return nil, fmt.Errorf("read the device's answer: field %s: %w", name, err)
		}
	}
	finish()
	return st, nil
}

func parseHexKey(b []byte) (key wgtypes.Key, err error) {
	if len(b) != hex.EncodedLen(len(key)) {
		return key, fmt.Errorf("a key has %d hex digits, not %d", hex.EncodedLen(len(key)), len(b))
	}
	_, err = hex.Decode(key[:], b)
	return key, err
}
