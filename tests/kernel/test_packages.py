"""The packages for dpkg and rpm, in a copy of this machine's root: installed, upgraded under calls, removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import bundle
import pytest
from bare_root import BareRoot
from go_tools import unavailable
from lab import Node, config, mapping, require, wait
from resident import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD, NEW = "8.1", "8.2"
EXECUTABLE = "/opt/cni/bin/hostport"
UNITS = "hostport.socket hostport.service hostport-restore.service"
SYSTEMCTL = '#!/bin/sh\necho "$*" >>/run/systemctl\n'
INSTALL = {"deb": ["dpkg", "--install"], "rpm": ["rpm", "--upgrade", "--nodeps"]}
REMOVE = {"deb": ["dpkg", "--purge", "hostport"], "rpm": ["rpm", "--erase", "hostport"]}
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


@pytest.fixture(params=["deb", "rpm"])
def kind(request: pytest.FixtureRequest) -> str:
    require(not (need := unavailable("nfpm", "nfpm")), f"needs {need}")
    program = INSTALL[request.param][0]
    require(shutil.which(program), f"needs {program}")
    return str(request.param)


@pytest.fixture
def root(_kernel: None, tmp_path: Path) -> Iterator[BareRoot]:
    files = {"/usr/bin/systemctl": SYSTEMCTL}
    with BareRoot(tmp_path / "root", bundle.directory(), "/", files) as made:
        (made.inside / "run/systemd/system").mkdir(parents=True)
        yield made


def start(root: BareRoot, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        root.command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def run(root: BareRoot, *command: str) -> str:
    process = start(root, *command)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def test_a_package_is_installed_upgraded_under_calls_and_removed(root: BareRoot, kind: str) -> None:
    opt = root.inside / "opt" / "hostport"
    run(root, *INSTALL[kind], str(bundle.packages(OLD)[kind]))
    assert run(root, "/usr/bin/hostport", "--version") == f"hostport, version {OLD}\n"
    said = (root.inside / "run" / "systemctl").read_text().splitlines()
    assert said[-3:] == ["daemon-reload", f"enable {UNITS}", f"restart {UNITS}"]
    [installed] = [path for path in opt.iterdir() if not path.is_symlink()]

    with Node(root.command(EXECUTABLE)) as node:
        pod, other = node.pod(4), node.pod(4)
        node.add(pod, mapping(8080))

        # a call that waits for its input, from before the upgrade until after its end
        environment = {"CNI_COMMAND": "ADD", "CNI_PATH": "/opt/cni/bin", "CNI_CONTAINERID": other.id}
        environment |= {"CNI_NETNS": other.path, "CNI_IFNAME": "eth0"}
        late = subprocess.Popen(
            ["nsenter", f"--net={node.path}", *node.launcher],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert eventually(lambda: "/opt/hostport/" in (maps(late.pid)))

        versions, stop = list[str](), threading.Event()

        def ask() -> None:
            while not stop.is_set():
                versions.append(run(root, EXECUTABLE, "--version").split()[-1])

        asking = threading.Thread(target=ask)
        asking.start()
        upgrade = start(root, *INSTALL[kind], str(bundle.packages(NEW)[kind]))
        assert eventually(lambda: NEW in versions, 60)
        assert installed.is_dir()
        assert upgrade.poll() is None
        assert late.stdin
        late.stdin.write(json.dumps(config(other, mapping(8081))))
        late.stdin.close()
        late.stdin = None
        outcome = wait(late)
        assert (outcome.status, outcome.stderr) == (0, "")
        output, _ = upgrade.communicate(timeout=200)
        stop.set()
        asking.join()
        assert upgrade.returncode == 0, output
        assert versions == sorted(versions)
        assert not installed.exists()
        assert "try-restart hostport.service" in (root.inside / "run" / "systemctl").read_text()

        assert node.cni("CHECK", pod, config(pod, mapping(8080))).status == 0
        assert node.cni("CHECK", other, config(other, mapping(8081))).status == 0
        run(root, *REMOVE[kind])
        assert node.holds(pod)
    assert f"disable --now {UNITS}" in (root.inside / "run" / "systemctl").read_text()
    for name in ("opt/hostport", "opt/cni/bin/hostport", "usr/bin/hostport", "usr/lib/systemd/system/hostport.socket"):
        assert not os.path.lexists(root.inside / name)


def maps(process: int) -> str:
    """Return what a process and those in its place have in memory; empty where it has just ended."""
    try:
        with open(f"/proc/{process}/maps") as file:
            return file.read()
    except OSError:
        return ""
