package suite

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"github.com/BurntSushi/toml"

	"github.com/dstack-gw/dstack-gw/bench/wire"
)

// fakeGateway stands in for a dstack gateway: the same configuration file, registration and admin calls, and names,
// served by the simplest relay there is. It tests the harness, so it is started by it as a program.
type fakeGateway struct {
	token string
	cfg   *tls.Config

	mu        sync.Mutex
	next      netip.Addr
	instances map[string]netip.Addr
	open      map[string]bool
}

func runFakeGateway(path string) error {
	var c struct {
		Core struct {
			Admin struct {
				Address string
				Token   string `toml:"auth_token"`
			}
			Debug struct{ Address string }
			WG    struct {
				IP string
			}
			Proxy struct {
				Addr  string `toml:"listen_addr"`
				Port  int    `toml:"listen_port"`
				Chain string `toml:"cert_chain"`
				Key   string `toml:"cert_key"`
			}
		}
	}
	if _, err := toml.DecodeFile(path, &c); err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(c.Core.Proxy.Chain, c.Core.Proxy.Key)
	if err != nil {
		return err
	}
	g := &fakeGateway{
		token: c.Core.Admin.Token, cfg: &tls.Config{Certificates: []tls.Certificate{pair}},
		next:      netip.MustParsePrefix(c.Core.WG.IP).Addr().Next(),
		instances: map[string]netip.Addr{}, open: map[string]bool{},
	}
	debug, admin := http.NewServeMux(), http.NewServeMux()
	debug.HandleFunc("POST /prpc/RegisterCvm", g.register)
	admin.HandleFunc("POST /prpc/SetInstancePortPolicy", g.policy)
	admin.HandleFunc("POST /prpc/Status", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"accel":{"splice_mode":"fake"}}`)
	})
	fail := make(chan error, 3)
	go func() { fail <- http.ListenAndServe(c.Core.Debug.Address, debug) }()
	go func() { fail <- http.ListenAndServe(c.Core.Admin.Address, admin) }()
	l, err := net.Listen("tcp4", fmt.Sprintf("%s:%d", c.Core.Proxy.Addr, c.Core.Proxy.Port))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				fail <- err
				return
			}
			go func() {
				defer conn.Close()
				g.serve(conn)
			}()
		}
	}()
	return <-fail
}

func (g *fakeGateway) register(w http.ResponseWriter, r *http.Request) {
	var in struct {
		ID string `json:"instance_id"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.mu.Lock()
	ip, ok := g.instances[in.ID]
	if !ok {
		ip = g.next
		g.next = ip.Next()
		g.instances[in.ID] = ip
	}
	g.mu.Unlock()
	fmt.Fprintf(w, `{"wg":{"client_ip":%q}}`, ip)
}

func (g *fakeGateway) policy(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer "+g.token {
		http.Error(w, "unauthorized", http.StatusUnauthorized)
		return
	}
	var in struct {
		ID string `json:"instance_id"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.mu.Lock()
	g.open[in.ID] = true
	g.mu.Unlock()
	io.WriteString(w, "null")
}

// replayed is a connection whose first bytes were already read.
type replayed struct {
	net.Conn
	first []byte
}

func (c *replayed) Read(b []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(b, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// mute keeps a probing handshake from answering.
type mute struct{ replayed }

func (mute) Write(b []byte) (int, error) { return len(b), nil }

func (g *fakeGateway) serve(c net.Conn) {
	hello, err := wire.NewStream(c, nil, 0).Hello()
	if err != nil {
		return
	}
	name := ""
	found := errors.New("found")
	tls.Server(&mute{replayed{c, append([]byte(nil), hello...)}}, &tls.Config{
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) { name = h.ServerName; return nil, found },
	}).Handshake()
	label, _, _ := strings.Cut(name, ".")
	id, port, _ := strings.Cut(label, "-")
	port, passthrough := strings.CutSuffix(port, "s")
	g.mu.Lock()
	ip, ok := g.instances[id]
	ok = ok && g.open[id]
	g.mu.Unlock()
	if _, err := strconv.ParseUint(port, 10, 16); err != nil || !ok {
		return
	}
	app, err := net.Dial("tcp4", ip.String()+":"+port)
	if err != nil {
		return
	}
	defer app.Close()
	var client net.Conn = &replayed{c, hello}
	if !passthrough {
		client = tls.Server(client, g.cfg)
	}
	go func() {
		io.Copy(app, client)
		app.(*net.TCPConn).CloseWrite()
	}()
	io.Copy(client, app)
}
