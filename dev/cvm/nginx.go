package cvm

import (
	"strings"
	"text/template"
)

// nginxTemplate serves a page on every port but PortGRPC and PortAgent. All of
// its values come from Config and hold no character that means something to
// nginx (see Config.check and the names that package dev gives).
//
// $server_addr is the address that the client, here the gateway, connected to:
// it shows that a request came through the tunnel.
const nginxTemplate = `daemon off;
user {{.User}};
worker_processes 1;
pid {{.Dir}}/nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
    access_log off;
    server_tokens off;
    default_type text/plain;
    client_body_temp_path {{.Dir}}/tmp-body;
    proxy_temp_path {{.Dir}}/tmp-proxy;
    fastcgi_temp_path {{.Dir}}/tmp-fastcgi;
    uwsgi_temp_path {{.Dir}}/tmp-uwsgi;
    scgi_temp_path {{.Dir}}/tmp-scgi;
    server {
        listen {{.HTTP}};
        listen {{.Alt}};
        location / { return 200 "{{.Name}} instance {{.Instance}} port $server_port at $server_addr\n"; }
    }
    server {
        listen {{.Proxy}} proxy_protocol;
        location / { return 200 "{{.Name}} instance {{.Instance}} port $server_port client $proxy_protocol_addr\n"; }
    }
    server {
        listen {{.TLS}} ssl http2;
        ssl_certificate {{.Dir}}/site.crt;
        ssl_certificate_key {{.Dir}}/site.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        location / { return 200 "{{.Name}} instance {{.Instance}} port $server_port TLS ends here ($ssl_protocol) for $ssl_server_name\n"; }
    }
}
`

// nginxConf is the configuration of a CVM's nginx.
func nginxConf(c *Config) (string, error) {
	t, err := template.New("nginx.conf").Parse(nginxTemplate)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	err = t.Execute(&b, struct {
		User, Dir, Name, Instance string
		HTTP, Alt, Proxy, TLS     int
	}{c.NginxUser, c.Dir, c.Name, c.InstanceID, PortHTTP, PortAlt, PortProxy, PortTLS})
	return b.String(), err
}
