#!/usr/bin/env bash
# Makes packages for dpkg and rpm of a bundle that is unpacked: build.sh DIRECTORY OUTPUT. Needs nfpm (NFPM names it).
set -euo pipefail

mkdir -p -- "$2"
BUNDLE=$(realpath -- "$1") output=$(realpath -- "$2")
SOURCE=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/../..")
VERSION=${BUNDLE##*/hostport-}
INSTALLATION=$VERSION-$(cat "$BUNDLE/DIGEST")
scripts=$(mktemp -d)
trap 'rm -rf -- "$scripts"' EXIT
case $(uname -m) in
    x86_64) ARCHITECTURE=amd64 ;;
    aarch64) ARCHITECTURE=arm64 ;;
    *) ARCHITECTURE=$(uname -m) ;;
esac
for script in postinstall preremove postremove; do
    cat "$SOURCE/conf/packages/functions.sh" "$SOURCE/conf/packages/$script" >"$scripts/$script"
done
export BUNDLE SOURCE VERSION INSTALLATION ARCHITECTURE SOURCE_DATE_EPOCH=0
cd -- "$scripts"
for packager in deb rpm; do
    "${NFPM:-nfpm}" package --config "$SOURCE/conf/packages/nfpm.yaml" --packager "$packager" --target "$output" >&2
done
