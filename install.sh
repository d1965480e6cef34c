#!/usr/bin/env bash
# Installs the hostport CNI plugin; shows it at work (--demo); tests it (--test); removes it (--uninstall); builds what
# runs without any of this on other machines (--bundle).
set -euo pipefail
umask 022

source_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
bin_dir=/opt/cni/bin
default_lib_dir=/usr/local/lib/hostport
lib_dir=$default_lib_dir
unit_dir=/etc/systemd/system
command=/usr/local/bin/hostport
units=(hostport.socket hostport.service hostport-restore.service)
action=install
output="" image="" push="" packages_dir="" # what is to be built
marker=.hostport-installation # stands in every installation below lib_dir, and names every bin_dir that it serves

usage() {
    cat <<USAGE
Usage: install.sh [--bin-dir DIR] [--lib-dir DIR] [--demo] [--test] [--uninstall] [--help]
       install.sh [--bundle DIR] [--image NAME[:TAG] [--push]] [--packages DIR]

Installs the hostport CNI plugin, with the system packages it needs, for the container runtimes of this machine.

  --bin-dir DIR  where runtimes look for CNI plugins (default: $bin_dir)
  --lib-dir DIR  where the plugin's own Python environment goes (default: $lib_dir)
  --demo         install, then show host ports at work in network namespaces that are removed again
  --test         run all tests, from this checkout, in an environment of their own (.venv); installs system packages only
  --uninstall    remove what an installation put into the two directories
  --bundle DIR   write into DIR an archive of the plugin with all that it needs to run on any Linux of this
                 architecture: Python, libnftables, the C library; install nothing but system packages
  --image NAME   make an image of such a bundle, with podman or buildah and have conf/kubernetes name it
                 (default tag: version and digest)
  --push         push that image to its registry
  --packages DIR write into DIR packages of such a bundle for dpkg and rpm, with nfpm
  --help         show this text

An installation in the default --lib-dir also makes the command $command, and, where systemd runs, gets two services:
hostport.service, the resident process that makes calls faster (elsewhere it can be started by hand: hostport serve); and
hostport-restore.service, which brings the host ports back when nftables.service or firewalld.service has loaded its rules.

It does not touch /etc/cni/net.d: it prints the line to add to a network configuration.
USAGE
}

say() { printf '%s\n' "$*" >&2; }
die() {
    say "install.sh: $*"
    exit 1
}

parse_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --bin-dir | --lib-dir)
                [ -n "${2:-}" ] || die "$1 needs a directory"
                local directory
                directory=$(realpath -m -- "$2")
                [[ $directory != *[[:space:]\"\\]* ]] ||
                    die "$1 '$directory': the directory's name cannot hold white space, quotes and backslashes"
                if [ "$1" = --bin-dir ]; then bin_dir=$directory; else lib_dir=$directory; fi
                shift
                ;;
            --demo | --test | --uninstall)
                [ "$action" = install ] || die "--$action and $1 do not go together"
                action=${1#--}
                ;;
            --bundle | --image | --packages)
                [[ $action = install || $action = build ]] || die "--$action and $1 do not go together"
                [ -n "${2:-}" ] || die "$1 needs a value (see --help)"
                action=build
                case $1 in
                    --bundle) output=$(realpath -m -- "$2") ;;
                    --image) image=$2 ;;
                    --packages) packages_dir=$(realpath -m -- "$2") ;;
                esac
                shift
                ;;
            --push) push=push ;;
            --help | -h)
                usage
                exit 0
                ;;
            *) die "unknown option '$1' (see --help)" ;;
        esac
        shift
    done
    [[ -z $push || -n $image ]] || die "--push needs --image"
}

# --- system packages ---------------------------------------------------------------------------------------------------

# the system's own Python, 3.11 or later: one in a home folder may be out of a runtime's reach
system_python() {
    local candidate real
    for candidate in /usr/bin/python3 /usr/bin/python3.{14,13,12,11}; do
        real=$(realpath -e -- "$candidate" 2>/dev/null) || continue
        case $real in /home/* | /root/*) continue ;; esac
        if "$real" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

# each line: a command that succeeds where the need is met; Debian's package; Fedora's package
needs() {
    cat <<'NEEDS'
ldconfig -p | grep libnftables.so.1;libnftables1;nftables
system_python;python3;python3
"$(system_python)" -I -c "import ensurepip, venv";python3-venv;python3
NEEDS
    [[ $action != build && $action != test ]] || cat <<'NEEDS'
echo "int main(void) {}" | cc -static -x c - -o /dev/null;gcc libc6-dev;gcc glibc-static
command -v strip;binutils;binutils
command -v iptables;iptables;iptables-nft
NEEDS
    [[ -z $image && $action != test ]] || cat <<'NEEDS'
command -v buildah || command -v podman;podman;podman
NEEDS
    [[ $action != demo && $action != test ]] || cat <<'NEEDS'
command -v ip;iproute2;iproute
command -v nft;nftables;nftables
command -v curl;curl;curl
NEEDS
    [ "$action" != test ] || cat <<'NEEDS'
command -v nsenter;util-linux;util-linux
command -v sysctl;procps;procps-ng
command -v conntrack;conntrack;conntrack-tools
command -v shellcheck;shellcheck;ShellCheck
command -v strace;strace;strace
echo "int main(void) {}" | cc -fsanitize=address,undefined -x c - -o /dev/null;gcc libc6-dev;gcc libasan libubsan
command -v systemd-analyze;systemd;systemd
[ -x /usr/lib/cni/bridge ] || [ -x /usr/libexec/cni/bridge ];containernetworking-plugins;containernetworking-plugins
command -v busybox;busybox-static;busybox
command -v containerd;containerd;containerd
command -v podman && command -v conmon;podman conmon;podman
command -v runc;runc;runc
command -v openssl;openssl;openssl
command -v nc;netcat-openbsd;netcat
command -v debootstrap;debootstrap;debootstrap
command -v rpm;rpm;rpm
NEEDS
}

# prints the packages, in the given column of needs, that are missing
missing_packages() {
    local check debian fedora
    while IFS=';' read -r check debian fedora; do
        (eval "$check") >/dev/null 2>&1 || if [ "$1" = debian ]; then echo "$debian"; else echo "$fedora"; fi
    done < <(needs) | tr ' ' '\n' | sort -u
}

# nothing is installed on a system whose Python is too old, or would be
refuse_old_python() { # FAMILY
    local found
    ! system_python >/dev/null || return 0
    if [ -x /usr/bin/python3 ]; then
        found=$(/usr/bin/python3 -I -c 'import platform; print(platform.python_version())' 2>/dev/null) || found=broken
    elif [ "$1" = debian ]; then
        apt-get -q update >&2
        found=$(apt-cache policy python3 | sed -n 's/^ *Candidate: //p')
        ! dpkg --compare-versions "$found" ge 3.11 || return 0
    else
        return 0
    fi
    die "needs Python 3.11 or later, and this system's python3 is $found. Nothing was installed. Install a later one with" \
        "its venv as /usr/bin/python3.11 to /usr/bin/python3.14, or upgrade the system: Debian 12, Ubuntu 24.04 and" \
        "Fedora have one."
}

install_system_packages() {
    local family packages
    if command -v apt-get >/dev/null; then
        family=debian
    elif command -v dnf >/dev/null; then
        family=fedora
    else
        family=unknown
    fi
    mapfile -t packages < <(missing_packages "$family")
    [ ${#packages[@]} -gt 0 ] || return 0
    refuse_old_python "$family"
    say "Installing system packages: ${packages[*]}"
    case $family in
        debian)
            export DEBIAN_FRONTEND=noninteractive
            apt-get -q update >&2
            apt-get -q install -y --no-install-recommends "${packages[@]}" >&2
            ;;
        fedora) dnf install -y "${packages[@]}" >&2 ;;
        *) die "this system has neither apt-get nor dnf; install what these packages hold by hand: ${packages[*]}" ;;
    esac
    mapfile -t packages < <(missing_packages "$family")
    [ ${#packages[@]} -eq 0 ] ||
        die "still missing after installing them: ${packages[*]} (python3 must be the system's own, 3.11 or later)"
}

# --- the plugin --------------------------------------------------------------------------------------------------------

version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$source_dir/cni_hostport/__init__.py"; }

# what an installation is made of: the same again has the same digest, and is not built again
digest() {
    (
        cd "$source_dir"
        "$(system_python)" --version
        cat install.sh pyproject.toml conf/requirements.txt
        find cni_hostport \( -name "*.py" -o -name "*.c" \) -print0 | sort -z | xargs -0 cat
    ) | sha256sum | cut -c1-12
}

build() { # TARGET
    local target=$1 log
    rm -rf -- "$target"
    mkdir -p -- "$target"
    : >"$target/$marker"
    say "Building the plugin's Python environment in $target"
    log=$(mktemp)
    if ! {
        "$(system_python)" -I -m venv "$target" &&
            "$target/bin/python" -I -m pip install --no-deps --require-hashes -r "$source_dir/conf/requirements.txt" &&
            "$target/bin/python" -I -m pip install --no-deps --no-build-isolation "$source_dir" &&
            "$target/bin/python" -I -m compileall -q "$target"/lib/python3*/site-packages &&
            write_python_executable "$target" &&
            works "$target"
    } >"$log" 2>&1; then
        cat "$log" >&2
        rm -rf -- "$target" "$log"
        die "the plugin's Python environment could not be built; what was installed before is as it was"
    fi
    rm -f -- "$log"
}

works() { # TARGET
    "$1/bin/python" -I -c "import cni_hostport.operate.cli, nftables, prometheus_client, psutil, pydantic, pyroute2" &&
        says_version "$1/bin/hostport"
}

says_version() { env -i CNI_COMMAND=VERSION "$1" >/dev/null 2>&1; } # EXECUTABLE

write_python_executable() { # TARGET
    local packages
    packages=$("$1/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    # -S: the module site takes 2 ms of every call
    printf '%s\n' "#!$1/bin/python -IS" "import sys" "" "sys.path.insert(0, \"$packages\")" \
        "from cni_hostport.handover import main" "" "main()" >"$1/bin/hostport"
    chmod 755 "$1/bin/hostport"
}

# makes the executable that starts no Python for a call that the resident process runs; static where libc can be
write_native_executable() { # TARGET FILE
    local options compiler linking
    read -ra compiler <<<"${CC:-cc}"
    command -v "${compiler[0]}" >/dev/null || return 1
    mapfile -t options < <("$1/bin/python" -I -m cni_hostport.native "$1/bin/hostport")
    for linking in "-O2 -static" -O2; do
        read -ra linking <<<"$linking"
        if "${compiler[@]}" "${linking[@]}" "${options[@]}" -o "$2" "$source_dir/cni_hostport/handover.c" 2>&1 &&
            append_program "$1" "$2" && says_version "$2" && is_native "$2"; then return 0; fi
    done
    return 1
}

# a Python that the kernel has just started, for the script in whose place this file is moved, finds the same program in it
append_program() { # TARGET FILE
    "$1/bin/python" -I -c "import sys, zipfile
zipfile.ZipFile(sys.argv[2], 'a').write(sys.argv[1], '__main__.py')" "$1/bin/hostport" "$2"
}

is_native() { grep -aq '^native executable of /' "$1"; } # FILE

is_link() { [ -L "$bin_dir/hostport" ]; } # as 'hostport node install' makes it

# prints which installation the executable in bin_dir belongs to; fails if there is one that is not of this program's
# making. operate/node/installations.py has the same rules
current() {
    local installation
    if is_link; then
        installation=$(realpath -m -- "$bin_dir/hostport")
        installation=${installation%/bin/hostport}
        [ -e "$installation/$marker" ] || return 1
        printf '%s\n' "$installation"
        return 0
    fi
    [ -e "$bin_dir/hostport" ] || return 0
    is_native "$bin_dir/hostport" || grep -q '^from cni_hostport' "$bin_dir/hostport" || return 1
    LC_ALL=C sed -n '1s|^#!\(.*\)/bin/python.*|\1|p; s|^native executable of \(.*\)/bin/hostport$|\1|p' "$bin_dir/hostport"
}

install_plugin() {
    local target previous staged old kind log
    target=$lib_dir/$(version)-$(digest)
    previous=$(current) || die "$bin_dir/hostport is not of this program's making: move it away first"
    ! is_link || say "$bin_dir/hostport was of the installation in $previous, which stays as it is."
    works "$target" 2>/dev/null || build "$target"
    serves "$target" || printf '%s\n' "$bin_dir" >>"$target/$marker"

    mkdir -p -- "$bin_dir"
    staged=$(mktemp "$bin_dir/.hostport.XXXXXX")
    if log=$(write_native_executable "$target" "$staged"); then
        kind="native: a call that the resident process runs starts no Python"
    else
        kind="in Python: a C compiler that works (${CC:-cc}) would make one that is faster"
        [ -z "$log" ] || say "$log"
        cp -f -- "$target/bin/hostport" "$staged"
    fi
    chmod 755 "$staged"
    mv -f -- "$staged" "$bin_dir/hostport" # a rename: a runtime finds the old executable or the new one

    install_service
    install_command

    # calls that are under way may still import from the previous installation; those before it are out of use, unless
    # they serve another directory
    for old in "$lib_dir"/*/"$marker"; do
        old=${old%/*}
        [ "$old" = "$target" ] || [ "$old" = "$previous" ] || release "$old"
    done
    say "Installed $bin_dir/hostport ($(version)), $kind."
    say "Add it to the plugins of a network configuration in /etc/cni/net.d, after the one that makes the interface:"
    printf '    %s\n' '{ "type": "hostport", "capabilities": { "portMappings": true } }'
}

serves() { grep -qxF -- "$bin_dir" "$1/$marker" 2>/dev/null; } # INSTALLATION

# removes an installation that serves bin_dir, unless it serves others as well
release() { # INSTALLATION
    local others
    serves "$1" || return 0
    others=$(grep -vxF -- "$bin_dir" "$1/$marker") || true
    if [ -n "$others" ]; then printf '%s\n' "$others" >"$1/$marker"; else rm -rf -- "$1"; fi
}

# the machine has one resident process, and one command, those of its one regular installation
is_regular() { [ "$lib_dir" = "$default_lib_dir" ]; }
has_service() { is_regular && [ -d /run/systemd/system ]; }
has_command() { [ "$(readlink -- "$command")" = "$bin_dir/hostport" ]; }

install_command() {
    is_regular || return 0
    if [ -e "$command" ] && ! has_command; then
        say "$command leads elsewhere and stays so: run $bin_dir/hostport for the commands."
    else
        mkdir -p -- "${command%/*}"
        ln -sfn -- "$bin_dir/hostport" "$command"
    fi
}

install_service() {
    local unit
    has_service || return 0
    for unit in "${units[@]}"; do
        sed "s|^\(Exec[A-Z][a-z]*\)=/opt/cni/bin/|\1=$bin_dir/|" "$source_dir/conf/systemd/$unit" >"$unit_dir/$unit"
    done
    systemctl daemon-reload
    systemctl enable "${units[@]}"
    systemctl restart "${units[@]}"
}

uninstall_service() {
    local unit
    has_service && [ -e "$unit_dir/${units[0]}" ] || return 0
    systemctl disable --now "${units[@]}"
    for unit in "${units[@]}"; do rm -f -- "$unit_dir/$unit"; done
    systemctl daemon-reload
}

uninstall_plugin() {
    local installation
    current >/dev/null || die "$bin_dir/hostport is not of this program's making: it stays"
    uninstall_service
    if is_regular && has_command; then rm -f -- "$command"; fi
    if is_link; then
        say "$bin_dir/hostport stays: 'hostport node uninstall' removes it."
    else
        rm -f -- "$bin_dir/hostport"
    fi
    for installation in "$lib_dir"/*/"$marker"; do
        if [ -s "$installation" ]; then
            release "${installation%/*}"
        elif [ -e "$installation" ]; then
            rm -rf -- "${installation%/*}" # its build was interrupted
        fi
    done
    rmdir -- "$lib_dir" 2>/dev/null || true
    say "Removed hostport from $bin_dir and $lib_dir."
    say "Network configurations were not touched: those that name hostport now fail every pod, at its start and its end."
    say "The host ports of running pods stay until 'nft delete table inet hostport'. That also removes the guard of the"
    say "node's 127.0.0.0/8: set net.ipv4.conf.IF.route_localnet to 0 on the pods' interfaces, unless something else needs it."
}

# --- what runs elsewhere -----------------------------------------------------------------------------------------------

build_all() {
    local work archive bundle
    [ -z "$packages_dir" ] || command -v "${NFPM:-nfpm}" >/dev/null ||
        die "packages are made by nfpm: 'go install github.com/goreleaser/nfpm/v2/cmd/nfpm@latest'; NFPM names it"
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # the directory is known here
    trap "rm -rf -- '$work'" EXIT
    build_bundle "$work"
    archive=$(echo "$work"/*.tar.gz)
    if [ -n "$output" ]; then
        mkdir -p -- "$output"
        cp -- "$archive" "$output/.${archive##*/}"
        mv -f -- "$output/.${archive##*/}" "$output/${archive##*/}"
        say "Built $output/${archive##*/}: unpack it anywhere, and run bin/hostport in it."
    fi
    tar -xzf "$archive" -C "$work"
    bundle=$work/hostport-$(version)
    if [ -n "$packages_dir" ]; then
        "$source_dir/conf/packages/build.sh" "$bundle" "$packages_dir" || die "the packages could not be built"
        say "Built packages in $packages_dir: install one with dpkg --install, or rpm --upgrade."
    fi
    [ -n "$image" ] || return 0
    [[ ${image##*/} = *:* ]] || image=$image:$(version)-$(cat "$bundle/DIGEST") # other content is rolled out
    "$source_dir/conf/image/build.sh" "$bundle" "$image" $push || die "the image could not be built${push:+ and pushed}"
    sed -i "s|newName: .*|newName: ${image%:*}|; s|newTag: .*|newTag: \"${image##*:}\"|" \
        "$source_dir/conf/kubernetes/image/kustomization.yaml"
    say "Built${push:+ and pushed} the image $image, which conf/kubernetes names now. Roll it out, on kubeadm for example:"
    say "    kubectl apply -k conf/kubernetes/kubeadm"
    [ -n "$push" ] || say "Before that, push it, or take it to nodes that have no registry for it:
    podman save --format docker-archive --output hostport.tar $image
    ctr -n k8s.io images import hostport.tar # on each node"
}

build_bundle() { # DIRECTORY
    local log=$1/log
    command -v dpkg-query >/dev/null || die "bundles are built on Debian, and systems derived from it"
    say "Building a bundle of this machine's Python and libnftables"
    {
        "$(system_python)" -I -m venv "$1/venv" &&
            "$1/venv/bin/python" -I -m pip install --no-deps --require-hashes --no-compile --target "$1/packages" \
                -r "$source_dir/conf/requirements.txt" &&
            "$(system_python)" -B "$source_dir/conf/bundle" --packages "$1/packages" "$1"
    } >"$log" 2>&1 || {
        cat "$log" >&2
        die "the bundle could not be built"
    }
}

# --- the tests ---------------------------------------------------------------------------------------------------------

run_tests() {
    local venv=$source_dir/.venv status=0 rooms
    "$(system_python)" -I -m venv "$venv"
    "$venv/bin/python" -I -m pip install -q --no-deps --require-hashes -r "$source_dir/tests/requirements.txt"
    "$venv/bin/python" -I -m pip install -q --no-deps --no-build-isolation -e "$source_dir"
    cd "$source_dir"
    "$venv/bin/ruff" check
    "$venv/bin/ruff" format --check
    "$venv/bin/mypy"
    shellcheck install.sh .ci/run conf/{image,packages}/*.sh tests/*.sh
    if command -v go >/dev/null; then tests/build-tools.sh; fi
    # processes that run whole files, in their order: every network namespace, socket and file of a test is its own. Three
    # keep two cores at work, since each waits a quarter of its time. Those of the second line come after the others in
    # processes of their own: attacks fork theirs thousands of times, and gRPC has threads in those of runtimes
    for rooms in "kernel unit" "attack cluster runtimes versions"; do
        read -ra rooms <<<"$rooms"
        "$venv/bin/pytest" --numprocesses 3 --dist loadfile --no-loadscope-reorder "${rooms[@]/#/tests/}" || status=$?
    done
    command -v go >/dev/null || say "Without Go, tests of what is built with it were skipped: see the lines SKIPPED above."
    return "$status"
}

main() {
    parse_arguments "$@"
    [ "$(id -u)" -eq 0 ] || die "must be run as root (sudo ./install.sh ...)"
    if [ "$action" = uninstall ]; then
        uninstall_plugin
        return
    fi
    install_system_packages
    case $action in
        install) install_plugin ;;
        demo)
            install_plugin >/dev/null
            exec "$source_dir/tests/demo.sh" "$bin_dir/hostport"
            ;;
        build) build_all ;;
        test) run_tests ;;
    esac
}

main "$@"
