package rpc

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	"github.com/dstack-gw/dstack-gw/prpc"
)

func TestRedact(t *testing.T) {
	for secret, want := range map[string]string{
		"": "", "a": "*", "12345678": "********", "123456789": "1234...6789", "abcdefghijklmnop": "abcd...mnop",
		"äöüß": "****", "äöüß12345äöüß": "äöüß...äöüß",
	} {
		if got := redact(secret); got != want {
			t.Errorf("%q: %q, want %q", secret, got, want)
		}
	}
}

func TestCredentialID(t *testing.T) {
	now := time.UnixMilli(1700000000123)
	id := credentialID(now)
	if !regexp.MustCompile(`^18bcfe5687b[0-9a-f]{8}$`).MatchString(id) {
		t.Errorf("id %q", id)
	}
	if id == credentialID(now) {
		t.Error("the same id twice")
	}
}

func (f *fixture) createCredential(body string) *gatewaypb.DnsCredentialInfo {
	f.t.Helper()
	info := new(gatewaypb.DnsCredentialInfo)
	if err := prpc.Unmarshal([]byte(f.ok(f.admin, "CreateDnsCredential", body)), info); err != nil {
		f.t.Fatal(err)
	}
	return info
}

func TestDNSCredentials(t *testing.T) {
	f := newFixture(t, nil)
	f.equal(f.admin, "ListDnsCredentials", "", `{"credentials":[],"default_id":null}`)
	f.equal(f.admin, "GetDefaultDnsCredential", "", `{"default_id":"","credential":null}`)

	one := f.createCredential(`{"name":"main","provider_type":"cloudflare","cf_api_token":" cf-token-0123456789\n","cf_zone_id":"ignored","set_as_default":true}`)
	oneJSON := `{"id":"` + one.GetId() + `","name":"main","provider_type":"cloudflare","cf_api_token":"cf-t...6789","cf_api_url":"","dns_txt_ttl":60,"max_dns_wait":300,"created_at":1700000000,"updated_at":1700000000}`
	f.equal(f.admin, "GetDnsCredential", `{"id":"`+one.GetId()+`"}`, oneJSON)
	f.equal(f.admin, "GetDefaultDnsCredential", "", `{"default_id":"`+one.GetId()+`","credential":`+oneJSON+`}`)
	f.clock.advance(time.Second)
	two := f.createCredential(`{"name":"test","provider_type":"cloudflare","cf_api_token":"tok","cf_api_url":"http://mock:8080/client/v4","dns_txt_ttl":1,"max_dns_wait":4294967295}`)
	twoJSON := `{"id":"` + two.GetId() + `","name":"test","provider_type":"cloudflare","cf_api_token":"***","cf_api_url":"http://mock:8080/client/v4","dns_txt_ttl":1,"max_dns_wait":4294967295,"created_at":1700000001,"updated_at":1700000001}`
	f.equal(f.admin, "ListDnsCredentials", "", `{"credentials":[`+oneJSON+`,`+twoJSON+`],"default_id":"`+one.GetId()+`"}`)

	// What is stored is the token itself.
	c, ok := f.store.DNSCredential(one.GetId())
	if !ok || c.Settings["api_token"] != "cf-token-0123456789" || c.Settings["api_url"] != "" || c.Provider != "cloudflare" || c.MaxWait != 300*time.Second {
		t.Errorf("stored %v %v %v", c, len(c.Settings["api_token"]), c.MaxWait)
	}

	f.clock.advance(time.Second)
	f.equal(f.admin, "UpdateDnsCredential", `{"id":"`+two.GetId()+`","name":"renamed","cf_zone_id":"ignored"}`,
		strings.Replace(strings.Replace(twoJSON, `"test"`, `"renamed"`, 1), `"updated_at":1700000001`, `"updated_at":1700000002`, 1))
	f.ok(f.admin, "UpdateDnsCredential", `{"id":"`+two.GetId()+`","cf_api_token":"another-token","cf_api_url":""}`)
	c, _ = f.store.DNSCredential(two.GetId())
	if _, has := c.Settings["api_url"]; has || c.Settings["api_token"] != "another-token" || c.Name != "renamed" || c.CreatedAt != 1700000001 || c.TXTTTL != 1 {
		t.Error("the update did not do what it was told")
	}

	// Deletion is refused while somebody needs the credential.
	f.ok(f.admin, "AddZtDomain", `{"domain":"app.example.com","port":443,"dns_cred_id":"`+two.GetId()+`"}`)
	for id, why := range map[string]string{one.GetId(): "default", two.GetId(): "app.example.com"} {
		if code, out := f.ask(f.admin, "DeleteDnsCredential", `{"id":"`+id+`"}`); code != 400 || !strings.Contains(out, "failed to delete the dns credential: ") || !strings.Contains(out, why) {
			t.Errorf("%d %s, want a reason with %q", code, out, why)
		}
	}
	f.ok(f.admin, "SetDefaultDnsCredential", `{"id":"`+two.GetId()+`"}`)
	f.equal(f.admin, "DeleteDnsCredential", `{"id":"`+one.GetId()+`"}`, "null")
	if _, ok := f.store.DNSCredential(one.GetId()); ok {
		t.Error("still stored")
	}
	if log := f.log.String(); strings.Contains(log, "another-token") || strings.Contains(log, "0123456789") {
		t.Error("a token is in the log")
	}
}

func TestDNSCredentialRefusals(t *testing.T) {
	f := newFixture(t, nil)
	create := func(extra string) string {
		return `{"name":"n","provider_type":"cloudflare","cf_api_token":"token-hunter2"` + extra + `}`
	}
	for _, tc := range []struct{ method, body, want string }{
		{"CreateDnsCredential", `{"name":"n","cf_api_token":"t"}`, "unsupported provider type: "},
		{"CreateDnsCredential", `{"name":"n","provider_type":"route53","cf_api_token":"t"}`, "unsupported provider type: route53"},
		{"CreateDnsCredential", `{"name":"n","provider_type":"Cloudflare","cf_api_token":"t"}`, "unsupported provider type: Cloudflare"},
		{"CreateDnsCredential", create(`,"dns_txt_ttl":0`), "dns_txt_ttl must be greater than zero"},
		{"CreateDnsCredential", create(`,"max_dns_wait":0`), "max_dns_wait must be greater than zero"},
		{"CreateDnsCredential", `{"name":"n","provider_type":"cloudflare","cf_api_token":"  "}`, "cf_api_token must not be empty"},
		{"CreateDnsCredential", `{"name":"n","provider_type":"cloudflare","cf_api_token":"a\nb"}`, "cf_api_token contains characters that no HTTP header can carry"},
		{"CreateDnsCredential", create(`,"cf_api_url":"mock:8080"`), "cf_api_url must begin with http:// or https:// and name a host"},
		{"CreateDnsCredential", create(`,"cf_api_url":"http://h:hunter2"`), `cf_api_url is not a URL: invalid port ":hunter2" after host`},
		{"GetDnsCredential", `{"id":"none"}`, "dns credential not found"},
		{"GetDnsCredential", `{}`, "dns credential not found"},
		{"UpdateDnsCredential", `{"id":"none","name":"x"}`, "dns credential not found"},
		{"UpdateDnsCredential", `{"id":"none","cf_api_token":""}`, "cf_api_token must not be empty"},
		{"UpdateDnsCredential", `{"id":"none","cf_api_url":"x"}`, "cf_api_url must begin with http:// or https:// and name a host"},
		{"DeleteDnsCredential", `{"id":"none"}`, "dns credential not found"},
		{"SetDefaultDnsCredential", `{"id":"none"}`, "dns credential not found"},
	} {
		f.refused(f.admin, tc.method, tc.body, tc.want)
	}
	if n := len(f.store.DNSCredentials()); n != 0 {
		t.Errorf("%d credentials are stored", n)
	}
}

func TestDomains(t *testing.T) {
	f := newFixture(t, nil)
	cred := f.createCredential(`{"name":"n","provider_type":"cloudflare","cf_api_token":"t"}`).GetId()
	noCert := `"cert_status":{"has_cert":false,"not_after":0,"issued_by":0,"issued_at":0,"loaded_in_memory":false}}`
	f.equal(f.admin, "ListZtDomains", "", `{"domains":[]}`)
	app := `{"config":{"domain":"app.example.com","dns_cred_id":null,"port":443,"node":null,"priority":0},` + noCert
	f.equal(f.admin, "AddZtDomain", `{"domain":"  *.App.Example.COM. ","port":443}`, app)
	zoo := `{"config":{"domain":"zoo.example.com","dns_cred_id":"` + cred + `","port":65535,"node":7,"priority":-5},` + noCert
	f.equal(f.admin, "AddZtDomain", `{"domain":"zoo.example.com","port":65535,"node":7,"priority":-5,"dns_cred_id":"`+cred+`"}`, zoo)
	f.equal(f.admin, "ListZtDomains", "", `{"domains":[`+app+`,`+zoo+`]}`)
	f.equal(f.admin, "GetZtDomain", `{"domain":"*.APP.example.com"}`, app)
	if f.domains.Load() != 2 {
		t.Errorf("told of %d changes", f.domains.Load())
	}
	changed := strings.Replace(strings.Replace(zoo, "65535", "8443", 1), `"node":7`, `"node":null`, 1)
	f.equal(f.admin, "UpdateZtDomain", `{"domain":"ZOO.example.com","port":8443,"priority":-5,"dns_cred_id":"`+cred+`"}`, changed)

	cert := testCertificate(t, "app.example.com", f.clock.now())
	if err := f.store.PutCertData(t.Context(), "app.example.com", cert, nil); err != nil {
		t.Fatal(err)
	}
	withCert := func(loaded string) string {
		return strings.Replace(app, noCert, `"cert_status":{"has_cert":true,"not_after":1707776000,"issued_by":1,"issued_at":1700000000,"loaded_in_memory":`+loaded+`}}`, 1)
	}
	f.equal(f.admin, "GetZtDomain", `{"domain":"app.example.com"}`, withCert("false"))
	f.equal(f.admin, "ReloadCert", "", "null")
	f.equal(f.admin, "GetZtDomain", `{"domain":"app.example.com"}`, withCert("true"))

	// Deleting forgets the configuration only.
	f.equal(f.admin, "DeleteZtDomain", `{"domain":"App.Example.com."}`, "null")
	f.refused(f.admin, "GetZtDomain", `{"domain":"app.example.com"}`, "ZT-Domain config not found")
	if _, ok := f.store.CertData("app.example.com"); !ok || f.certs.Get("app.example.com") == nil {
		t.Error("the certificate is gone")
	}
	if f.domains.Load() != 5 {
		t.Errorf("told of %d changes, want 2 added, 1 changed, 1 reload, 1 deleted", f.domains.Load())
	}
}

func TestDomainRefusals(t *testing.T) {
	f := newFixture(t, nil)
	f.ok(f.admin, "AddZtDomain", `{"domain":"app.example.com","port":443}`)
	told := f.domains.Load()
	const badName, badLabel = "domain must be a non-empty ASCII DNS name of at most 253 bytes", "domain contains an invalid DNS label"
	for _, tc := range []struct{ method, body, want string }{
		{"AddZtDomain", `{"domain":"app.example.com","port":443}`, "ZT-Domain config already exists: app.example.com"},
		{"AddZtDomain", `{"domain":"*.APP.example.com.","port":443}`, "ZT-Domain config already exists: app.example.com"},
		{"AddZtDomain", `{"port":443}`, badName},
		{"AddZtDomain", `{"domain":"  ","port":443}`, badName},
		{"AddZtDomain", `{"domain":"münchen.example","port":443}`, badName},
		{"AddZtDomain", `{"domain":"` + strings.Repeat("a.", 127) + `com","port":443}`, badName},
		{"AddZtDomain", `{"domain":"-a.example","port":443}`, badLabel},
		{"AddZtDomain", `{"domain":"a..example","port":443}`, badLabel},
		{"AddZtDomain", `{"domain":"a_b.example","port":443}`, badLabel},
		{"AddZtDomain", `{"domain":"` + strings.Repeat("a", 64) + `.example","port":443}`, badLabel},
		{"AddZtDomain", `{"domain":"new.example"}`, "port must be between 1 and 65535"},
		{"AddZtDomain", `{"domain":"new.example","port":0}`, "port must be between 1 and 65535"},
		{"AddZtDomain", `{"domain":"new.example","port":65536}`, "port out of range"},
		{"AddZtDomain", `{"domain":"new.example","port":443,"dns_cred_id":"none"}`, "specified dns credential not found"},
		{"UpdateZtDomain", `{"domain":"new.example","port":443}`, "ZT-Domain config not found"},
		{"UpdateZtDomain", `{"domain":"app.example.com","port":443,"dns_cred_id":"none"}`, "specified dns credential not found"},
		{"UpdateZtDomain", `{"domain":"app.example.com"}`, "port must be between 1 and 65535"},
		{"GetZtDomain", `{"domain":"new.example"}`, "ZT-Domain config not found"},
		{"GetZtDomain", `{}`, badName},
		{"DeleteZtDomain", `{"domain":"new.example"}`, "ZT-Domain config not found"},
		{"DeleteZtDomain", `{"domain":""}`, badName},
		{"ListCertAttestations", `{"domain":"a/b"}`, badLabel},
		{"ForceReleaseCertLock", `{"domain":""}`, "domain must not be empty and must not contain a slash"},
		{"ForceReleaseCertLock", `{"domain":"x/config"}`, "domain must not be empty and must not contain a slash"},
		{"RenewZtDomainCert", `{"domain":"new.example"}`, "ZT-Domain config not found"},
		{"RenewZtDomainCert", `{"domain":"APP.example.com"}`, "ZT-Domain config not found"},
	} {
		f.refused(f.admin, tc.method, tc.body, tc.want)
	}
	if n := len(f.store.ZTDomains()); n != 1 || f.domains.Load() != told {
		t.Errorf("%d domains, %d changes told", n, f.domains.Load()-told)
	}
}

func TestIssuanceIsRefusedHonestly(t *testing.T) {
	f := newFixture(t, nil)
	f.ok(f.admin, "AddZtDomain", `{"domain":"app.example.com","port":443}`)
	for method, body := range map[string]string{"RenewCert": "", "SetCaa": "", "RotateAcmeCredentials": "", "RenewZtDomainCert": `{"domain":"app.example.com","force":true}`} {
		code, out := f.ask(f.admin, method, body)
		var e struct{ Error string }
		if err := json.Unmarshal([]byte(out), &e); err != nil || code != 400 {
			t.Fatalf("%s: %d %s", method, code, out)
		}
		if what, todo, ok := strings.Cut(e.Error, "not configured: automatic certificate issuance is not part of this release"); what != "" || !ok || !strings.Contains(todo, "; ") {
			t.Errorf("%s: %s", method, e.Error)
		}
	}
}

func TestCertbotConfig(t *testing.T) {
	f := newFixture(t, nil)
	f.equal(f.admin, "GetCertbotConfig", "", `{"renew_interval_secs":43200,"renew_before_expiration_secs":2592000,"renew_timeout_secs":300,"acme_url":""}`)
	f.equal(f.admin, "SetCertbotConfig", `{"acme_url":"https://acme-staging-v02.api.letsencrypt.org/directory"}`, "null")
	f.equal(f.admin, "SetCertbotConfig", `{"renew_interval_secs":0,"renew_timeout_secs":60}`, "null")
	f.equal(f.admin, "GetCertbotConfig", "", `{"renew_interval_secs":0,"renew_before_expiration_secs":2592000,"renew_timeout_secs":60,"acme_url":"https://acme-staging-v02.api.letsencrypt.org/directory"}`)
	f.equal(f.admin, "SetCertbotConfig", `{"acme_url":"","renew_before_expiration_secs":18446744073709551615}`, "null")
	f.equal(f.admin, "GetCertbotConfig", "", `{"renew_interval_secs":0,"renew_before_expiration_secs":9223372036,"renew_timeout_secs":60,"acme_url":""}`)
	f.equal(f.admin, "SetCertbotConfig", "", "null")
	f.refused(f.admin, "SetCertbotConfig", `{"acme_url":"letsencrypt.org"}`, "acme_url must begin with http:// or https:// and name a host")
	f.refused(f.admin, "SetCertbotConfig", `{"acme_url":"https://h:x"}`, `acme_url is not a URL: invalid port ":x" after host`)
}
