package dataplane

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/hostname"
	"github.com/dstack-gw/dstack-gw/dataplane/relay"
	"github.com/dstack-gw/dstack-gw/dataplane/routing"
)

// Options configure a Server. Zero durations mean "no limit" unless said otherwise.
type Options struct {
	Logger *slog.Logger
	Hooks  Hooks

	Listen      []netip.AddrPort
	Workers     int // event loops; at least 1
	Rebalance   bool
	Backlog     int
	DeferAccept time.Duration

	// InboundPROXY demands a PROXY header on every connection, and believes it only
	// from TrustedSources (empty = from everyone).
	InboundPROXY   bool
	TrustedSources []netip.Prefix

	Selection routing.Selection
	HeadStart time.Duration // before a second instance is tried beside a silent one; 0 = try all at once
	// MaxPerApp bounds the connections to one app, dials included, TLS handshakes not; 0 = unlimited.
	MaxPerApp       int64
	MaxHalfOpen     int64 // connections that have not sent a complete hello, all loops; 0 = unlimited
	MaxHalfOpenPeer int   // the same for one source address (IPv6: one /64); not used with InboundPROXY
	// LocalhostBackend lets the id `localhost` reach 127.0.0.1 (debugging only).
	LocalhostBackend bool

	BufferSize int
	Splice     relay.Gate

	PPHeader, Handshake, Resolve, Connect time.Duration
	PolicyHold                            time.Duration // 0 = refuse at once while no policy is known
	Idle, Total                           time.Duration
}

// Hooks are what the data plane asks of its owner. Every method may be called from
// any goroutine and must not block, except Resolve and ServeBuiltin, which get a
// goroutine of their own.
type Hooks interface {
	// CachedCustom answers from memory where a custom domain points to.
	CachedCustom(name string) (id string, port uint16, err error, ok bool)
	// ResolveCustom looks a custom domain up.
	ResolveCustom(ctx context.Context, name string) (id string, port uint16, err error)
	// NeedPolicy asks for the port policy of an instance that reported none. The
	// answer comes as a new snapshot.
	NeedPolicy(instanceID string)
	// ServeBuiltin serves a reserved name over conn, on which TLS has not begun yet.
	// It owns conn; Server.Close closes conn if the call has not returned by then.
	ServeBuiltin(svc hostname.Service, mode hostname.Mode, base *routing.Base, conn net.Conn)
	// Closed is told of every connection that ended. It must be cheap: it runs on the loop.
	Closed(r *Record)
}

// Record describes a connection that ended.
type Record struct {
	ID         uint64
	Peer       netip.AddrPort // from the PROXY header where there is one
	Name       string         // as sent, lower case; empty if none was read
	App        string
	Instance   string
	Port       uint16
	Mode       hostname.Mode
	Routed     bool // Mode, App, Instance, Port are valid
	Reason     Reason
	Detail     error // why, nil for a normal end
	Start      time.Time
	Duration   time.Duration
	Up, Down   uint64 // bytes client to app, app to client (plaintext where terminated)
	Spliced    bool
	Resumed    bool
	TLSVersion uint16
}
