package wireguard

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const acceptRetry = 100 * time.Millisecond

// uapiSocket is the unix socket by which wg(8) and wgctrl reach a userspace
// device, mode 0600 in a directory only root may enter: who can open it can
// read the private key.
type uapiSocket struct {
	path string
	l    *net.UnixListener
	wg   sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// listenUAPI serves every connection with handle, which closes it. A socket
// left behind by a dead process is replaced, a live one is not.
func listenUAPI(path string, handle func(net.Conn)) (*uapiSocket, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("another process serves %s", path)
	}
	// Made in a private directory and renamed: at no moment can anybody else
	// connect, and no process-wide umask is touched.
	tmp, err := os.MkdirTemp(dir, ".gw")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	made := filepath.Join(tmp, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it would unlink the old name
	err = os.Chmod(made, 0o600)
	if err == nil {
		err = os.Rename(made, path)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	s := &uapiSocket{path: path, l: l, conns: make(map[net.Conn]struct{})}
	s.wg.Add(1)
	go s.accept(handle)
	return s, nil
}

func (s *uapiSocket) accept(handle func(net.Conn)) {
	defer s.wg.Done()
	for {
		c, err := s.l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(acceptRetry) // out of descriptors, most likely
			continue
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			c.Close()
			return
		}
		s.conns[c] = struct{}{}
		s.wg.Add(1)
		s.mu.Unlock()
		go func() {
			defer s.wg.Done()
			handle(c)
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		}()
	}
}

func (s *uapiSocket) close() error {
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	err := errors.Join(s.l.Close(), os.Remove(s.path))
	s.wg.Wait()
	return err
}
