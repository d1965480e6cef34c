from __future__ import annotations

import json
import re
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from lab import LAUNCHER, Namespace, mapping, result

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

python, *module = LAUNCHER
TRACED = [python, "-X", "importtime", *module]
OPERATORS = {"click", "rich", "psutil", "prometheus_client", "cni_hostport.operate"}
ENVIRONMENT = {"CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/absent", "CNI_IFNAME": "eth0", "CNI_PATH": "/bin"}
CONFIG = {
    "cniVersion": "1.1.0",
    "name": "pods",
    "prevResult": result("10.1.0.2/24"),
    "runtimeConfig": {"portMappings": [mapping(8080), mapping(53, 53, "udp")]},
    "cni.dev/valid-attachments": [],
}


@pytest.fixture
def namespace(_kernel: None) -> Iterator[Namespace]:
    with Namespace("imports") as made:
        made.ip("link add cni0 type bridge", "addr add 10.1.0.1/24 dev cni0", "link set cni0 up")
        yield made


def imported(traced: str) -> set[str]:
    names = set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", traced, re.MULTILINE))
    assert "cni_hostport.skel" in names
    # an import that finds nothing is traced as well: what is found has modules of its own
    return {package for package in OPERATORS for name in names if name.startswith(f"{package}.")}


def call(namespace: Namespace, command: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    environ: dict[str, Any] = ENVIRONMENT | {"CNI_COMMAND": command}
    return namespace.run(*launcher, "list", input=json.dumps(CONFIG), env=environ, check=False)


def test_what_the_operators_commands_import_is_seen(namespace: Namespace) -> None:
    assert imported(namespace.run(*TRACED, "list").stderr) == OPERATORS - {"psutil", "prometheus_client"}
    assert imported(namespace.run(*TRACED, "metrics").stderr) == OPERATORS - {"psutil"}


@pytest.mark.parametrize("command", ["ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION"])
def test_a_runtimes_call_imports_nothing_of_the_operators(namespace: Namespace, command: str) -> None:
    call(namespace, "ADD", *LAUNCHER)
    ran = call(namespace, command, *TRACED)
    assert (ran.returncode, imported(ran.stderr)) == (0, set()), ran.stdout


def test_the_resident_process_imports_nothing_of_the_operators(namespace: Namespace, tmp_path: Path) -> None:
    socket, traced = tmp_path / "socket", tmp_path / "traced"
    handed_over = [python, "-I", "-c", f"from cni_hostport import handover; handover.main({str(socket)!r})"]
    with traced.open("w") as stderr, subprocess.Popen([*TRACED, "serve", str(socket)], stderr=stderr) as resident:
        try:
            until = time.monotonic() + 30
            while not socket.exists() and time.monotonic() < until:
                time.sleep(0.02)
            for command in ("ADD", "CHECK", "DEL"):
                assert call(namespace, command, *handed_over).returncode == 0
        finally:
            resident.kill()
    assert imported(traced.read_text()) == set()
