"""Images for the cluster: that of upstream's own tests, with the programs that those call in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from go_tools import TOOLS
from runtimes import image

from cluster.roots import files, program

if TYPE_CHECKING:
    from pathlib import Path

REPOSITORY = "hostport.test/e2e"  # upstream's tests take their images from where KUBE_TEST_REPO_LIST says
AGNHOST = f"{REPOSITORY}/agnhost:2.56"  # the version is in upstream's test/utils/image/manifest.go
CALLED = ("sh", "curl", "nc")  # not busybox', whose shell has an nc of its own


def write_agnhost(path: Path) -> None:
    """Write an image with those of agnhost's commands that the tests use."""
    present = {str(file)[1:]: file.read_bytes() for file in files(*map(program, CALLED))}
    present |= {f"bin/{name}": program(name).read_bytes() for name in CALLED}
    present["agnhost"] = (TOOLS / "agnhost").read_bytes()
    image.write(path, AGNHOST, present, {"Entrypoint": ["/agnhost"], "Cmd": ["pause"]})
