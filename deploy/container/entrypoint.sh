#!/bin/sh
# Entry point of the gateway's container: turns environment variables into
# gateway.toml and starts the gateway. The variables and what they become are those
# of the official dstack-gateway image, so that one image can replace the other in an
# unchanged deployment; docs/operations.md has the table.
#
# Secrets stay in files of mode 0600 and in the environment: they are passed between
# processes through pipes only, never as arguments.
set -eu
umask 077
LC_ALL=C # [[:cntrl:]] and [[:digit:]] are about bytes

DATA=/data
CONFIG=$DATA/gateway/gateway.toml
KEY=$DATA/gateway/wg.key

die() {
	printf 'dstack-gw entrypoint: %s\n' "$*" >&2
	exit 1
}

# get VAR DEFAULT prints the value of a variable; an empty one counts as unset, as
# compose files write them.
get() {
	eval "v=\${$1:-}"
	printf '%s' "${v:-$2}"
}

# text VAR DEFAULT prints a TOML string. A quote in a value has always been refused;
# no value can need one.
text() {
	eval "v=\${$1:-}"
	v=${v:-$2}
	case $v in
	*\"*) die "$1 contains a double quote, which no value of the gateway can: remove it from the environment" ;;
	*[[:cntrl:]]*) die "$1 contains a line break or another control character: remove it from the environment" ;;
	esac
	case $v in
	*\\*) v=$(printf '%s' "$v" | sed 's/\\/\\\\/g') ;; # the only other character that TOML wants escaped
	esac
	printf '"%s"' "$v"
}

# need VAR WHY is text for what the gateway cannot start without.
need() {
	[ -n "$(get "$1" '')" ] || die "$1 is not set: $2"
	text "$1" ''
}

# number VAR DEFAULT prints a TOML integer.
number() {
	eval "v=\${$1:-}"
	v=${v:-$2}
	case $v in
	'' | *[!0-9]*) die "$1 is \"$v\", want a number without sign" ;;
	esac
	# TOML has no leading zeros.
	while [ "${v#0}" != "$v" ] && [ "$v" != 0 ]; do v=${v#0}; done
	printf '%s' "$v"
}

# truth VAR DEFAULT prints a TOML boolean.
truth() {
	eval "v=\${$1:-}"
	v=${v:-$2}
	case $v in
	true | false) printf '%s' "$v" ;;
	*) die "$1 is \"$v\", want true or false" ;;
	esac
}

# tunnel_key makes the WireGuard key on the first start. It is on the volume because
# guests know its public half: another key cuts off every CVM until it registers again.
tunnel_key() {
	if [ ! -s "$KEY" ]; then
		wg genkey >"$KEY.new" || die "wg genkey failed: cannot make a WireGuard key in $KEY"
		mv "$KEY.new" "$KEY"
	fi
	chmod 600 "$KEY"
	public=$(wg pubkey <"$KEY") || die "$KEY holds no WireGuard private key: restore it from a backup, or remove it to get a new one (every CVM then has to register again)"
	private=$(tr -d '[:space:]' <"$KEY")
}

render() {
	cat <<-TOML
		# Written by the container's entry point at every start. Change the environment instead,
		# or add what it has no variable for with DSTACK_GW_CONFIG (base64 of TOML).
		keep_alive = 10
		log_level = "info"
		address = "0.0.0.0:8000"

		[tls]
		key = "$DATA/gateway/certs/gateway-rpc.key"
		certs = "$DATA/gateway/certs/gateway-rpc.cert"

		[tls.mutual]
		ca_certs = "$DATA/gateway/certs/gateway-ca.cert"
		mandatory = false

		[core]
		set_ulimit = true
		rpc_domain = $rpc_domain

		[core.sync]
		enabled = $sync_enabled
		node_id = $node_id
		interval = $sync_interval
		timeout = $sync_timeout
		my_url = $my_url
		bootnode = $bootnode
		data_dir = "$DATA"
		persist_interval = $sync_persist_interval
		sync_connections_enabled = $sync_connections_enabled
		sync_connections_interval = $sync_connections_interval

		[core.admin]
		enabled = true
		address = $admin_address
		port = $admin_port
		auth_token = $admin_token

		[core.wg]
		private_key = "$private"
		public_key = "$public"
		listen_port = 51820
		ip = $wg_ip
		reserved_net = [$wg_reserved_net]
		client_ip_range = $wg_client_range
		config_path = "$DATA/wireguard/wg-ds-gw.conf"
		interface = "wg-ds-gw"
		endpoint = $wg_endpoint

		[core.proxy]
		tls_crypto_provider = "aws-lc-rs"
		tls_versions = ["1.2"]
		listen_addr = "0.0.0.0"
		listen_port = $proxy_port
		connect_top_n = 3
		app_address_ns_compat = true
		workers = $proxy_workers
		max_connections_per_app = $max_connections_per_app
		inbound_pp_enabled = $inbound_pp

		[core.proxy.timeouts]
		connect = $timeout_connect
		handshake = $timeout_handshake
		cache_top_n = $timeout_cache_top_n
		handshake_stale = $timeout_handshake_stale
		dns_resolve = $timeout_dns_resolve
		data_timeout_enabled = $timeout_data_enabled
		idle = $timeout_idle
		write = $timeout_write
		shutdown = $timeout_shutdown
		total = $timeout_total
		pp_header = $timeout_pp_header

		[core.proxy.port_policy_fetch]
		timeout = $fetch_timeout
		max_retries = $fetch_max_retries
		backoff_initial = $fetch_backoff_initial
		backoff_max = $fetch_backoff_max

		[core.recycle]
		enabled = true
		interval = "5m"
		timeout = "10h"
		node_timeout = "10m"
	TOML
}

# Each value is an assignment of its own, so that a refusal inside $() ends the script.
node_id=$(number NODE_ID '')
sync_enabled=false
[ "$node_id" = 0 ] || sync_enabled=true
admin_token=$(need ADMIN_API_TOKEN 'the admin server must not be open to everybody; set a random text of 32 characters or more')
wg_ip=$(need WG_IP "the gateway's address in the overlay with its mask, such as 10.8.0.1/16")
wg_reserved_net=$(need WG_RESERVED_NET 'the network that holds WG_IP and is given to no CVM, such as 10.8.0.1/32')
wg_client_range=$(need WG_CLIENT_RANGE 'the addresses for CVMs, such as 10.8.0.0/18')
wg_endpoint=$(text WG_ENDPOINT '')
my_url=$(text MY_URL '')
bootnode=$(text BOOTNODE_URL '')
rpc_domain=$(text RPC_DOMAIN '')
admin_address=$(text ADMIN_LISTEN_ADDR 0.0.0.0)
admin_port=$(number ADMIN_LISTEN_PORT 8001)
proxy_port=$(text PROXY_LISTEN_PORT 443)
proxy_workers=$(number PROXY_WORKERS 32)
max_connections_per_app=$(number MAX_CONNECTIONS_PER_APP 0)
inbound_pp=$(truth INBOUND_PP_ENABLED false)
sync_interval=$(text SYNC_INTERVAL 1m)
sync_timeout=$(text SYNC_TIMEOUT 2m)
sync_persist_interval=$(text SYNC_PERSIST_INTERVAL 5m)
sync_connections_enabled=$(truth SYNC_CONNECTIONS_ENABLED true)
sync_connections_interval=$(text SYNC_CONNECTIONS_INTERVAL 30s)
timeout_connect=$(text TIMEOUT_CONNECT 5s)
timeout_handshake=$(text TIMEOUT_HANDSHAKE 5s)
timeout_cache_top_n=$(text TIMEOUT_CACHE_TOP_N 30s)
timeout_handshake_stale=$(text TIMEOUT_HANDSHAKE_STALE 30m)
timeout_dns_resolve=$(text TIMEOUT_DNS_RESOLVE 5s)
timeout_data_enabled=$(truth TIMEOUT_DATA_ENABLED true)
timeout_idle=$(text TIMEOUT_IDLE 10m)
timeout_write=$(text TIMEOUT_WRITE 5s)
timeout_shutdown=$(text TIMEOUT_SHUTDOWN 5s)
timeout_total=$(text TIMEOUT_TOTAL 5h)
timeout_pp_header=$(text TIMEOUT_PP_HEADER 5s)
fetch_timeout=$(text PORT_POLICY_FETCH_TIMEOUT 10s)
fetch_max_retries=$(number PORT_POLICY_FETCH_MAX_RETRIES 5)
fetch_backoff_initial=$(text PORT_POLICY_FETCH_BACKOFF_INITIAL 1s)
fetch_backoff_max=$(text PORT_POLICY_FETCH_BACKOFF_MAX 30s)

mkdir -p "$DATA/gateway/certs" "$DATA/wireguard"
tunnel_key
# A reader never sees half a file, and a full disk leaves the old one.
render >"$CONFIG.new" || die "cannot write $CONFIG: is the volume at $DATA full or read-only?"
mv "$CONFIG.new" "$CONFIG"

[ $# -gt 0 ] || set -- dstack-gateway -c "$CONFIG"
exec "$@"
