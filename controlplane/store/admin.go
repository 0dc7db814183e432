package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
)

// Admin writes are transactions: they happen as a whole under the conditions they were meant for, or are refused. While
// etcd cannot be written they fail with ErrNotWritable. An error after the transaction was sent says that its outcome
// is not known; all of them can be repeated.

// write is one key's part of a transaction; a nil record deletes.
type write struct {
	key    string
	record any
}

// condition is something that must hold at the moment of the transaction, and the error if it does not.
type condition struct {
	cmp clientv3.Cmp
	err error
}

func absent(key string) condition {
	return condition{clientv3.Compare(clientv3.CreateRevision(key), "=", 0), ErrExists}
}

func present(key string, err error) condition {
	return condition{clientv3.Compare(clientv3.CreateRevision(key), ">", 0), err}
}

var errChanged = errors.New("changed meanwhile")

func unchanged(key string, rev int64) condition {
	return condition{clientv3.Compare(clientv3.ModRevision(key), "=", rev), errChanged}
}

// transact writes under conditions. what names the action in errors.
func (s *Store) transact(ctx context.Context, what string, writes []write, conditions ...condition) error {
	b, err := s.writableBackend()
	if err != nil {
		return fmt.Errorf("store: %s: %w", what, err)
	}
	ops := make([]op, len(writes))
	for n, w := range writes {
		ops[n] = op{key: w.key, at: s.opts.Now().UnixMilli()}
		if w.record == nil {
			continue
		}
		if value, ok := s.mirror.get(w.key); ok {
			ops[n].at = max(ops[n].at, writtenAt(value)+1)
		}
		if ops[n].value, err = s.codec.encode(w.key, ops[n].at, w.record); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.WriteTimeout)
	defer cancel()
	cmps := make([]clientv3.Cmp, len(conditions))
	for n, c := range conditions {
		cmps[n] = c.cmp
	}
	then := etcdOps(ops)
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return b.kv.Txn(ctx).If(cmps...).Then(then...).Commit()
	})
	if errors.Is(err, rpctypes.ErrNoSpace) {
		s.setDown(err)
		s.wake() // to make room
		return fmt.Errorf("store: %s: %w: %w", what, ErrNotWritable, err)
	}
	if refused(err) {
		return fmt.Errorf("store: %s: etcd refuses the change: %w", what, err)
	}
	if err != nil {
		return fmt.Errorf("store: %s: it is not known whether the change was made, look and repeat: %w", what, err)
	}
	if resp.Succeeded {
		s.mirror.committed(ops, resp.Header.Revision)
		return nil
	}
	// Which condition failed? Each alone tells; one that holds again by now leaves the general answer.
	for _, c := range conditions {
		r, err := call(ctx, b, func(ctx context.Context) (*clientv3.TxnResponse, error) { return b.kv.Txn(ctx).If(c.cmp).Commit() })
		if err != nil {
			return fmt.Errorf("store: %s: not done, and the reason cannot be found: %w", what, err)
		}
		if !r.Succeeded {
			return fmt.Errorf("store: %s: %w", what, c.err)
		}
	}
	return fmt.Errorf("store: %s: %w", what, errChanged)
}

// refused tells etcd's own refusals, after which nothing was written, from errors that leave the outcome open.
func refused(err error) bool {
	var e rpctypes.EtcdError
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code() {
	case codes.ResourceExhausted, codes.InvalidArgument, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated:
		return true
	}
	return false
}

// fetch reads one key from etcd itself.
func (s *Store) fetch(ctx context.Context, what, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	b, err := s.writableBackend()
	if err != nil {
		return nil, fmt.Errorf("store: %s: %w", what, err)
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.WriteTimeout)
	defer cancel()
	resp, err := call(ctx, b, func(ctx context.Context) (*clientv3.GetResponse, error) { return b.kv.Get(ctx, key, opts...) })
	if err != nil {
		return nil, fmt.Errorf("store: %s: reading %s: %w", what, key, err)
	}
	return resp, nil
}

// retryChanged repeats f while others change the same records.
func retryChanged(f func() error) error {
	for try := 1; ; try++ {
		if err := f(); !errors.Is(err, errChanged) || try == 10 {
			return err
		}
	}
}

// update changes the record of a key; found tells change whether there was one.
func update[T any](ctx context.Context, s *Store, what, key string, change func(record *T, found bool) error, conditions func(T) []condition) error {
	return retryChanged(func() error {
		resp, err := s.fetch(ctx, what, key)
		if err != nil {
			return err
		}
		var record T
		var rev int64
		if len(resp.Kvs) > 0 {
			rev = resp.Kvs[0].GetModRevision()
			if err := s.codec.decode(key, resp.Kvs[0].GetValue(), &record); err != nil {
				return err
			}
		}
		if err := change(&record, rev > 0); err != nil {
			return fmt.Errorf("store: %s: %w", what, err)
		}
		all := []condition{unchanged(key, rev)}
		if conditions != nil {
			all = append(all, conditions(record)...)
		}
		return s.transact(ctx, what, []write{{key, record}}, all...)
	})
}

// CreateDNSCredential stores a new credential and makes it the default if asked to. ErrExists if the id is taken.
func (s *Store) CreateDNSCredential(ctx context.Context, c DNSCredential, makeDefault bool) error {
	if err := checkName("credential id", c.ID); err != nil {
		return err
	}
	key := dnsCredentialKey(c.ID)
	writes := []write{{key, dnsCredentialRecord{c, secs(c.MaxWait)}}}
	if makeDefault {
		writes = append(writes, write{KeyDefaultDNSCredential, defaultCredentialRecord{c.ID}})
	}
	return s.transact(ctx, "creating DNS credential "+c.ID, writes, absent(key))
}

// UpdateDNSCredential changes a credential and returns it. ErrNotFound if it is not there. change may be called again
// when somebody else was faster.
func (s *Store) UpdateDNSCredential(ctx context.Context, id string, change func(*DNSCredential) error) (DNSCredential, error) {
	var out DNSCredential
	err := update(ctx, s, "changing DNS credential "+id, dnsCredentialKey(id), func(r *dnsCredentialRecord, found bool) error {
		if !found {
			return ErrNotFound
		}
		out = r.credential(id)
		if err := change(&out); err != nil {
			return err
		}
		out.ID = id
		*r = dnsCredentialRecord{out, secs(out.MaxWait)}
		return nil
	}, nil)
	if err != nil {
		return DNSCredential{}, err
	}
	return out, nil
}

// DeleteDNSCredential removes a credential. ErrInUse if it is the default or a domain names it, ErrNotFound if it is not
// there; both are decided together with the deletion.
func (s *Store) DeleteDNSCredential(ctx context.Context, id string) error {
	what := "deleting DNS credential " + id
	return retryChanged(func() error {
		def, err := s.fetch(ctx, what, KeyDefaultDNSCredential)
		if err != nil {
			return err
		}
		var defRev int64
		if len(def.Kvs) > 0 {
			defRev = def.Kvs[0].GetModRevision()
			var r defaultCredentialRecord
			if err := s.codec.decode(KeyDefaultDNSCredential, def.Kvs[0].GetValue(), &r); err != nil {
				return err
			}
			if r.ID == id {
				return fmt.Errorf("store: %s: %w: it is the default credential", what, ErrInUse)
			}
		}
		certs, err := s.fetch(ctx, what, PrefixCerts, clientv3.WithPrefix())
		if err != nil {
			return err
		}
		for _, kv := range certs.Kvs {
			if used, domain := s.usesCredential(kv, id); used {
				return fmt.Errorf("store: %s: %w: domain %s names it", what, ErrInUse, domain)
			}
		}
		return s.transact(ctx, what, []write{{dnsCredentialKey(id), nil}},
			present(dnsCredentialKey(id), ErrNotFound),
			unchanged(KeyDefaultDNSCredential, defRev),
			// No domain was added or changed since we looked.
			condition{clientv3.Compare(clientv3.ModRevision(PrefixCerts), "<", certs.Header.Revision+1).WithPrefix(), errChanged})
	})
}

func (s *Store) usesCredential(kv *mvccpb.KeyValue, id string) (bool, string) {
	kind, domain := parseKey(string(kv.GetKey()))
	if kind != KindZTDomain {
		return false, ""
	}
	var d ZTDomain
	return s.codec.decode(string(kv.GetKey()), kv.GetValue(), &d) == nil && d.DNSCredID == id, domain
}

// SetDefaultDNSCredential makes an existing credential the default. ErrNotFound if it is not there.
func (s *Store) SetDefaultDNSCredential(ctx context.Context, id string) error {
	return s.transact(ctx, "setting the default DNS credential "+id, []write{{KeyDefaultDNSCredential, defaultCredentialRecord{id}}},
		present(dnsCredentialKey(id), ErrNotFound))
}

// UpdateCertbotConfig changes the settings of issuance, beginning with the defaults, and returns them.
func (s *Store) UpdateCertbotConfig(ctx context.Context, change func(*CertbotConfig) error) (CertbotConfig, error) {
	var out CertbotConfig
	err := update(ctx, s, "changing the certbot configuration", KeyCertbotConfig, func(r *certbotConfigRecord, found bool) error {
		if out = DefaultCertbotConfig(); found {
			out = r.config()
		}
		if err := change(&out); err != nil {
			return err
		}
		*r = certbotConfigRecord{secs(out.RenewInterval), secs(out.RenewBefore), secs(out.RenewTimeout), out.ACMEURL}
		return nil
	}, nil)
	if err != nil {
		return CertbotConfig{}, err
	}
	return out, nil
}

// ErrNoCredential: a domain names a DNS credential that is not there.
var ErrNoCredential = errors.New("specified dns credential not found")

func credentialThere(d ZTDomain) []condition {
	if d.DNSCredID == "" {
		return nil
	}
	return []condition{present(dnsCredentialKey(d.DNSCredID), ErrNoCredential)}
}

// CreateZTDomain stores a new base domain. ErrExists if it is there, ErrNoCredential if it names a missing credential.
func (s *Store) CreateZTDomain(ctx context.Context, d ZTDomain) error {
	if err := checkName("domain", d.Domain); err != nil {
		return err
	}
	key := certKey(d.Domain, "config")
	return s.transact(ctx, "adding domain "+d.Domain, []write{{key, d}}, append([]condition{absent(key)}, credentialThere(d)...)...)
}

// UpdateZTDomain replaces the configuration of a base domain. ErrNotFound if it is not there, ErrNoCredential as above.
func (s *Store) UpdateZTDomain(ctx context.Context, d ZTDomain) error {
	if err := checkName("domain", d.Domain); err != nil {
		return err
	}
	key := certKey(d.Domain, "config")
	return s.transact(ctx, "changing domain "+d.Domain, []write{{key, d}}, append([]condition{present(key, ErrNotFound)}, credentialThere(d)...)...)
}

// DeleteZTDomain removes the configuration of a base domain; certificate and attestations stay. ErrNotFound if it is
// not there.
func (s *Store) DeleteZTDomain(ctx context.Context, domain string) error {
	key := certKey(domain, "config")
	return s.transact(ctx, "deleting domain "+domain, []write{{key, nil}}, present(key, ErrNotFound))
}

// CreateACMECredentials stores the first account. ErrExists if there is one: use that.
func (s *Store) CreateACMECredentials(ctx context.Context, text string, fence *Lock) error {
	return s.transact(ctx, "storing the new ACME account", []write{{KeyACMECredentials, acmeCredentialsRecord{text}}}, fence.guard(absent(KeyACMECredentials))...)
}

// ReplaceACMECredentials stores another account. fence may be nil.
func (s *Store) ReplaceACMECredentials(ctx context.Context, text string, fence *Lock) error {
	return s.transact(ctx, "replacing the ACME account", []write{{KeyACMECredentials, acmeCredentialsRecord{text}}}, fence.guard()...)
}

// PutACMEAttestation stores the attestation of the account.
func (s *Store) PutACMEAttestation(ctx context.Context, a ACMEAttestation) error {
	return s.transact(ctx, "storing the attestation of the ACME account", []write{{KeyACMEAttestation, a}})
}

// PutCertData stores a certificate. With a fence the write is refused with ErrFenced once the lock is lost, so that a
// node that was asleep cannot overwrite a younger certificate; fence may be nil.
func (s *Store) PutCertData(ctx context.Context, domain string, c CertData, fence *Lock) error {
	if err := checkName("domain", domain); err != nil {
		return err
	}
	return s.transact(ctx, "storing the certificate of "+domain, []write{{certKey(domain, "data"), c}}, fence.guard()...)
}

// AddCertAttestation stores an attestation as the latest one and in the history, of which the newest keep entries
// remain (at least one). Entries younger than notBefore remain too: their certificates may still be in use.
func (s *Store) AddCertAttestation(ctx context.Context, domain string, a CertAttestation, keep int, notBefore time.Time) error {
	if err := checkName("domain", domain); err != nil {
		return err
	}
	dir := PrefixCerts + domain + attestationDir
	mine := fmt.Sprintf("%s%d", dir, a.GeneratedAt)
	writes := []write{{dir + "latest", a}, {mine, a}}
	left := max(keep, 1) - 1
	for _, h := range s.attestationKeys(domain) {
		switch {
		case h.key == mine:
		case left > 0:
			left--
		case h.at < uint64(max(notBefore.Unix(), 0)) && len(writes) < maxBatch:
			writes = append(writes, write{h.key, nil})
		}
	}
	return s.transact(ctx, "storing the attestation of "+domain, writes)
}
