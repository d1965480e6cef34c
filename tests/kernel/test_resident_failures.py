from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import NODE4, Node, config, mapping, wait
from resident import (
    NATIVE,
    NEVER_COLD,
    PYTHON,
    Resident,
    bystander,
    eventually,
    launcher,
    request,
    server,
    take,
    with_executables,
)

from cni_hostport.handover import IDENTITY, TAKEN, file_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Pod
    from resident import Scenario

HURRIED = "import cni_hostport.handover as h; h.UNTIL_DONE = 0.3"
PATIENT = "h.UNTIL_TAKEN = 20"


def dies_at_once(_connection: socket.socket) -> None:
    pass


def talks_nonsense(connection: socket.socket) -> None:
    request(connection)
    with contextlib.suppress(OSError):
        connection.send(b"nonsense")


def takes_without_saying_who(connection: socket.socket) -> None:
    request(connection)
    with contextlib.suppress(OSError):
        connection.send(TAKEN)


def takes_and_dies(connection: socket.socket) -> None:
    request(connection)
    with bystander() as process:
        take(connection, process.pid)


def answers_and_dies_before_it_says_so(connection: socket.socket) -> None:
    _, stdout, *_ = request(connection)
    with bystander() as process:
        take(connection, process.pid)
        os.write(stdout, b'{"cniVersion": "1.1.0", "ips": []}')


def hangs(connection: socket.socket) -> None:
    request(connection)
    connection.recv(1)


def takes_and_hangs(connection: socket.socket) -> None:
    request(connection)
    with bystander() as process:
        take(connection, process.pid)
        assert process.wait(20) == -signal.SIGKILL


def takes_too_late_and_hangs(connection: socket.socket) -> None:
    request(connection)
    time.sleep(0.45)  # just about when the caller gives up
    with bystander() as process:
        try:
            take(connection, process.pid)
        except BrokenPipeError:
            return
        assert process.wait(20) == -signal.SIGKILL


@with_executables()
@pytest.mark.parametrize(
    "scenario",
    [dies_at_once, talks_nonsense, takes_without_saying_who, takes_and_dies, answers_and_dies_before_it_says_so, hangs,
     takes_and_hangs, takes_too_late_and_hangs],
)  # fmt: skip
def test_a_call_that_the_resident_process_fails_is_done_and_answered_once(
    node: Node, tmp_path: Path, scenario: Scenario
) -> None:
    patience = [] if scenario in {hangs, takes_too_late_and_hangs} else [PATIENT]
    node.launcher = launcher(tmp_path, tmp_path / "socket", HURRIED, *patience)
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    call = config(pod, mapping(8080))
    with server(tmp_path / "socket", scenario):
        assert node.add(pod, mapping(8080)).json == call["prevResult"]
        assert node.client.ask("tcp", NODE4, 8080) == "web 192.0.2.2"
        assert node.cni("CHECK", pod, call).status == 0
        assert node.cni("ADD", pod, config(pod, mapping(-1))).code == 7
        node.delete(pod)
    assert "goto dnat-" not in node.nft("list ruleset")


@pytest.fixture(params=["none", "stale", "deaf", "full", "another version", "stopped"])
def useless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """An executable whose resident process is of no use."""
    path = tmp_path / "socket"
    lines = ["h.IDENTITY = 'another'"] if request.param == "another version" else []
    executable = launcher(tmp_path, path, "import cni_hostport.handover as h", *lines)
    with contextlib.ExitStack() as stack:
        if request.param in {"another version", "stopped"}:
            resident = stack.enter_context(Resident(path))
            if request.param == "stopped":
                stack.callback(resident.signal, signal.SIGKILL)
                resident.signal(signal.SIGSTOP)
        elif request.param != "none":
            listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listening.bind(str(path))
            if request.param != "stale":
                listening.listen(0 if request.param == "full" else 8)
            while request.param == "full":
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                waiting.setblocking(False)  # noqa: FBT003 - the method's own
                if waiting.connect_ex(str(path)):
                    break
        yield executable


@with_executables()
def test_a_call_does_without_a_resident_process_that_is_of_no_use(node: Node, useless: list[str]) -> None:
    node.launcher = useless
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    call = config(pod, mapping(8080))
    assert node.add(pod, mapping(8080)).json == call["prevResult"]
    assert node.client.ask("tcp", NODE4, 8080) == "web 192.0.2.2"
    assert node.cni("CHECK", pod, call).status == 0
    node.delete(pod)
    assert "goto dnat-" not in node.nft("list ruleset")


@with_executables(PYTHON, NATIVE)
def test_a_child_that_is_killed_while_it_works_leaves_the_call_to_the_caller(node: Node, tmp_path: Path) -> None:
    with Resident(tmp_path / "socket") as resident:
        node.launcher = launcher(tmp_path, tmp_path / "socket")
        pods = [node.pod(4) for _ in range(6)]
        for number, pod in enumerate(pods):
            idle = set(resident.children)
            started = node.start("ADD", pod, config(pod, mapping(8000 + number)))
            time.sleep(0.008 * number)  # from before it is taken until after it is done
            for child in idle:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            outcome = wait(started)
            assert (outcome.status, outcome.json) == (0, config(pod)["prevResult"])
            eventually(lambda: len(resident.children) > 1)
    assert node.nft("list map inet hostport hostports").count("goto dnat-") == 6


@pytest.fixture
def slow(node: Node, tmp_path: Path) -> Iterator[tuple[Node, Path]]:
    """A node whose resident process runs a call only when the file that is given appears."""
    gate, path = tmp_path / "gate", tmp_path / "socket"
    late = f"""
import os, time
from cni_hostport.__main__ import run
from cni_hostport.resident import process as resident
call = run
def slowly(environ):
    open("{tmp_path / "taken"}", "w").write(str(os.getpid()))
    while not os.path.exists("{gate}"):
        time.sleep(0.01)
    return call(environ)
run = slowly
resident.serve(run, "{path}")
"""
    served = subprocess.Popen([sys.executable, "-Ic", late], env={})
    try:
        assert eventually(path.exists)
        node.launcher = launcher(tmp_path, path, NEVER_COLD)
        yield node, gate
    finally:
        served.kill()
        served.wait()


def begun(node: Node, pod: Pod, directory: Path) -> tuple[subprocess.Popen[str], int]:
    """Start an ADD, and return it and the child that has taken it."""
    started = node.start("ADD", pod, config(pod, mapping(8080)))
    taken = directory / "taken"
    assert eventually(lambda: taken.exists() and taken.read_text())
    return started, int(taken.read_text())


@with_executables()
def test_the_end_of_the_caller_is_the_end_of_its_call(slow: tuple[Node, Path], tmp_path: Path) -> None:
    node, gate = slow
    pod = node.pod(4)
    started, child = begun(node, pod, tmp_path)
    started.kill()
    started.communicate()
    assert eventually(lambda: not Path(f"/proc/{child}/fd/0").exists())
    gate.touch()
    time.sleep(0.3)
    assert "hostport" not in node.nft("list ruleset")


@with_executables()
def test_a_call_under_way_outlives_the_resident_process(slow: tuple[Node, Path], tmp_path: Path) -> None:
    node, gate = slow
    pod = node.pod(4)
    started, child = begun(node, pod, tmp_path)
    parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    gate.touch()
    assert wait(started).status == 0
    assert "goto dnat-" in node.nft("list map inet hostport hostports")


def test_a_child_cannot_take_a_call_that_the_caller_withdrew(tmp_path: Path) -> None:
    with Resident(tmp_path / "socket") as resident, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        resident.signal(signal.SIGSTOP)
        caller.connect(str(tmp_path / "socket"))
        variables = ["CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_PATH=/", "CNI_NETNS=/"]
        output = os.memfd_create("stdout")
        places = [os.memfd_create("stdin"), output, output, os.pidfd_open(os.getpid())]
        socket.send_fds(caller, ["\0".join([IDENTITY, file_at("/"), *variables]).encode()], places)
        caller.shutdown(socket.SHUT_RDWR)
        resident.signal(signal.SIGCONT)
        assert caller.recv(100) == b""
        time.sleep(0.3)
        assert os.fstat(output).st_size == 0
        for place in places:
            with contextlib.suppress(OSError):
                os.close(place)
