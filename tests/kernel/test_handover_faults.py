from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, Node, config, mapping
from resident import Resident, launcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ERRORS = [errno.ECONNREFUSED, errno.ENOBUFS, errno.EMFILE, errno.EIO, errno.ENOMEM]
# the functions by which the hand-over asks the kernel, and how often
FUNCTIONS = {
    "socket": 1, "connect": 1, "settimeout": 2, "sendmsg": 1, "recvmsg": 1, "recv": 1,
    "memfd_create": 3, "pidfd_open": 1, "lseek": 1, "stat": 1, "write": 1, "fstat": 2, "pread": 2,
}  # fmt: skip
TIMES = [(name, time) for name, times in FUNCTIONS.items() for time in range(1, times + 1)]
FAILS = """
import os
from cni_hostport import handover
calls = []
def failing(function):
    def call(*arguments, **keys):
        calls.append(None)
        if len(calls) == {time} or {persists} and len(calls) > {time}:
            raise {error!r}
        return function(*arguments, **keys)
    return call
class System:
    def __getattr__(self, name):
        return getattr(os, name)
class Socket(handover.socket):
    pass
where, whose = (Socket, handover.socket) if hasattr(Socket, {name!r}) else (System, os)
if {name!r} == "socket":
    Socket = failing(handover.socket)
else:
    function = failing(getattr(whose, {name!r}))
    setattr(where, {name!r}, lambda self, *arguments: function(*([self] if whose is not os else []), *arguments))
handover.os, handover.socket = System(), Socket
"""
ONCE = ("write",)  # by which a call that is done here is answered as well


@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    with Resident(tmp_path_factory.mktemp("resident") / "socket") as made:
        yield made


def is_done_once(node: Node, executable: list[str]) -> None:
    pod = node.pod(4)
    node.launcher = executable
    outcome = node.cni("ADD", pod, config(pod, mapping(8080)))
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.json == config(pod)["prevResult"]
    node.launcher = LAUNCHER
    assert node.cni("CHECK", pod, config(pod, mapping(8080))).status == 0
    node.launcher = executable
    deleted = node.delete(pod)
    assert (deleted.stdout, deleted.stderr) == ("", "")
    assert not node.holds(pod)


@pytest.mark.parametrize(("name", "time"), TIMES)
def test_whatever_fails_in_the_hand_over_the_call_is_done_and_answered_once(
    node: Node, resident: Resident, tmp_path: Path, name: str, time: int
) -> None:
    error = OSError(ERRORS[(time + len(name)) % len(ERRORS)], "injected")
    for persists, failure in [(False, MemoryError()), (name not in ONCE, error)]:
        lines = FAILS.format(name=name, time=time, error=failure, persists=persists)
        is_done_once(node, launcher(tmp_path, resident.path, lines))


@pytest.mark.parametrize("number", ERRORS)
def test_no_error_of_a_socket_is_a_traceback(node: Node, resident: Resident, tmp_path: Path, number: int) -> None:
    pod = node.pod(4)
    for name in ("socket", "connect", "sendmsg", "recvmsg", "recv"):
        lines = FAILS.format(name=name, time=1, error=OSError(number, "injected"), persists=True)
        node.launcher = launcher(tmp_path, resident.path, lines)
        assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]
