#!/usr/bin/env bash
# Makes an image of a bundle that is unpacked: build.sh DIRECTORY NAME. Needs buildah or podman, and no network.
set -euo pipefail

bundle=$(realpath -- "$1") name=$2
builder=buildah
command -v buildah >/dev/null || builder=podman
# the same bundle makes the same image; nothing is run in it
"$builder" build --isolation chroot --layers=false --timestamp 0 --build-arg "VERSION=${bundle##*/hostport-}" \
    --tag "$name" --file "$(dirname -- "${BASH_SOURCE[0]}")/Dockerfile" "$bundle" >&2
