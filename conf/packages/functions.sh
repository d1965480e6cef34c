#!/bin/sh
# Part of every script of the packages. It runs in any POSIX shell, with what a small system has.
set -eu

lib_dir=/opt/hostport executable=/opt/cni/bin/hostport
units="hostport.socket hostport.service hostport-restore.service"

# leads calls to the version that is unpacked now: by a rename, so that each finds this one or the one before it
switch() {
    now=$lib_dir/$(readlink "$lib_dir/packaged")
    mkdir -p "${executable%/*}"
    ln -sf "$now/bin/hostport" "${executable%/*}/.hostport.new"
    mv -f "${executable%/*}/.hostport.new" "$executable"
    ! has_systemd || systemctl try-restart hostport.service || true # the resident process of the other version
    for other in "$lib_dir"/*/; do
        other=${other%/}
        [ "$other" = "$now" ] || [ -L "$other" ] || await_calls "$other"
    done
}

# waits until no process runs code below a directory, whose files are removed next; not for ever
await_calls() { # DIRECTORY
    seconds=90
    while [ "$seconds" -gt 0 ] && grep -qs " $1/" /proc/[0-9]*/maps; do
        sleep 1
        seconds=$((seconds - 1))
    done
}

has_systemd() { [ -d /run/systemd/system ]; }

start_units() {
    has_systemd || return 0
    systemctl daemon-reload
    # shellcheck disable=SC2086 # words
    systemctl enable $units && systemctl restart $units
}

remove() {
    if has_systemd; then
        # shellcheck disable=SC2086 # words
        systemctl disable --now $units || true
    fi
    rm -f "$executable"
    for installation in "$lib_dir"/*/; do await_calls "${installation%/}"; done
}
