package dashboard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

//go:embed page
var files embed.FS

// MaxInstances is how many instances one page lists; the rest is found with the filter.
const MaxInstances = 200

// MaxKeys is how many keys of the certificate history one page lists.
const MaxKeys = 50

// Source are the RPCs whose answers the page shows.
type Source interface {
	Status(context.Context, *emptypb.Empty) (*gatewaypb.StatusResponse, error)
	GetMeta(context.Context, *emptypb.Empty) (*gatewaypb.GetMetaResponse, error)
	GetNodeStatuses(context.Context, *emptypb.Empty) (*gatewaypb.GetNodeStatusesResponse, error)
	GetGlobalConnections(context.Context, *emptypb.Empty) (*gatewaypb.GlobalConnectionsStats, error)
	WaveKvStatus(context.Context, *emptypb.Empty) (*gatewaypb.WaveKvStatusResponse, error)
	GetCertbotConfig(context.Context, *emptypb.Empty) (*gatewaypb.CertbotConfigResponse, error)
	ListDNSCredentials(context.Context, *emptypb.Empty) (*gatewaypb.ListDnsCredentialsResponse, error)
	ListZtDomains(context.Context, *emptypb.Empty) (*gatewaypb.ListZtDomainsResponse, error)
	AcmeInfo(context.Context, *emptypb.Empty) (*gatewaypb.AcmeInfoResponse, error)
}

// Options build a Dashboard.
type Options struct {
	Source  Source
	Version string
	// QueryToken returns the token of a request that was authenticated by its query (adminauth.QueryToken). May be nil.
	QueryToken func(context.Context) (string, bool)
	Now        func() time.Time // default time.Now
	Logger     *slog.Logger     // default slog.Default()
}

// Dashboard serves /, /dashboard.js and /dashboard.css; mount those three paths.
type Dashboard struct {
	o         Options
	page      *template.Template
	js, css   []byte
	assetHash string
}

// New parses the embedded page.
func New(o Options) (*Dashboard, error) {
	if o.Source == nil {
		return nil, errors.New("dashboard: there is nothing to show without a Source")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	d := &Dashboard{o: o}
	var err error
	if d.page, err = template.New("page.html").Funcs(funcs()).ParseFS(files, "page/page.html"); err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	if d.js, err = files.ReadFile("page/dashboard.js"); err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	if d.css, err = files.ReadFile("page/dashboard.css"); err != nil {
		return nil, fmt.Errorf("dashboard: %w", err)
	}
	sum := sha256.Sum256(append(append([]byte(nil), d.js...), d.css...))
	d.assetHash = hex.EncodeToString(sum[:6])
	return d, nil
}

func (d *Dashboard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET", http.StatusMethodNotAllowed)
		return
	}
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer") // the address may hold the token
	switch r.URL.Path {
	case "/":
		d.servePage(w, r)
	case "/dashboard.js":
		d.serveAsset(w, "text/javascript; charset=utf-8", d.js)
	case "/dashboard.css":
		d.serveAsset(w, "text/css; charset=utf-8", d.css)
	default:
		http.NotFound(w, r)
	}
}

func (d *Dashboard) serveAsset(w http.ResponseWriter, contentType string, data []byte) {
	w.Header().Set("Content-Type", contentType)
	// The address changes with the content.
	w.Header().Set("Cache-Control", "private, max-age=86400")
	_, _ = w.Write(data) // the client left
}

// policy allows what the page consists of and nothing else.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; " +
	"base-uri 'none'; frame-ancestors 'none'"

func (d *Dashboard) servePage(w http.ResponseWriter, r *http.Request) {
	v := d.view(r)
	var page bytes.Buffer
	if err := d.page.Execute(&page, v); err != nil {
		d.o.Logger.Error("the dashboard could not be rendered", "error", err)
		http.Error(w, "the dashboard could not be rendered: "+err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", policy)
	h.Set("Cache-Control", "no-store")
	_, _ = w.Write(page.Bytes()) // the client left
}

// part is the answer of one RPC, or why there is none.
type part[T any] struct {
	Val T
	Err string
}

func ask[T any](ctx context.Context, call func(context.Context, *emptypb.Empty) (T, error)) (p part[T]) {
	val, err := call(ctx, &emptypb.Empty{})
	if err != nil {
		p.Err = err.Error()
		return p
	}
	p.Val = val
	return p
}

// view is what the template sees.
type view struct {
	Version, AssetHash string
	Token              string
	Filter             string
	Now                time.Time

	Status      part[*gatewaypb.StatusResponse]
	Meta        part[*gatewaypb.GetMetaResponse]
	Statuses    part[*gatewaypb.GetNodeStatusesResponse]
	Connections part[*gatewaypb.GlobalConnectionsStats]
	Store       part[*gatewaypb.WaveKvStatusResponse]
	Certbot     part[*gatewaypb.CertbotConfigResponse]
	Credentials part[*gatewaypb.ListDnsCredentialsResponse]
	Domains     part[*gatewaypb.ListZtDomainsResponse]
	Acme        part[*gatewaypb.AcmeInfoResponse]

	Hosts         []*gatewaypb.HostInfo
	Matching      int
	Keys          []*gatewaypb.QuotedPublicKey
	NodeStatus    map[uint32]string
	StoreStatuses []*gatewaypb.StoreSyncStatus
}

func (d *Dashboard) view(r *http.Request) *view {
	ctx, s := r.Context(), d.o.Source
	v := &view{
		Version: d.o.Version, AssetHash: d.assetHash, Now: d.o.Now(), Filter: strings.TrimSpace(r.URL.Query().Get("q")),
		Status: ask(ctx, s.Status), Meta: ask(ctx, s.GetMeta), Statuses: ask(ctx, s.GetNodeStatuses),
		Connections: ask(ctx, s.GetGlobalConnections), Store: ask(ctx, s.WaveKvStatus), Certbot: ask(ctx, s.GetCertbotConfig),
		Credentials: ask(ctx, s.ListDNSCredentials), Domains: ask(ctx, s.ListZtDomains), Acme: ask(ctx, s.AcmeInfo),
	}
	if d.o.QueryToken != nil {
		v.Token, _ = d.o.QueryToken(ctx)
	}
	filter := strings.ToLower(v.Filter)
	for _, h := range v.Status.Val.GetHosts() {
		if filter != "" && !strings.Contains(strings.ToLower(h.GetInstanceId()+" "+h.GetAppId()+" "+h.GetIp()), filter) {
			continue
		}
		if v.Matching++; len(v.Hosts) < MaxInstances {
			v.Hosts = append(v.Hosts, h)
		}
	}
	v.Keys = v.Acme.Val.GetQuotedHistKeys()
	v.Keys = v.Keys[:min(len(v.Keys), MaxKeys)]
	v.NodeStatus = make(map[uint32]string)
	for _, e := range v.Statuses.Val.GetStatuses() {
		v.NodeStatus[e.GetNodeId()] = e.GetStatus()
	}
	for _, st := range []*gatewaypb.StoreSyncStatus{v.Store.Val.GetPersistent(), v.Store.Val.GetEphemeral()} {
		if st != nil {
			v.StoreStatuses = append(v.StoreStatuses, st)
		}
	}
	return v
}

// State is the mark on a node; nodes without one are up.
func (v *view) State(id uint32) string {
	if s := v.NodeStatus[id]; s != "" {
		return s
	}
	return "up"
}
