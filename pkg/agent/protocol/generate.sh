#!/bin/sh
# Generates the Go code of every .proto file here. Needs protoc; its two
# plug-ins are built from the versions pinned in tools/go.mod.
set -eu
cd "$(dirname "$0")/../../.."
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -modfile=tools/go.mod -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
PATH="$bin:$PATH" protoc -I . \
	--go_out=. --go_opt=module=github.com/vmshim/vmshim \
	--go-ttrpc_out=. --go-ttrpc_opt=module=github.com/vmshim/vmshim \
	$(find pkg/agent/protocol -name '*.proto' | sort)
