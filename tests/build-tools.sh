#!/usr/bin/env bash
# Builds the Go programs that the tests drive the plugin with, and compare it with, into a cache folder.
# What is there already is not built again. Without arguments it builds all of them.
set -euo pipefail

usage() {
    cat <<USAGE
Usage: tests/build-tools.sh [cnitool] [plugins] [containerd] [kubernetes] [nfpm]

Builds into \$HOSTPORT_TOOLS, by default .cache/bin of this checkout. Needs a Go toolchain; everything comes from the Go
module proxy. kubernetes (kubelet and kube-proxy) takes a few minutes, the others less than two.
USAGE
}

source_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
tools=${HOSTPORT_TOOLS:-$source_dir/.cache/bin}
cni=v1.3.1 plugins=v1.9.1 containerd=v2.4.2 nfpm=v2.45.2 kubernetes=34.4 # kubernetes: v1.34.4, its staging modules v0.34.4

have() {
    local name
    for name in "$@"; do [ -x "$tools/$name" ] || return 1; done
}

go_install() { GOBIN=$tools GOFLAGS=-mod=mod go install "$@"; }

build_cnitool() {
    have cnitool || go_install "github.com/containernetworking/cni/cnitool@$cni"
}

build_plugins() {
    local plugin module=github.com/containernetworking/plugins/plugins
    for plugin in main/bridge main/loopback ipam/host-local meta/portmap; do
        have "${plugin#*/}" || go_install "$module/$plugin@$plugins"
    done
}

build_containerd() {
    have containerd containerd-shim-runc-v2 ctr ||
        go_install github.com/containerd/containerd/v2/cmd/{containerd,containerd-shim-runc-v2,ctr}@$containerd
}

build_nfpm() {
    have nfpm || go_install github.com/goreleaser/nfpm/v2/cmd/nfpm@$nfpm
}

# k8s.io/kubernetes has replace lines, which go install refuses: a module around it repeats them with versions
build_kubernetes() {
    have kubelet kube-proxy && return
    local work manifest program
    work=$(mktemp -d)
    trap 'rm -rf -- "$work"' RETURN
    cd "$work"
    manifest=$(go mod download -json "k8s.io/kubernetes@v1.$kubernetes" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
    {
        printf 'module tools\n\ngo %s\n\n' "$(sed -n 's/^go //p' "$manifest")"
        printf 'require k8s.io/kubernetes v1.%s\n\n' "$kubernetes"
        sed -n "s#^[[:space:]]*\(k8s.io/[^ ]*\) => ./staging/.*#replace \1 => \1 v0.$kubernetes#p" "$manifest"
    } >go.mod
    printf 'package tools\n' >tools.go
    for program in kubelet kube-proxy; do
        printf 'import _ "k8s.io/kubernetes/cmd/%s/app"\n' $program >>tools.go
    done
    go mod tidy -e
    go build -mod=mod -o "$tools/" k8s.io/kubernetes/cmd/{kubelet,kube-proxy}
}

case ${1:-} in --help | -h) usage && exit ;; esac
command -v go >/dev/null || {
    echo "build-tools.sh: needs a Go toolchain" >&2
    exit 1
}
mkdir -p -- "$tools"
[ $# -gt 0 ] || set -- cnitool plugins containerd nfpm kubernetes
for tool in "$@"; do
    case $tool in
        cnitool | plugins | containerd | nfpm | kubernetes) ("build_$tool") ;;
        *) usage >&2 && exit 2 ;;
    esac
done
