#!/usr/bin/env bash
# Builds the Go programs that the tests drive the plugin with, and compare it with, into a cache folder.
# What is there already is not built again. Without arguments it builds all of them.
set -euo pipefail

usage() {
    cat <<USAGE
Usage: tests/build-tools.sh [cnitool] [plugins] [containerd] [nerdctl] [nfpm] [kubernetes]

Builds into \$HOSTPORT_TOOLS, by default .cache/bin of this checkout. Needs a Go toolchain; everything comes from the Go
module proxy. On two cores, kubernetes (a whole cluster, and its conformance tests of host ports) takes about six minutes the
first time, the others about two at most.
USAGE
}

source_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
tools=${HOSTPORT_TOOLS:-$source_dir/.cache/bin}
cni=v1.3.1 plugins=v1.9.1 containerd=v2.4.2 nerdctl=v2.2.2 nfpm=v2.45.2
kubernetes=34.4 # v1.34.4, and its staging modules v0.34.4

have() {
    local name
    for name in "$@"; do [ -x "$tools/$name" ] || return 1; done
}

# what only a debugger reads is a fifth of the work of a first build; static programs run in every root
export CGO_ENABLED=0 GOFLAGS="-mod=mod -gcflags=all=-dwarf=false -ldflags=-s"

go_install() { GOBIN=$tools go install "$@"; }

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

# go install refuses the replace line in its go.mod, of a module that its tests need, and one file of helpers for them
build_nerdctl() {
    have nerdctl && return
    local work module tests=github.com/containerd/nerdctl/mod/tigron
    work=$(mktemp -d)
    trap 'rm -rf -- "$work"' RETURN
    module=$(go mod download -json github.com/containerd/nerdctl/v2@$nerdctl | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
    cp -r --no-preserve=mode -- "$module/." "$work"
    cd "$work"
    rm cmd/nerdctl/helpers/testing_linux.go
    go mod edit -droprequire $tests -dropreplace $tests@v0.0.0
    go build -o "$tools/" ./cmd/nerdctl
}

build_nfpm() {
    have nfpm || go_install github.com/goreleaser/nfpm/v2/cmd/nfpm@$nfpm
}

# k8s.io/kubernetes has replace lines, which go install refuses: a module around it repeats them with versions
build_kubernetes() {
    local work manifest directory program version missing=()
    for program in kubelet kube-proxy kube-apiserver kube-controller-manager kube-scheduler kubectl; do
        have $program || missing+=("k8s.io/kubernetes/cmd/$program")
    done
    for program in etcd agnhost e2e; do have $program || missing+=("./$program"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    work=$(mktemp -d)
    trap 'rm -rf -- "$work"' RETURN
    cd "$work"
    go mod download -json "k8s.io/kubernetes@v1.$kubernetes" >module.json
    manifest=$(sed -n 's/.*"GoMod": "\(.*\)".*/\1/p' module.json)
    directory=$(sed -n 's/.*"Dir": "\(.*\)".*/\1/p' module.json)
    {
        printf 'module tools\n\ngo %s\n\n' "$(sed -n 's/^go //p' "$manifest")"
        printf 'require k8s.io/kubernetes v1.%s\n\n' "$kubernetes"
        sed -n "s#^[[:space:]]*\(k8s.io/[^ ]*\) => ./staging/.*#replace \1 => \1 v0.$kubernetes#p" "$manifest"
    } >go.mod
    cp -R "$source_dir/tests/programs/." .
    mkdir network
    cp "$directory/test/e2e/network/hostport.go" network
    # clients refuse a server of no version
    version=gitVersion=v1.$kubernetes
    go build -ldflags "-s -X k8s.io/component-base/version.$version -X k8s.io/client-go/pkg/version.$version" \
        -o "$tools/" "${missing[@]}"
}

case ${1:-} in --help | -h) usage && exit ;; esac
command -v go >/dev/null || {
    echo "build-tools.sh: needs a Go toolchain" >&2
    exit 1
}
mkdir -p -- "$tools"
[ $# -gt 0 ] || set -- cnitool plugins containerd nerdctl nfpm kubernetes
for tool in "$@"; do
    case $tool in
        cnitool | plugins | containerd | nerdctl | nfpm | kubernetes) ("build_$tool") ;;
        *) usage >&2 && exit 2 ;;
    esac
done
