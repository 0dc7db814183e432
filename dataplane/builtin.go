package dataplane

import (
	"fmt"
	"net"
	"net/netip"
	"os"
)

// adopt turns a detached descriptor into a net.Conn that first replays the bytes
// already read from it.
func adopt(fd int, replay []byte, peer netip.AddrPort) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "proxy-client")
	defer f.Close() // net.FileConn works on a duplicate
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("adopt connection of %s: %w", peer, err)
	}
	return &replayConn{Conn: c, replay: replay}, nil
}

type replayConn struct {
	net.Conn
	replay []byte
}

func (c *replayConn) Read(p []byte) (int, error) {
	if len(c.replay) > 0 {
		n := copy(p, c.replay)
		c.replay = c.replay[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
