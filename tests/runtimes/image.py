"""Images of sandboxes and containers, such as a static busybox, as archives that every runtime imports."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

BUSYBOX = Path("/bin/busybox")  # of Debian's busybox-static
NAME = "hostport.test/busybox:1"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # the kernel's names, and Go's


def can_be_made() -> bool:
    """Tell whether there is a busybox that needs no other file."""
    return BUSYBOX.exists() and b"/ld-linux" not in BUSYBOX.read_bytes()


def write(
    path: Path,
    name: str = NAME,
    files: Mapping[str, bytes] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write an image in the format of ``docker save``; without ``files`` that of busybox, which sleeps."""
    layer = _tar(files or {"bin/busybox": BUSYBOX.read_bytes()})
    described = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": config or {"Entrypoint": ["/bin/busybox"], "Cmd": ["sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    members = {"layer.tar": layer, "config.json": json.dumps(described).encode()}
    path.write_bytes(_tar({**members, "manifest.json": json.dumps(manifest).encode()}))


def _tar(files: Mapping[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()
