from __future__ import annotations

import os
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import dynamic_ports
import pytest
import resident
from go_tools import TOOLS, unavailable
from installation import Machine
from lab import Node, require

from cni_hostport import netlink, skel
from cni_hostport.resident.code import OPERATIONS_IMPORT

if TYPE_CHECKING:
    from collections.abc import Iterator


# what a test puts in a name's place for its time would stay in a module that is imported first in that time
for _module in OPERATIONS_IMPORT:
    import_module(_module)

PLUGIN_DIRS = [Path("/usr/lib/cni"), Path("/usr/libexec/cni"), Path("/opt/cni/bin")]


@pytest.fixture(scope="session")
def _kernel() -> None:
    require(os.geteuid() == 0, "needs root, for network namespaces")
    for program in ("ip", "nft", "nsenter", "conntrack"):
        require(shutil.which(program), f"needs the program {program}")


@pytest.fixture(autouse=True)
def _left_open() -> Iterator[None]:
    """Close what a test leaves open until the process ends: this one goes on with tests of other files."""
    yield
    skel.AFTERWARDS.clear()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        netlink.close_all()


@pytest.fixture(autouse=True)
def _pod_files() -> Iterator[None]:
    """Remove the files of pods that a test leaves behind."""
    yield
    for directory in dynamic_ports.FILES.glob(f"{dynamic_ports.OWN}*"):
        shutil.rmtree(directory, ignore_errors=True)  # a process of an operation that has answered may remove it


@pytest.fixture
def node(_kernel: None) -> Iterator[Node]:
    with Node() as made:
        yield made


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of executable that ``resident.launcher`` makes: see ``resident.with_executables``."""
    monkeypatch.setattr(resident, "kind", request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def cnitool() -> Path:
    """The CNI project's own runtime for one plugin chain, built with Go on first use."""
    require(not (need := unavailable("cnitool", "cnitool")), f"needs {need}")
    return TOOLS / "cnitool"


@pytest.fixture(scope="session")
def plugin_dir() -> Path:
    """The directory of the packaged reference plugins."""
    found = [path for path in PLUGIN_DIRS if (path / "bridge").exists()]
    require(found, "needs the packaged CNI plugins bridge and host-local")
    return found[0]


@pytest.fixture(scope="session")
def installed_machine(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with the plugin installed by ``install.sh``, for tests that leave it so."""
    return Machine.installed(tmp_path_factory.mktemp("machine"))
