#!/bin/sh
# Regenerates the Go code of every .proto below this directory, in place or,
# with an argument, below that directory.
# Needs protoc (Debian: protobuf-compiler). The Go plugin is built from the
# module's own google.golang.org/protobuf, so code and runtime always match.
set -eu

api=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$api")
out=$(cd "${1:-$root}" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

command -v protoc >/dev/null || {
	echo "generate.sh: protoc not found in PATH; install protobuf-compiler" >&2
	exit 1
}

cd "$root"
go build -o "$tmp/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go

# Files are named relative to the repository root: the name is the key under
# which the descriptor is registered in the process and must be unique there.
find api -name '*.proto' | sort | while read -r file; do
	protoc -I . --plugin=protoc-gen-go="$tmp/protoc-gen-go" \
		--go_out="$out" --go_opt=paths=source_relative "$file"
done
