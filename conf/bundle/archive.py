"""A bundle as one file, and the digest that names its content."""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import tarfile
from typing import TYPE_CHECKING

from cni_hostport.operate.node.bundle import DIGEST

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
DIGITS = 12  # of the digest, in hexadecimal
RUN = ("bin/", "lib/ld-linux")  # files with permission to be executed


def write_digest(bundle: Path) -> None:
    """Write the digest of a bundle's files into one more, which two bundles share only if they are the same."""
    digest = hashlib.sha256()
    for name in _names(bundle):
        if (bundle / name).is_file() and name != DIGEST:
            digest.update(f"{name}\0".encode() + hashlib.sha256((bundle / name).read_bytes()).digest())
    (bundle / DIGEST).write_text(f"{digest.hexdigest()[:DIGITS]}\n")


def pack(bundle: Path, archive: Path) -> None:
    """Write a bundle into an archive, whole or not at all, which is the same wherever and whenever that is."""
    part = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        with (
            part.open("wb") as out,
            gzip.GzipFile("", "wb", 9, out, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for name in ["", *_names(bundle)]:
                entry = tar.gettarinfo(bundle / name, f"{bundle.name}/{name}".rstrip("/"))
                entry.uid = entry.gid = entry.mtime = 0
                entry.uname = entry.gname = "root"
                entry.mode = 0o755 if entry.isdir() or name.startswith(RUN) else 0o644
                with (bundle / name).open("rb") if entry.isfile() else open(os.devnull, "rb") as content:
                    tar.addfile(entry, content)
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)


def _names(bundle: Path) -> list[str]:
    return sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*"))
