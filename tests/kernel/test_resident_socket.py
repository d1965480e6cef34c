from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, Node, config, mapping
from resident import NEVER_COLD, PATIENT, Resident, eventually, launcher, with_executables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        return not asking.connect_ex(str(path))


def serve(path: str) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCHER, "serve", path]
    return subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "pipe", "link to a socket"])
def test_what_is_no_socket_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path, stale = tmp_path / "there", tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as rest:
        rest.bind(str(stale))
    make: dict[str, Callable[[], object]] = {
        "file": path.touch,
        "directory": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path / "file"),
        "pipe": lambda: os.mkfifo(path),
        "link to a socket": lambda: path.symlink_to(stale),
    }
    make[kind]()
    (tmp_path / "file").touch()
    before = path.lstat().st_ino
    served = serve(str(path))
    assert (served.returncode, served.stdout) == (1, "")
    assert served.stderr == f"hostport: {path} exists, and is not a socket that was left behind\n"
    assert path.lstat().st_ino == before


def test_a_socket_of_another_kind_is_somebodys(tmp_path: Path) -> None:
    path = tmp_path / "there"
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(str(path))
            served = serve(str(path))
            assert (served.returncode, served.stderr.count("\n")) == (1, 1)
            assert path.is_socket()
            path.unlink()


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as rest:
        rest.bind(str(tmp_path / "socket"))
    started = subprocess.Popen([*LAUNCHER, "serve", str(tmp_path / "socket")], env={})
    try:
        assert eventually(lambda: answers(tmp_path / "socket"))
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize("name", ["x" * 108, "absent/socket", "x" * 300])
def test_a_socket_that_cannot_be_made_is_one_sentence(tmp_path: Path, name: str) -> None:
    served = serve(f"{tmp_path}/{name}")
    assert (served.returncode, served.stdout, served.stderr.count("\n")) == (1, "", 1)
    assert served.stderr.startswith(f"Error: cannot serve {tmp_path}/{name}: ")


@with_executables()
def test_a_socket_with_too_long_a_name_is_none_to_callers(node: Node, tmp_path: Path) -> None:
    node.launcher = launcher(tmp_path, tmp_path / ("x" * 200))
    pod = node.pod(4)
    assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_resident_process_and_removes_its_socket(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with Resident(tmp_path / "socket") as resident:
        children = resident.children
        resident.process.send_signal(number)
        assert resident.process.wait(20) == status
        assert not resident.path.exists()
        assert resident.log.read_text() == ""
        assert eventually(lambda: not any(os.path.exists(f"/proc/{child}/fd/0") for child in children))


def test_a_signal_to_a_child_does_not_remove_the_socket(tmp_path: Path) -> None:
    with Resident(tmp_path / "socket") as resident:
        for child in resident.children:
            os.kill(child, signal.SIGTERM)
        assert eventually(lambda: len(resident.children) > 1)
        assert resident.path.is_socket()


REFUSES = """
import os
fork, forks = os.fork, []
def refuse():
    forks.append(None)
    if {lowest} <= len(forks) < {highest}:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = refuse
"""


def test_without_any_child_the_resident_process_ends_and_leaves_nothing(tmp_path: Path) -> None:
    lines = [
        "from cni_hostport.resident import process as resident",
        REFUSES.format(lowest=1, highest=10**9),
        "import sys",
    ]
    serves = f"sys.argv[1:] = ['serve', '{tmp_path}/socket']\nfrom cni_hostport.__main__ import main\nmain()"
    command = [sys.executable, "-Ic", "\n".join([*lines, serves])]
    served = subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=60)
    refused = f"Error: cannot serve {tmp_path}/socket: Resource temporarily unavailable\n"
    assert (served.returncode, served.stdout, served.stderr) == (1, "", refused)
    assert not (tmp_path / "socket").exists()


@with_executables()
def test_a_child_that_cannot_be_made_is_made_later(node: Node, tmp_path: Path) -> None:
    with Resident(tmp_path / "socket", REFUSES.format(lowest=4, highest=6)) as resident:
        node.launcher = launcher(tmp_path, resident.path)
        for number in range(4):
            node.add(node.pod(4), mapping(8000 + number))
        assert eventually(lambda: len(resident.children) > 1)


def test_closed_streams_of_the_resident_process_do_no_harm(node: Node, tmp_path: Path) -> None:
    served = subprocess.Popen(
        ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *LAUNCHER, "serve", str(tmp_path / "socket")], env={}
    )
    try:
        assert eventually((tmp_path / "socket").exists)
        node.launcher = launcher(tmp_path, tmp_path / "socket", NEVER_COLD, *PATIENT)
        pod = node.pod(4)
        assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]
    finally:
        served.kill()
        served.wait()


@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    with Resident(tmp_path_factory.mktemp("resident") / "socket") as made:
        yield made


@with_executables()
@pytest.mark.parametrize(
    "path",
    ["/proc/self/fd/7", "//proc/self/fd/7", "/proc/./self/fd/7", "/proc/thread-self/fd/7", "/dev/fd/7", "{link}/7",
     "/proc/$$/fd/7", "//proc/$$/fd/7", "{relative}/self/fd/7"],
)  # fmt: skip
def test_a_descriptor_of_the_callers_is_its_own_namespace_and_no_childs(
    node: Node, resident: Resident, tmp_path: Path, path: str
) -> None:
    pod = node.pod(4)
    (tmp_path / "link").symlink_to("/proc/self/fd")
    path = path.format(link=tmp_path / "link", relative=os.path.relpath("/proc", tmp_path))
    executable = launcher(tmp_path, resident.path, *PATIENT)
    node.launcher = ["sh", "-c", f'cd {tmp_path}; CNI_NETNS={path} exec "$@" 7<{pod.path}', "sh", *executable]
    call = {
        "cniVersion": "1.1.0",
        "name": "pods",
        "runtimeConfig": {"portMappings": [mapping(8080)]},
        "prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": pod.path}]},
    }
    outcome = node.cni("ADD", pod, call)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert f"dnat ip to {pod.ip4}:80" in node.nft("list ruleset")


@with_executables()
@pytest.mark.parametrize("path", ["/proc/self/ns/net", "//proc/self/ns/net", "{link}/ns/net", "/proc/$$/ns/net"])
def test_the_callers_own_namespace_is_no_containers(node: Node, resident: Resident, tmp_path: Path, path: str) -> None:
    pod = node.pod(4)
    (tmp_path / "link").symlink_to("/proc/self")
    executable = launcher(tmp_path, resident.path, *PATIENT)
    path = path.format(link=tmp_path / "link")
    node.launcher = ["sh", "-c", f'CNI_NETNS={path} exec "$@"', "sh", *executable]
    assert node.cni("ADD", pod, config(pod, mapping(8080))).code == 8
