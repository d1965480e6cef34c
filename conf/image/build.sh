#!/usr/bin/env bash
# Makes an image of a bundle that is unpacked, and can push it: build.sh DIRECTORY NAME [push]. Needs buildah or podman.
set -euo pipefail

bundle=$(realpath -- "$1") name=$2
builder=buildah
command -v buildah >/dev/null || builder=podman
# the same bundle makes the same image; nothing is run in it
"$builder" build --isolation chroot --layers=false --timestamp 0 --build-arg "VERSION=${bundle##*/hostport-}" \
    --tag "$name" --file "$(dirname -- "${BASH_SOURCE[0]}")/Dockerfile" "$bundle" >&2
[ "${3:-}" != push ] || "$builder" push "$name" >&2
