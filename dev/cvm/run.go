package cvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/ratls"
)

const (
	uplinkWait   = 10 * time.Second
	statusPeriod = time.Second
	nginxRestart = time.Second
	shutdownTime = 3 * time.Second
)

// Run is the life of a CVM in the network namespace of this process. It returns
// when ctx ends, or at once with an error if a server cannot start. Failing
// registrations are repeated for ever; Status tells.
func Run(ctx context.Context, c *Config, log *slog.Logger) error {
	if err := c.check(); err != nil {
		return err
	}
	key, err := LoadKey(c.Path(FileWGKey))
	if err != nil {
		return err
	}
	compose, err := ParseCompose(c.Compose)
	if err != nil {
		return err
	}
	if err := waitUplink(ctx, c.Uplink); err != nil {
		return err
	}
	agent, err := agentHandler(c)
	if err != nil {
		return err
	}
	conf, err := nginxConf(c)
	if err != nil {
		return fmt.Errorf("nginx.conf: %w", err)
	}
	if err := os.WriteFile(c.Path(FileNginxConf), []byte(conf), 0o600); err != nil {
		return fmt.Errorf("write nginx.conf: %w", err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()

	g := &guest{Config: c, compose: compose, log: log, status: Status{Name: c.Name, PID: os.Getpid(), Nginx: "starting"}}
	var h2c http.Protocols
	h2c.SetHTTP1(true)
	h2c.SetUnencryptedHTTP2(true)
	for _, s := range []struct {
		port      int
		handler   http.Handler
		protocols *http.Protocols
	}{
		{PortAgent, agent, nil},
		{PortGRPC, grpcHandler(c), &h2c},
	} {
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", s.port))
		if err != nil {
			cancel(nil)
			return fmt.Errorf("listen inside the CVM: %w", err)
		}
		srv := &http.Server{Handler: s.handler, Protocols: s.protocols, ReadHeaderTimeout: 10 * time.Second}
		wg.Go(func() {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				cancel(fmt.Errorf("serve port %d: %w", s.port, err))
			}
		})
		wg.Go(func() {
			<-ctx.Done()
			deadline, stop := context.WithTimeout(context.Background(), shutdownTime)
			defer stop()
			if srv.Shutdown(deadline) != nil {
				srv.Close()
			}
		})
	}
	wg.Go(func() { g.runNginx(ctx) })
	wg.Go(func() { g.writeStatus(ctx) })
	g.register(ctx, key)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// guest is a running CVM.
type guest struct {
	*Config
	compose *Compose
	log     *slog.Logger

	mu     sync.Mutex
	status Status
}

func (g *guest) update(f func(*Status)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f(&g.status)
}

// register keeps the CVM registered and owns the tunnel.
func (g *guest) register(ctx context.Context, key wgtypes.Key) {
	t := &tunnel{want: g.WireGuard, log: g.log}
	defer func() {
		if err := t.down(); err != nil {
			g.log.Warn(err.Error())
		}
	}()
	c := newChecker(g.Refresh, g.Stale, time.Now())
	tick := time.NewTicker(min(g.Poll, time.Second))
	defer tick.Stop()
	lastPoll := time.Time{}
	for {
		handshake, err := t.handshake()
		if err != nil {
			g.log.Warn(err.Error())
		}
		g.update(func(s *Status) { s.Handshake = handshake })
		// A CVM without a tunnel tries as often as its delay says.
		if now := time.Now(); !t.isUp() || now.Sub(lastPoll) >= g.Poll {
			lastPoll = now
			if a := c.poll(now, t.isUp(), handshake); a != actNothing {
				err := g.registerOnce(ctx, t, key, a)
				if ctx.Err() != nil {
					return
				}
				c.done(time.Now(), a, err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (g *guest) registerOnce(ctx context.Context, t *tunnel, key wgtypes.Key, a action) error {
	req := &gatewaypb.RegisterCvmRequest{ClientPublicKey: key.PublicKey().String()}
	if g.ReportPolicy {
		req.PortPolicy = g.compose.Policy
		if req.PortPolicy == nil {
			req.PortPolicy = &gatewaypb.PortPolicy{}
		}
	}
	err := func() error {
		resp, err := register(ctx, g.Config, req)
		if err != nil {
			return fmt.Errorf("register at %s: %w", g.GatewayURL, err)
		}
		conf, err := readAnswer(key, resp.Wg)
		if err != nil {
			return err
		}
		if err := t.set(conf, a == actForce); err != nil {
			return err
		}
		return ratls.WriteFile(g.Path(FileWGConf), []byte(conf.text()))
	}()
	g.update(func(s *Status) {
		if err != nil {
			s.Failures++
			s.Error = err.Error()
			return
		}
		s.Registrations++
		s.Registered, s.Error = time.Now(), ""
		s.Mode, s.Reason = t.mode, t.reason
		s.ClientIP = t.address.String()
	})
	if err != nil {
		g.log.Warn("registration failed", slog.String("error", err.Error()))
		return err
	}
	g.log.Info("registered", slog.String("client_ip", t.address.String()), slog.Bool("forced", a == actForce))
	return nil
}

// runNginx keeps nginx running.
func (g *guest) runNginx(ctx context.Context) {
	// The kernel ends nginx when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for ctx.Err() == nil {
		cmd := exec.CommandContext(ctx, g.Nginx, "-p", g.Dir, "-e", "stderr", "-c", g.Path(FileNginxConf))
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		cmd.WaitDelay = shutdownTime
		err := cmd.Start()
		if err == nil {
			g.update(func(s *Status) { s.Nginx = "" })
			err = cmd.Wait()
		}
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("ended by itself")
		}
		g.update(func(s *Status) { s.Nginx = err.Error() })
		g.log.Warn("nginx stopped, it is started again", slog.String("error", err.Error()))
		select {
		case <-ctx.Done():
		case <-time.After(nginxRestart):
		}
	}
}

// writeStatus writes the status whenever it has changed.
func (g *guest) writeStatus(ctx context.Context) {
	var written Status
	for {
		g.mu.Lock()
		now := g.status
		g.mu.Unlock()
		if now != written {
			if err := now.write(g.Path(FileStatus)); err != nil {
				g.log.Warn("writing the status failed", slog.String("error", err.Error()))
			} else {
				written = now
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(statusPeriod / 4):
		}
	}
}

// waitUplink waits until the address is there.
func waitUplink(ctx context.Context, want netip.Prefix) error {
	ctx, cancel := context.WithTimeout(ctx, uplinkWait)
	defer cancel()
	for {
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return fmt.Errorf("list the CVM's addresses: %w", err)
		}
		for _, a := range addrs {
			if a.String() == want.String() {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the CVM's address %s did not appear within %v: is this the right network namespace?", want, uplinkWait)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
