from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from go_tools import TOOLS
from lab import Node, require
from runtimes import cri, image
from runtimes.containerd import DEBIAN, NEWEST, Containerd, Generation
from runtimes.host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def _needs(_kernel: None) -> None:
    require(cri.is_installed(), "needs the Python packages grpcio, grpcio-tools and protobuf")
    require(image.can_be_made(), "needs busybox-static")
    require(shutil.which("runc"), "needs runc")


@pytest.fixture(scope="session")
def debian_containerd(_needs: None, plugin_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    daemon = DEBIAN.programs / "containerd"
    require(daemon.exists(), "needs Debian's containerd 1.6")
    version = subprocess.run([daemon, "--version"], capture_output=True, text=True, check=True).stdout
    require(" 1.6." in version, f"needs containerd 1.6, and {daemon} is {version}")
    yield from _running(DEBIAN, plugin_dir, tmp_path_factory)


@pytest.fixture(scope="session")
def newest_tools(_needs: None) -> Path:
    """The directory of the newest containerd and CNI plugins."""
    require((TOOLS / "ctr").exists(), "needs containerd 2.x, built by tests/build-tools.sh")
    require((TOOLS / "bridge").exists(), "needs the newest CNI plugins, built by tests/build-tools.sh")
    return TOOLS


@pytest.fixture(scope="session")
def newest_containerd(newest_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    yield from _running(NEWEST, newest_tools, tmp_path_factory)


def _running(generation: Generation, plugins: Path, directories: pytest.TempPathFactory) -> Iterator[Containerd]:
    with Node() as node, Host(node) as host:
        yield Containerd(host, generation, directories.mktemp(generation.name), plugins)


@pytest.fixture(params=["debian_containerd", "newest_containerd"])
def containerd(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """Containerd without sandboxes and rules, of either generation."""
    running: Containerd = request.getfixturevalue(request.param)
    running.host.node.run("nft", "delete", "table", "inet", "hostport", check=False)
    yield running
    if not running.is_running:
        running.start()
    running.clear()
    assert "dnat-" not in running.host.node.ruleset()
