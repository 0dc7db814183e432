package rpc

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/controlplane/store"
	"github.com/dstack-gw/dstack-gw/prpc"
)

// maxHistory bounds the keys in an AcmeInfo answer. Each has tens of KiB of evidence, and everybody may ask.
const maxHistory = 512

// acmeInfo is an answer, rendered once. It is immutable.
type acmeInfo struct {
	msg *gatewaypb.AcmeInfoResponse
	// at are the times of msg.QuotedHistKeys, seconds since the epoch.
	at         []uint64
	extra      acmeExtra
	json, gzip []byte
	proto      []byte
}

// acmeExtra are fields of older and other readers that the message does not have. They appear in JSON only (ops spec
// 2.2): upstream's monitors refuse an answer without hist_keys.
type acmeExtra struct {
	HistKeys   []string `json:"hist_keys"`
	ActiveCert string   `json:"active_cert,omitempty"`
	BaseDomain string   `json:"base_domain"`
}

type acmeCache struct {
	mu    sync.Mutex
	watch *store.Watcher
	cur   *acmeInfo
	// loaded is whether the certificate in cur.extra was in use; loading does not show in the store.
	loaded bool
}

// AcmeInfo shows the ACME account and the evidence for all keys of configured domains.
func (s *Server) AcmeInfo(context.Context, *emptypb.Empty) (*gatewaypb.AcmeInfoResponse, error) {
	a, err := s.acmeInfo()
	if err != nil {
		return nil, err
	}
	return a.msg, nil
}

func (s *Server) acmeInfo() (*acmeInfo, error) {
	c := &s.acme
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.watch.Ready():
		c.watch.Take()
		c.cur = nil
	default:
	}
	domain := s.cluster().agent.GetDomain()
	loaded := s.d.Certs.Get(domain) != nil
	if c.cur == nil || c.loaded != loaded || c.cur.extra.BaseDomain != domain {
		a, err := s.readAcmeInfo(domain, loaded)
		if err != nil {
			c.cur = nil
			return nil, err
		}
		c.cur, c.loaded = a, loaded
	}
	return c.cur, nil
}

func (s *Server) readAcmeInfo(domain string, loaded bool) (*acmeInfo, error) {
	a := &acmeInfo{msg: new(gatewaypb.AcmeInfoResponse), extra: acmeExtra{BaseDomain: domain}}
	text, found, err := s.d.Store.ACMECredentials()
	if err != nil {
		return nil, fmt.Errorf("failed to read the ACME credentials: %w", err)
	}
	attested, haveAttested := s.d.Store.ACMEAttestation()
	switch {
	case found:
		a.msg.AccountUri = accountURI(text)
	case haveAttested:
		a.msg.AccountUri = attested.AccountURI
	}
	if haveAttested && attested.AccountURI == a.msg.AccountUri {
		a.msg.AccountQuote, a.msg.AccountAttestation = attested.Quote, attested.Attestation
	}
	a.readHistory(s.d.Store)
	if data, ok := s.d.Store.CertData(domain); ok && loaded {
		a.extra.ActiveCert = data.CertPEM
	}
	if err := a.render(); err != nil {
		return nil, err
	}
	return a, nil
}

// accountURI is empty for text that is not the JSON of an account.
func accountURI(text string) string {
	var account struct {
		AccountID   string `json:"account_id"`
		Credentials struct {
			ID string `json:"id"`
		} `json:"credentials"`
	}
	if json.Unmarshal([]byte(text), &account) != nil {
		return ""
	}
	return cmp.Or(account.AccountID, account.Credentials.ID)
}

// readHistory takes the newest keys of all domains, up to the limit, and groups them by domain, newest first.
func (a *acmeInfo) readHistory(st *store.Store) {
	type key struct {
		domain int
		store.CertAttestation
	}
	var keys []key
	for n, d := range st.ZTDomains() {
		_, history := st.CertAttestations(d.Domain)
		for _, h := range history {
			keys = append(keys, key{n, h})
		}
	}
	newest := func(x, y key) int { return cmp.Compare(y.GeneratedAt, x.GeneratedAt) }
	if len(keys) > maxHistory {
		slices.SortStableFunc(keys, newest)
		keys = keys[:maxHistory]
	}
	slices.SortStableFunc(keys, func(x, y key) int { return cmp.Or(cmp.Compare(x.domain, y.domain), newest(x, y)) })
	for _, k := range keys {
		a.msg.QuotedHistKeys = append(a.msg.QuotedHistKeys, &gatewaypb.QuotedPublicKey{PublicKey: k.PublicKey, Quote: k.Quote, Attestation: k.Attestation})
		a.at = append(a.at, k.GeneratedAt)
	}
}

func (a *acmeInfo) render() (err error) {
	if a.json, err = a.marshalJSON(); err != nil {
		return err
	}
	if a.proto, err = proto.Marshal(a.msg); err != nil {
		return fmt.Errorf("failed to encode the ACME info: %w", err)
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, err = w.Write(a.json)
	if err = errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("failed to compress the ACME info: %w", err)
	}
	a.gzip = z.Bytes()
	return nil
}

func (a *acmeInfo) marshalJSON() ([]byte, error) {
	text, err := prpc.Marshal(a.msg)
	if err != nil {
		return nil, fmt.Errorf("failed to encode the ACME info: %w", err)
	}
	extra := a.extra
	extra.HistKeys = make([]string, len(a.msg.GetQuotedHistKeys()))
	for n, k := range a.msg.GetQuotedHistKeys() {
		extra.HistKeys[n] = hex.EncodeToString(k.GetPublicKey())
	}
	more, err := json.Marshal(extra)
	if err != nil {
		return nil, fmt.Errorf("failed to encode the ACME info: %w", err)
	}
	// Both are objects with at least one member.
	return append(append(bytes.TrimSuffix(text, []byte("}")), ','), more[1:]...), nil
}

// since gives the part of the answer that the parameters of a query ask for: keys not older than since (seconds since
// the epoch), at most limit of them, the newest of each domain first.
func (a *acmeInfo) since(query url.Values) (*acmeInfo, error) {
	var since uint64
	limit := uint64(maxHistory)
	for name, to := range map[string]*uint64{"since": &since, "limit": &limit} {
		if text := query.Get(name); text != "" {
			v, err := strconv.ParseUint(text, 10, 63)
			if err != nil {
				return nil, fmt.Errorf("%s must be a number of at most 63 bits", name)
			}
			*to = v
		}
	}
	part := &acmeInfo{extra: a.extra, msg: &gatewaypb.AcmeInfoResponse{
		AccountUri: a.msg.GetAccountUri(), AccountQuote: a.msg.GetAccountQuote(), AccountAttestation: a.msg.GetAccountAttestation(),
	}}
	for n, k := range a.msg.GetQuotedHistKeys() {
		if a.at[n] >= since && uint64(len(part.msg.QuotedHistKeys)) < limit {
			part.msg.QuotedHistKeys = append(part.msg.QuotedHistKeys, k)
		}
	}
	var err error
	part.json, err = part.marshalJSON()
	return part, err
}

// serveJSON writes the JSON answer, compressed for clients that want it so.
func (a *acmeInfo) serveJSON(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Add("Vary", "Accept-Encoding")
	body := a.json
	if len(a.gzip) > 0 && acceptsGzip(r) {
		h.Set("Content-Encoding", "gzip")
		body = a.gzip
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body) // the client left
}

func acceptsGzip(r *http.Request) bool {
	for _, v := range r.Header.Values("Accept-Encoding") {
		for coding := range strings.SplitSeq(v, ",") {
			name, params, _ := strings.Cut(strings.TrimSpace(coding), ";")
			if strings.EqualFold(strings.TrimSpace(name), "gzip") && !refusedQuality(params) {
				return true
			}
		}
	}
	return false
}

// refusedQuality recognises q=0.
func refusedQuality(params string) bool {
	_, q, ok := strings.Cut(strings.ReplaceAll(params, " ", ""), "=")
	v, err := strconv.ParseFloat(q, 64)
	return ok && err == nil && v == 0
}

// cachedAcmeInfo answers AcmeInfo from rendered bytes and leaves everything else, errors too, to next. segment is the
// method as called. The selection of the encoding is that of gateway spec 2.2.
func (s *Server) cachedAcmeInfo(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if bareMethod(r.URL.Path) != "AcmeInfo" || r.Method != http.MethodGet && r.Method != http.MethodPost {
			next.ServeHTTP(w, r)
			return
		}
		a, err := s.acmeInfo()
		if err != nil {
			next.ServeHTTP(w, r)
			return
		}
		if wantsJSON(r) {
			a.serveJSON(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Content-Length", strconv.Itoa(len(a.proto)))
		_, _ = w.Write(a.proto) // the client left
	})
}

func bareMethod(path string) string {
	m := strings.TrimPrefix(path, "/")
	for {
		n := len(m)
		for _, p := range gatewayPrefixes() {
			m = strings.TrimPrefix(m, p)
		}
		if len(m) == n {
			return m
		}
	}
}

func wantsJSON(r *http.Request) bool {
	if r.Method == http.MethodGet {
		return true
	}
	if q := r.URL.Query(); q.Has("json") {
		if v := q.Get("json"); v == "" || v == "1" || v == "true" {
			return true
		}
	}
	media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return err == nil && media == "application/json"
}
