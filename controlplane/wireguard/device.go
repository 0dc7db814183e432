package wireguard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Mode says who runs WireGuard. Auto, Kernel, Userspace and None may be asked
// for; Status may also report External and Unmanaged.
type Mode string

const (
	Auto      Mode = "auto"      // kernel if possible, else userspace
	Kernel    Mode = "kernel"    // the kernel's WireGuard (Linux 5.6, or the module)
	Userspace Mode = "userspace" // inside this process, on a TUN interface
	None      Mode = "none"      // no interface: peers are only recorded and written to the peer file
	External  Mode = "external"  // an adopted interface run by another process
	Unmanaged Mode = "unmanaged" // an adopted interface that is not WireGuard
)

// closeTimeout bounds Close.
const closeTimeout = 5 * time.Second

// defaultMTU is what 1500-byte Ethernet leaves after an IPv6 outer header.
const defaultMTU = 1420

// Options configures Open. Interface is required; zero durations and a zero MTU
// mean the default.
type Options struct {
	Interface  string       // name, 1 to 15 bytes
	Address    netip.Prefix // own address with the mask of the whole overlay
	PrivateKey wgtypes.Key  // zero: the device keeps the key it has
	ListenPort int          // UDP port, 0: any
	MTU        int          // of an interface created here, default 1420
	Mode       Mode         // default Auto; an existing interface is adopted in every mode but None
	ConfigPath string       // peer file (gateway spec 6.3), empty: none
	SocketDir  string       // of the userspace device's control socket, default /var/run/wireguard

	// Endpoints keeps each peer's last address over a restart, so that the
	// gateway can open the tunnels itself instead of waiting for each guest to
	// notice (up to 25 s). nil: not kept.
	Endpoints EndpointStore
	// EndpointMaxAge is the age of a handshake after which an endpoint is not
	// given back, default 1 h: the address may belong to somebody else by now.
	EndpointMaxAge time.Duration

	BatchWindow      time.Duration // least time between two reconfigurations, default 25 ms
	RetryDelay       time.Duration // after a failed reconfiguration, default 1 s
	FileInterval     time.Duration // least time between two writes of the peer file, default 1 s
	RefreshInterval  time.Duration // of the handshake table, default 10 s
	FastRefresh      time.Duration // the same while new instances are awaited, default 1 s
	EndpointInterval time.Duration // least time between two saves of endpoints, default 30 s

	// OnRefresh, if set, is called with every new handshake table, one call at
	// a time. The next refresh waits for it, so it must not call Refresh.
	OnRefresh func(*Table)

	Logger     *slog.Logger          // default slog.Default()
	Registerer prometheus.Registerer // nil: metrics are not registered
}

func (o *Options) setDefaults() error {
	if n := len(o.Interface); n < 1 || n >= unix.IFNAMSIZ || strings.ContainsAny(o.Interface, "/ \t\n") {
		return fmt.Errorf("core.wg.interface: %q is no interface name (1 to %d bytes without blanks or slashes)", o.Interface, unix.IFNAMSIZ-1)
	}
	if o.ListenPort < 0 || o.ListenPort > 65535 {
		return fmt.Errorf("core.wg.listen_port: %d is no UDP port", o.ListenPort)
	}
	if o.Mode == "" {
		o.Mode = Auto
	}
	switch o.Mode {
	case Auto, Kernel, Userspace:
		if !o.Address.IsValid() {
			return errors.New("core.wg.ip: the interface needs an address with a prefix length")
		}
	case None:
	default:
		return fmt.Errorf("WireGuard mode %q is none of auto, kernel, userspace, none", o.Mode)
	}
	if o.MTU == 0 {
		o.MTU = defaultMTU
	}
	if o.SocketDir == "" {
		o.SocketDir = "/var/run/wireguard"
	}
	for _, f := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&o.EndpointMaxAge, time.Hour},
		{&o.BatchWindow, 25 * time.Millisecond},
		{&o.RetryDelay, time.Second},
		{&o.FileInterval, time.Second},
		{&o.RefreshInterval, 10 * time.Second},
		{&o.FastRefresh, time.Second},
		{&o.EndpointInterval, 30 * time.Second},
	} {
		if *f.v <= 0 {
			*f.v = f.def
		}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}

// Device is the gateway's WireGuard interface and its peer set.
type Device struct {
	opt    Options
	log    *slog.Logger
	ownKey wgtypes.Key // public, zero if no private key is configured
	sys    system
	met    *metrics

	applyLog, refreshLog, fileLog, endpointLog failureLog

	stop context.CancelFunc
	wg   sync.WaitGroup

	// mu guards everything down to the blank line. It is held for map work
	// only, never across a system call.
	mu        sync.Mutex
	be        backend
	mode      Mode
	reason    string
	adopted   bool
	up        bool
	closed    bool
	synced    bool // Sync was called: strangers on the device may go
	want      *peerSet
	have      map[wgtypes.Key]applied     // what the device holds, as far as known
	gone      map[wgtypes.Key]uint64      // removed from the device since the last refresh, with generation
	gen       uint64                      // of the last reconfiguration
	flushing  bool                        // reconfiguration gen is under way
	reconcile bool                        // the next reconfiguration starts from a dump
	failing   bool                        // the last reconfiguration failed
	lastErr   error                       // of the last reconfiguration
	pending   *batch                      // collects changes
	inflight  *batch                      // being applied
	young     map[wgtypes.Key]time.Time   // applied without handshake so far
	endpoints map[wgtypes.Key]EndpointRec // last known, to be given back

	table       atomic.Pointer[Table]
	refreshMu   sync.Mutex // one refresh at a time; guards lastSave, savedKeys
	lastSave    time.Time
	saved       map[wgtypes.Key]EndpointRec
	wake        chan struct{} // capacity 1: pending or reconcile was set
	refreshSoon chan struct{} // capacity 1: young became non-empty
	fileDirty   chan struct{} // capacity 1
	fileWritten []byte        // by runPeerFile and Close
}

// applied is one peer the device holds.
type applied struct {
	ip        netip.Addr
	keepalive bool
	gen       uint64
}

// system is what Open uses of the machine; tests replace it.
type system struct {
	links   links
	control func(name string) backend
	user    func(*Device) (backend, error)
}

// Open adopts the interface if it exists, leaving its addresses and state
// alone, or creates it. A kernel interface stays when the device is closed; a
// userspace one ends with the process. Call Sync next: until then nothing is
// changed on an adopted interface.
//
// An error means that there is no interface to work with: it names the options
// that failed, with the reasons.
func Open(ctx context.Context, opt Options) (*Device, error) {
	return open(ctx, opt, system{
		links:   rtnl{},
		control: func(name string) backend { return newControl(name) },
		user:    (*Device).createUserspace,
	})
}

func open(ctx context.Context, opt Options, sys system) (*Device, error) {
	if err := opt.setDefaults(); err != nil {
		return nil, err
	}
	d := &Device{
		opt:         opt,
		log:         opt.Logger.With(slog.String("interface", opt.Interface)),
		sys:         sys,
		want:        newPeerSet(0),
		have:        make(map[wgtypes.Key]applied),
		gone:        make(map[wgtypes.Key]uint64),
		young:       make(map[wgtypes.Key]time.Time),
		endpoints:   make(map[wgtypes.Key]EndpointRec),
		saved:       make(map[wgtypes.Key]EndpointRec),
		wake:        make(chan struct{}, 1),
		refreshSoon: make(chan struct{}, 1),
		fileDirty:   make(chan struct{}, 1),
	}
	if opt.PrivateKey != zeroKey {
		d.ownKey = opt.PrivateKey.PublicKey()
	}
	d.applyLog = failureLog{log: d.log, what: "configuring WireGuard"}
	d.refreshLog = failureLog{log: d.log, what: "reading WireGuard handshakes"}
	d.fileLog = failureLog{log: d.log, what: "writing the WireGuard peer file"}
	d.endpointLog = failureLog{log: d.log, what: "saving WireGuard endpoints"}
	d.table.Store(&Table{})
	if err := d.openLink(); err != nil {
		return nil, err
	}
	if opt.PrivateKey == zeroKey && opt.Mode != None {
		d.log.Warn("core.wg.private_key is empty: the interface keeps the key it has, guests cannot connect if it has none")
	}
	d.met = newMetrics(d)
	if opt.Registerer != nil {
		if err := opt.Registerer.Register(d.met); err != nil {
			d.be.close()
			return nil, fmt.Errorf("register WireGuard metrics: %w", err)
		}
	}
	d.loadEndpoints()
	d.log.Info("WireGuard ready", slog.String("mode", string(d.mode)), slog.String("reason", d.reason), slog.Bool("adopted", d.adopted))

	ctx, d.stop = context.WithCancel(context.WithoutCancel(ctx))
	d.wg.Go(func() { d.runApply(ctx) })
	d.wg.Go(func() { d.runRefresh(ctx) })
	if opt.ConfigPath != "" {
		d.wg.Go(func() { d.runPeerFile(ctx) })
	}
	return d, nil
}

// openLink finds or makes the interface and sets be, mode, reason and adopted.
func (d *Device) openLink() error {
	if d.opt.Mode == None {
		d.setBackend(newMemory(), None, "switched off by configuration: peers are recorded, no traffic flows", false)
		return nil
	}
	info, err := d.sys.links.get(d.opt.Interface)
	switch {
	case err == nil:
		d.adopt(info)
		return nil
	case errors.Is(err, errNoLink):
		return d.create()
	default:
		return fmt.Errorf("open WireGuard interface %s: %w", d.opt.Interface, err)
	}
}

func (d *Device) setBackend(be backend, mode Mode, reason string, adopted bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.be, d.mode, d.reason, d.adopted = be, mode, reason, adopted
	d.up = true
}

// adopt takes over an existing interface of any kind.
func (d *Device) adopt(info linkInfo) {
	be := d.sys.control(d.opt.Interface)
	st, err := be.dump()
	d.setBackend(be, Unmanaged, "", true)
	d.noteAdopted(info, st, err)
	if err != nil {
		d.log.Warn("the existing interface cannot hold WireGuard peers: instances will not be reachable through it",
			slog.String("kind", info.kind), slog.String("error", err.Error()))
	}
	if !info.up {
		d.log.Warn("the existing interface is down and stays so: set it up, or delete it and restart to have it created")
	}
	d.mu.Lock()
	d.up = info.up
	d.mu.Unlock()
}

// noteAdopted derives mode and reason of an adopted interface from a dump.
func (d *Device) noteAdopted(info linkInfo, st *devState, err error) {
	mode, reason := Unmanaged, ""
	switch {
	case err == nil && info.kind == "wireguard":
		mode, reason = Kernel, "the interface existed already"
	case err == nil:
		mode, reason = External, fmt.Sprintf("the interface existed already (%s) and another process runs WireGuard on it", info.kind)
	case errors.Is(err, ErrNotWireGuard):
		reason = fmt.Sprintf("the interface existed already and is not WireGuard but %q", info.kind)
	default:
		reason = fmt.Sprintf("the interface existed already and does not answer: %v", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mode, d.reason = mode, reason
}

// create makes the interface in the configured mode.
func (d *Device) create() error {
	name := d.opt.Interface
	var notKernel string
	if d.opt.Mode == Auto || d.opt.Mode == Kernel {
		err := d.sys.links.addWireGuard(name, d.opt.MTU)
		switch {
		case err == nil:
			return d.finishKernel()
		case errors.Is(err, unix.EEXIST):
			if info, err := d.sys.links.get(name); err == nil {
				d.adopt(info) // somebody was faster
				return nil
			}
			return fmt.Errorf("create WireGuard interface %s: %w", name, err)
		case d.opt.Mode == Kernel:
			return fmt.Errorf("create WireGuard interface %s: %s: %w", name, explainNoKernel(err), err)
		}
		notKernel = explainNoKernel(err)
	}
	be, err := d.sys.user(d)
	if err != nil {
		if notKernel != "" {
			return fmt.Errorf("create WireGuard interface %s: %s; in user space: %w", name, notKernel, err)
		}
		return fmt.Errorf("create WireGuard interface %s in user space: %w", name, err)
	}
	reason := "userspace WireGuard was asked for"
	if notKernel != "" {
		reason = notKernel
	}
	d.setBackend(be, Userspace, reason+"; tunnels do not survive a restart of the gateway, endpoints are given back", false)
	return nil
}

// finishKernel configures the interface just created. Key and port come before
// "up", so that no random port is ever open.
func (d *Device) finishKernel() error {
	name := d.opt.Interface
	be := d.sys.control(name)
	err := be.apply(d.ownConfig())
	if err == nil {
		err = d.sys.links.bringUp(name, d.opt.Address)
	}
	if err != nil {
		be.close()
		err = fmt.Errorf("set up WireGuard interface %s: %w", name, explainBind(err, d.ownConfig()))
		if rerr := d.sys.links.remove(name); rerr != nil {
			err = fmt.Errorf("%w (and removing it again failed: %w)", err, rerr)
		}
		return err
	}
	d.setBackend(be, Kernel, "created", false)
	return nil
}

// createUserspace makes the TUN interface and runs WireGuard on it.
func (d *Device) createUserspace() (backend, error) {
	t, err := createTUN(d.opt.Interface, d.opt.MTU)
	if err != nil {
		return nil, err
	}
	u := newUserspace(t, conn.NewDefaultBind(), socketPath(d.opt.SocketDir, d.opt.Interface), d.log)
	err = u.apply(d.ownConfig())
	if err == nil {
		err = u.up()
	}
	if err == nil {
		err = d.sys.links.bringUp(d.opt.Interface, d.opt.Address)
	}
	if err != nil {
		u.close() // the interface goes with it
		return nil, explainBind(err, d.ownConfig())
	}
	return u, nil
}

// ownConfig is the interface's part of the configuration.
func (d *Device) ownConfig() change {
	c := change{listenPort: &d.opt.ListenPort}
	if d.opt.PrivateKey != zeroKey {
		c.privateKey = &d.opt.PrivateKey
	}
	return c
}

// Status describes the device for operators.
type Status struct {
	Interface string
	Mode      Mode   // what is in use, never Auto
	Reason    string // why this mode, and what it costs
	Adopted   bool   // the interface was there before
	Up        bool   // the interface exists and is administratively up
	Peers     int    // wanted
	Applied   int    // held by the device, as far as known
	InSync    bool   // the last reconfiguration worked and none is waiting
	LastError string // of the last reconfiguration, empty if it worked
	Refreshed time.Time
}

// Status returns the current state. It does not wait for the device.
func (d *Device) Status() Status {
	t := d.table.Load()
	d.mu.Lock()
	defer d.mu.Unlock()
	s := Status{
		Interface: d.opt.Interface,
		Mode:      d.mode,
		Reason:    d.reason,
		Adopted:   d.adopted,
		Up:        d.up,
		Peers:     len(d.want.byID),
		Applied:   len(d.have),
		InSync:    !d.failing && !d.reconcile && d.pending == nil && d.inflight == nil,
		Refreshed: t.Taken,
	}
	if d.lastErr != nil {
		s.LastError = d.lastErr.Error()
	}
	return s
}

// Close stops all work, writes what is unsaved and closes the device. A kernel
// or adopted interface stays up with its peers.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	d.stop()
	ended := make(chan struct{})
	go func() { defer close(ended); d.wg.Wait() }()
	select {
	case <-ended:
	case <-time.After(closeTimeout):
		// A foreign userspace device may leave its socket open and not answer.
		return fmt.Errorf("close WireGuard interface %s: the device has not answered for %v", d.opt.Interface, closeTimeout)
	}

	// One last look, so that a planned restart gives back current endpoints.
	d.refreshMu.Lock()
	defer d.refreshMu.Unlock()
	if _, err := d.read(); err == nil {
		d.saveEndpoints(true)
	}
	select {
	case <-d.fileDirty:
		d.writePeerFile()
	default:
	}
	d.mu.Lock()
	for _, b := range []*batch{d.pending, d.inflight} {
		if b != nil {
			b.finish(ErrClosed)
		}
	}
	d.pending, d.inflight = nil, nil
	be := d.be
	d.mu.Unlock()
	if d.opt.Registerer != nil {
		d.opt.Registerer.Unregister(d.met)
	}
	return be.close()
}

// ErrClosed is returned by calls on a closed device.
var ErrClosed = errors.New("the WireGuard device is closed")
