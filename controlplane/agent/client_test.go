package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/dstack-gw/dstack-gw/prpc"
	"github.com/dstack-gw/dstack-gw/ratls"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

func TestAddress(t *testing.T) {
	for _, tt := range []struct {
		name  string
		env   string
		there []string
		want  string
	}{
		{"both", "", []string{socket, oldSocket}, "unix:/var/run/dstack/dstack.sock"},
		{"new", "", []string{socket}, "unix:/var/run/dstack/dstack.sock"},
		{"old", "", []string{oldSocket}, "unix:/var/run/dstack.sock"},
		{"neither", "", nil, "unix:/var/run/dstack/dstack.sock"},
		{"environment", "http://10.0.0.1:8090", []string{socket, oldSocket}, "http://10.0.0.1:8090"},
		{"environment socket", "unix:/tmp/x.sock", nil, "unix:/tmp/x.sock"},
	} {
		if got := Address(tt.env, func(p string) bool { return slices.Contains(tt.there, p) }); got != tt.want {
			t.Errorf("%s: got %s", tt.name, got)
		}
	}
}

// fakeAgent is a guest agent whose KMS is a development CA.
type fakeAgent struct {
	ca      *ratls.CA
	keyArgs *guestpb.GetTlsKeyArgs
	change  func(*guestpb.GetTlsKeyResponse)
	info    *guestpb.AppInfo
	infoErr error
}

func newFakeAgent(t *testing.T) *fakeAgent {
	t.Helper()
	ca, err := ratls.NewCA(time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return &fakeAgent{ca: ca, info: &guestpb.AppInfo{AppId: []byte("app"), TcbInfo: "{}"}}
}

// handler serves what DstackGuest does, or with old what 0.5.5 does.
func (f *fakeAgent) handler(old bool) http.Handler {
	s := prpc.NewService("DstackGuest")
	prpc.Handle(s, "Info", func(context.Context, *emptypb.Empty) (*guestpb.AppInfo, error) { return f.info, f.infoErr })
	prpc.Handle(s, "GetQuote", func(_ context.Context, r *guestpb.RawQuoteArgs) (*guestpb.GetQuoteResponse, error) {
		data := append(r.ReportData, make([]byte, 64-len(r.ReportData))...)
		return &guestpb.GetQuoteResponse{Quote: []byte("quote"), EventLog: "[]", ReportData: data, VmConfig: "{}"}, nil
	})
	if !old {
		prpc.Handle(s, "Attest", func(_ context.Context, r *guestpb.RawQuoteArgs) (*guestpb.AttestResponse, error) {
			return &guestpb.AttestResponse{Attestation: r.ReportData}, nil
		})
	}
	prpc.Handle(s, "GetTlsKey", func(_ context.Context, r *guestpb.GetTlsKeyArgs) (*guestpb.GetTlsKeyResponse, error) {
		f.keyArgs = r
		cred, err := f.ca.Issue(ratls.App{
			ID: make([]byte, 20), Subject: r.Subject, Names: r.AltNames,
			ServerAuth: r.UsageServerAuth, ClientAuth: r.UsageClientAuth,
		})
		if err != nil {
			return nil, err
		}
		key, err := cred.KeyPEM()
		if err != nil {
			return nil, err
		}
		resp := &guestpb.GetTlsKeyResponse{Key: string(key), CertificateChain: cred.ChainPEM()}
		if f.change != nil {
			f.change(resp)
		}
		return resp, nil
	})
	return s.Handler(prpc.Options{})
}

func serveUnix(t *testing.T, h http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dstack.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	srv.Start()
	t.Cleanup(srv.Close)
	return "unix:" + path
}

func serveTCP(t *testing.T, h http.Handler) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}

func dial(t *testing.T, address string) *Client {
	t.Helper()
	c, err := New(address, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func TestClient(t *testing.T) {
	f := newFakeAgent(t)
	for name, address := range map[string]string{"unix": serveUnix(t, f.handler(false)), "tcp": serveTCP(t, f.handler(false))} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, address)
			info, err := c.Info(t.Context())
			if err != nil || !proto.Equal(info, f.info) {
				t.Errorf("Info: %v, %v", info, err)
			}
			report := ratls.ReportData(ratls.ReportZTCert, []byte("key"))
			quote, err := c.GetQuote(t.Context(), report[:])
			if err != nil || !bytes.Equal(quote.ReportData, report[:]) || string(quote.Quote) != "quote" {
				t.Errorf("GetQuote: %v, %v", quote, err)
			}
			// What is stored as evidence is what the agent of that age sends.
			text, err := prpc.Marshal(quote)
			want := `{"quote":"71756f7465","event_log":"[]","report_data":"` + hex.EncodeToString(report[:]) + `","vm_config":"{}"}`
			if err != nil || string(text) != want {
				t.Errorf("stored %s, %v", text, err)
			}
			att, err := c.Attest(t.Context(), report[:])
			if err != nil || !bytes.Equal(att.Attestation, report[:]) {
				t.Errorf("Attest: %v, %v", att, err)
			}
		})
	}
}

func TestClientErrors(t *testing.T) {
	f := newFakeAgent(t)
	c := dial(t, serveUnix(t, f.handler(true)))
	_, err := c.Attest(t.Context(), nil)
	se, ok := errors.AsType[*prpc.StatusError](err)
	if !ok || se.Status != 400 || se.Text != "Service not found: Attest" || strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("an old agent: %v", err)
	}
	for name, call := range map[string]func() error{
		"GetQuote": func() error { _, err := c.GetQuote(t.Context(), make([]byte, 65)); return err },
		"Attest":   func() error { _, err := c.Attest(t.Context(), make([]byte, 65)); return err },
	} {
		if err := call(); err == nil || !strings.Contains(err.Error(), name+": report data has 65 bytes") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	f.infoErr = errors.New("quote failed: device busy")
	if _, err := c.Info(t.Context()); err == nil || !strings.Contains(err.Error(), "Info: status 400: quote failed: device busy") {
		t.Errorf("got %v", err)
	}

	gone := "unix:" + filepath.Join(t.TempDir(), "gone.sock")
	if _, err := dial(t, gone).Info(t.Context()); err == nil || !strings.Contains(err.Error(), gone) || !strings.Contains(err.Error(), "DSTACK_AGENT_ADDRESS") {
		t.Errorf("the error must help: %v", err)
	}
	garbage := dial(t, serveTCP(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) })))
	if _, err := garbage.Info(t.Context()); err == nil || strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("got %v", err)
	}
	if _, err := garbage.GetQuote(t.Context(), nil); err == nil {
		t.Error("a web page is no quote")
	}
	if _, err := garbage.GetTLSKey(t.Context(), &guestpb.GetTlsKeyArgs{}); err == nil {
		t.Error("a web page is no key")
	}
	if _, err := New("ftp://x", nil); err == nil || !strings.Contains(err.Error(), "guest agent address") {
		t.Errorf("got %v", err)
	}
	secret, err := New("http://user:secret@127.0.0.1:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := secret.Info(t.Context()); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("the error shows the password: %v", err)
	}
}

func TestWriteRPCCertificate(t *testing.T) {
	f := newFakeAgent(t)
	c := dial(t, serveUnix(t, f.handler(false)))
	dir := t.TempDir()
	files := TLSFiles{Key: filepath.Join(dir, "tls.key"), Certs: filepath.Join(dir, "tls.crt"), CACerts: filepath.Join(dir, "ca.crt")}

	for _, tt := range []struct {
		myURL string
		names []string
	}{
		{"", []string{"gateway.example.org"}},
		{"https://gateway.example.org:8000", []string{"gateway.example.org"}},
		{"https://node1.example.org:8000/x", []string{"gateway.example.org", "node1.example.org"}},
		{"https://[2001:db8::1]:8000", []string{"gateway.example.org", "2001:db8::1"}},
	} {
		if err := c.WriteRPCCertificate(t.Context(), "gateway.example.org", tt.myURL, files); err != nil {
			t.Fatal(err)
		}
		want := &guestpb.GetTlsKeyArgs{
			Subject: "dstack-gateway", AltNames: tt.names,
			UsageRaTls: true, UsageServerAuth: true, UsageClientAuth: true, WithAppInfo: true,
		}
		if !proto.Equal(f.keyArgs, want) {
			t.Errorf("%s: asked for %v", tt.myURL, f.keyArgs)
		}
	}
	pair, err := tls.LoadX509KeyPair(files.Certs, files.Key)
	if err != nil || len(pair.Certificate) != 3 {
		t.Fatalf("%d certificates, %v", len(pair.Certificate), err)
	}
	data, err := os.ReadFile(files.CACerts)
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(data)
	if block == nil || !bytes.Equal(block.Bytes, f.ca.Certificate().Raw) || len(bytes.TrimSpace(rest)) != 0 {
		t.Error("the CA file is not the last certificate of the chain")
	}
	for _, path := range []string{files.Key, files.Certs, files.CACerts} {
		if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}

	// Whatever is wrong, the files of the last start stay as they are.
	before, err := os.ReadFile(files.Key)
	if err != nil {
		t.Fatal(err)
	}
	other, err := f.ca.Issue(ratls.App{ID: make([]byte, 20)})
	if err != nil {
		t.Fatal(err)
	}
	otherKey, err := other.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		myURL  string
		change func(*guestpb.GetTlsKeyResponse)
		text   string
	}{
		{"no chain", "", func(r *guestpb.GetTlsKeyResponse) { r.CertificateChain = nil }, "without a certificate"},
		{"no key", "", func(r *guestpb.GetTlsKeyResponse) { r.Key = "" }, "unusable key or chain"},
		{"another key", "", func(r *guestpb.GetTlsKeyResponse) { r.Key = string(otherKey) }, "unusable key or chain"},
		{"no certificate", "", func(r *guestpb.GetTlsKeyResponse) { r.CertificateChain[0] = "x" }, "unusable key or chain"},
		{"URL without host", "gateway:8000", nil, "my_url \"gateway:8000\" has no host"},
		{"no URL", "://", nil, "has no host"},
	} {
		f.change = tt.change
		err := c.WriteRPCCertificate(t.Context(), "gateway.example.org", tt.myURL, files)
		if err == nil || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), "RPC certificate for gateway.example.org") {
			t.Errorf("%s: got %v, want an error with %q", tt.name, err, tt.text)
		}
		if after, err := os.ReadFile(files.Key); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: the key was replaced, %v", tt.name, err)
		}
	}
	f.change = nil
	files.CACerts = filepath.Join(dir, "missing", "ca.crt")
	if err := c.WriteRPCCertificate(t.Context(), "x.example", "", files); err == nil || !strings.Contains(err.Error(), files.CACerts) {
		t.Errorf("got %v", err)
	}
	if err := dial(t, "unix:/nonexistent/x").WriteRPCCertificate(t.Context(), "x.example", "", files); err == nil {
		t.Error("no agent, no error")
	}
}

// The last certificate of a real chain verifies the first.
func TestChainVerifies(t *testing.T) {
	f := newFakeAgent(t)
	key, err := dial(t, serveTCP(t, f.handler(false))).GetTLSKey(t.Context(), &guestpb.GetTlsKeyArgs{Subject: "x", AltNames: []string{"x.example"}, UsageServerAuth: true})
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair([]byte(strings.Join(key.CertificateChain, "\n")), []byte(key.Key))
	if err != nil {
		t.Fatal(err)
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for i, der := range pair.Certificate[1:] {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			between.AddCert(cert)
		} else {
			roots.AddCert(cert)
		}
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: "x.example", Roots: roots, Intermediates: between}); err != nil {
		t.Error(err)
	}
}
