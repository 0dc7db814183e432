package wireguard

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// errStopped is returned by a userspace device that ended by itself, as it does
// when somebody deletes its interface.
var errStopped = errors.New("the userspace WireGuard device has stopped")

// uapiChunk is the number of peers in one request to the device.
const uapiChunk = 256

// userspace is the backend for WireGuard inside this process.
type userspace struct {
	dev    *device.Device
	socket *uapiSocket
}

// newUserspace runs WireGuard on t, which it owns from now on, even on failure.
// socketPath is where wg(8) finds the device, empty for nowhere; a socket that
// cannot be opened is logged, nothing more.
func newUserspace(t tun.Device, bind conn.Bind, socketPath string, log *slog.Logger) *userspace {
	u := &userspace{dev: device.NewDevice(t, bind, deviceLogger(log))}
	if socketPath != "" {
		s, err := listenUAPI(socketPath, u.dev.IpcHandle)
		if err != nil {
			log.Warn("wg(8) will not see this interface: opening its control socket failed",
				slog.String("socket", socketPath), slog.String("error", err.Error()))
		}
		u.socket = s
	}
	return u
}

func (u *userspace) dump() (*devState, error) {
	if u.stopped() {
		return nil, errStopped
	}
	var text bytes.Buffer
	if err := u.dev.IpcGetOperation(&text); err != nil {
		return nil, fmt.Errorf("read the userspace WireGuard device: %w", err)
	}
	return parseUAPI(text.Bytes())
}

func (u *userspace) apply(c change) error {
	if u.stopped() {
		return errStopped
	}
	// In pieces, because a request keeps readers out, and every new peer costs
	// a scalar multiplication.
	for {
		piece := c
		piece.peers = c.peers[:min(len(c.peers), uapiChunk)]
		if err := u.dev.IpcSetOperation(bytes.NewReader(encodeUAPI(piece))); err != nil {
			return fmt.Errorf("configure the userspace WireGuard device: %w", explainBind(err, c))
		}
		c = change{peers: c.peers[len(piece.peers):]}
		if c.empty() {
			return nil
		}
	}
}

// up opens the UDP port. Without it the device would do so when the interface
// comes up, and only log a port that is taken.
func (u *userspace) up() error { return explainBind(u.dev.Up(), change{}) }

func (u *userspace) stopped() bool {
	select {
	case <-u.dev.Wait():
		return true
	default:
		return false
	}
}

func (u *userspace) close() error {
	var err error
	if u.socket != nil {
		err = u.socket.close()
	}
	u.dev.Close()
	return err
}

func explainBind(err error, c change) error {
	if errors.Is(err, unix.EADDRINUSE) {
		port := "the UDP port"
		if c.listenPort != nil {
			port = fmt.Sprintf("UDP port %d", *c.listenPort)
		}
		return fmt.Errorf("%s is taken by another process (find it with: ss -ulpn): %w", port, err)
	}
	return err
}

// createTUN makes the interface of a userspace device. The library switches on
// segmentation and checksum offloads where the kernel has them.
func createTUN(name string, mtu int) (tun.Device, error) {
	t, err := tun.CreateTUN(name, mtu)
	if err == nil {
		return t, nil
	}
	switch {
	case errors.Is(err, os.ErrNotExist), strings.Contains(err.Error(), "does not exist"):
		return nil, fmt.Errorf("create TUN interface %s: %w (is the tun module loaded and /dev/net/tun present in this container?)", name, err)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("create TUN interface %s: %w (needs CAP_NET_ADMIN and access to /dev/net/tun)", name, err)
	}
	return nil, fmt.Errorf("create TUN interface %s: %w", name, err)
}

func socketPath(dir, name string) string { return filepath.Join(dir, name+".sock") }

// deviceLogger passes the library's messages on. It reports one line for every
// failed handshake of every unreachable peer, hence the limit, and "no known
// endpoint" is the normal state of an instance that has not called in yet.
func deviceLogger(log *slog.Logger) *device.Logger {
	l := &device.Logger{Verbosef: device.DiscardLogf}
	if log.Enabled(context.Background(), slog.LevelDebug) {
		l.Verbosef = func(format string, args ...any) { log.Debug(fmt.Sprintf(format, args...)) }
	}
	limit := rate.NewLimiter(1, 20)
	l.Errorf = func(format string, args ...any) {
		text := fmt.Sprintf(format, args...)
		if strings.Contains(text, "no known endpoint") {
			return
		}
		if limit.Allow() {
			log.Warn("userspace WireGuard: " + text)
		}
	}
	return l
}
