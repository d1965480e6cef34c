"""The image of sandboxes and containers: a static busybox, as an archive that every runtime imports."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path

BUSYBOX = Path("/bin/busybox")  # of Debian's busybox-static
NAME = "hostport.test/busybox:1"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # the kernel's names, and Go's


def can_be_made() -> bool:
    """Tell whether there is a busybox that needs no other file."""
    return BUSYBOX.exists() and b"/ld-linux" not in BUSYBOX.read_bytes()


def write(path: Path) -> None:
    """Write the image in the format of ``docker save``."""
    layer = _tar({"bin/busybox": BUSYBOX.read_bytes()})
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox"], "Cmd": ["sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"]}]
    files = {"layer.tar": layer, "config.json": json.dumps(config).encode()}
    path.write_bytes(_tar({**files, "manifest.json": json.dumps(manifest).encode()}))


def _tar(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()
