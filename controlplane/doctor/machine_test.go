package doctor

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "rewrite golden files")

var now = time.Date(2026, 5, 4, 3, 0, 0, 0, time.UTC)

// machineOf is a machine where all is well, made of fakes that a test changes.
func machineOf(t *testing.T) *Host {
	t.Helper()
	cert, key := pair(t, now.Add(-30*24*time.Hour), now.Add(60*24*time.Hour), "gw.example", "*.apps.example")
	files := fstest.MapFS{
		"etc/gw/rpc.crt":                   {Data: cert, Mode: 0o644},
		"etc/gw/rpc.key":                   {Data: key, Mode: 0o600},
		"etc/gw/ca.crt":                    {Data: cert, Mode: 0o644},
		"etc/gw/token":                     {Data: []byte("x"), Mode: 0o600},
		"etc/resolv.conf":                  {Data: []byte("nameserver 192.0.2.53\nnameserver 192.0.2.54\n")},
		"etc/wireguard":                    {Mode: fs.ModeDir | 0o700},
		"data":                             {Mode: fs.ModeDir | 0o700},
		"dev/net/tun":                      {Mode: fs.ModeDevice | fs.ModeCharDevice},
		"sys/module/wireguard":             {Mode: fs.ModeDir | 0o755},
		"proc/sys/fs/nr_open":              {Data: []byte("1048576\n")},
		"proc/sys/fs/pipe-user-pages-soft": {Data: []byte("16384\n")},
		"proc/sys/net/core/somaxconn":      {Data: []byte("4096\n")},
		"proc/sys/net/ipv4/ip_unprivileged_port_start": {Data: []byte("1024\n")},
		"proc/sys/net/ipv6/conf/all/disable_ipv6":      {Data: []byte("0\n")},
		"proc/sys/net/netfilter/nf_conntrack_max":      {Data: []byte("262144\n")},
		"proc/sys/net/netfilter/nf_conntrack_count":    {Data: []byte("1000\n")},
		"proc/sys/kernel/osrelease":                    {Data: []byte("6.1.0\n")},
		"proc/self/status":                             {Data: []byte("Name:\tdoctor\nCapEff:\t000001ffffffffff\n")},
		"proc/self/exe":                                {Data: []byte("/usr/bin/dstack-gw"), Mode: fs.ModeSymlink | 0o777},
	}
	return &Host{
		FS: files, WorkDir: "/srv", Now: func() time.Time { return now },
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			near, far := net.Pipe()
			far.Close()
			return near, nil
		},
		Bind:      func(string, netip.AddrPort) error { return nil },
		FileLimit: func() (uint64, uint64, error) { return 1024, 1048576, nil },
		Space: func(string) (Space, error) {
			return Space{Free: 50 << 30, Total: 100 << 30, FreeInodes: 1e6, TotalInodes: 2e6}, nil
		},
		TryWrite:     func(string) error { return nil },
		TLSULP:       func() error { return nil },
		ClockSynced:  func() (bool, error) { return true, nil },
		AskResolver:  func(context.Context, netip.AddrPort) error { return nil },
		AgentInfo:    func(context.Context, string) ([]byte, error) { return []byte{0xab, 0xcd}, nil },
		AgentAddress: "unix:/var/run/dstack.sock",
	}
}

func (h *Host) put(path, text string) {
	h.FS.(fstest.MapFS)[path] = &fstest.MapFile{Data: []byte(text), Mode: 0o600}
}

func (h *Host) link(path, to string) {
	h.FS.(fstest.MapFS)[path] = &fstest.MapFile{Data: []byte(to), Mode: fs.ModeSymlink | 0o777}
}

func (h *Host) remove(path string) { delete(h.FS.(fstest.MapFS), path) }

// base is a configuration that loads and suits machineOf.
const base = `
address = "127.0.0.1:8010"
[tls]
key = "/etc/gw/rpc.key"
certs = "/etc/gw/rpc.crt"
[tls.mutual]
ca_certs = "/etc/gw/ca.crt"
[core.sync]
data_dir = "/data"
`

func setup(t *testing.T, text string) Setup {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "gateway.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// A layer below, so that tests can add a table [core.wg].
	etc := t.TempDir()
	if err := os.WriteFile(filepath.Join(etc, "gateway.toml"), []byte("[core.wg]\nprivate_key = \"AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, warnings, err := config.Load(config.LoadOptions{Path: path, Dir: dir, EtcDir: etc})
	// The directory differs from run to run.
	for i := range warnings {
		if warnings[i].File != "" {
			warnings[i].File = filepath.Base(warnings[i].File)
		}
	}
	return Setup{Config: c, Warnings: warnings, Err: err}
}

func configOf(t *testing.T, text string) *config.Config {
	t.Helper()
	s := setup(t, text)
	if s.Err != nil {
		t.Fatal(s.Err)
	}
	return s.Config
}

func pair(t *testing.T, from, until time.Time, names ...string) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, DNSNames: names, NotBefore: from, NotAfter: until}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func tlsPair(t *testing.T, from, until time.Time, names ...string) tls.Certificate {
	t.Helper()
	c, k := pair(t, from, until, names...)
	p, err := tls.X509KeyPair(c, k)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var errDown = errors.New("connection refused")

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", file, got, want)
	}
}

// fixed takes out of a report what differs from run to run.
func fixed(r *Report) *Report {
	r.Host, r.At = "gw-1", now
	for i := range r.Checks {
		r.Checks[i].TookMS = 0
	}
	return r
}

func find(r *Report, name string) *Entry {
	for i := range r.Checks {
		if r.Checks[i].Name == name {
			return &r.Checks[i]
		}
	}
	return nil
}

func hints(r Result) string { return strings.Join(r.Hints, "\n") }
