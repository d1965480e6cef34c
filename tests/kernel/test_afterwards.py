from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kernel.test_conntrack import Talker, udp
from kernel.test_conntrack_tcp import Dialling, opened, towards_nobody, translate
from lab import LAUNCHER, NODE4, QUIET, Node, Pod, config, mapping
from resident import NEVER_COLD, Resident, eventually, launcher
from tcp_connection import Conversation

from cni_hostport.resident.process import MAX_CHILDREN

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 8080
WAITS = """
import os, time
from cni_hostport.kernel import conntrack
def late(forget):
    def wait(*arguments):
        with open("{notes}.new", "w") as out:
            out.write(str(os.getpid()))
        os.rename("{notes}.new", "{notes}")
        while not os.path.exists("{gate}"):
            time.sleep(0.01)
        forget(*arguments)
    return wait
conntrack.forget_the_rest = late(conntrack.forget_the_rest)
conntrack.forget_to_deleted = late(conntrack.forget_to_deleted)
"""


class Sweep:
    """What a call leaves to be done afterwards, made to wait, and the process that does it."""

    def __init__(self, directory: Path) -> None:
        self._notes, self._gate = directory / "notes", directory / "gate"
        self.lines = WAITS.format(notes=self._notes, gate=self._gate)

    def go_on(self) -> None:
        self._gate.touch()

    @property
    def process(self) -> int:
        assert eventually(self._notes.exists)
        return int(self._notes.read_text())

    @property
    def is_alive(self) -> bool:
        return Path(f"/proc/{self.process}/fd/0").exists()

    @property
    def descriptors(self) -> set[str]:
        """The files that it has open."""
        return {os.readlink(path) for path in Path(f"/proc/{self.process}/fd").iterdir() if path.is_symlink()}


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    made = Sweep(tmp_path)
    yield made
    made.go_on()


@pytest.fixture(params=["cold", "warm"])
def start(request: pytest.FixtureRequest, node: Node, tmp_path: Path, sweep: Sweep) -> Iterator[None]:
    """Have the executable, or the resident process that it calls, wait afterwards."""
    socket = tmp_path / "socket"
    if request.param == "cold":
        node.launcher = launcher(tmp_path, socket, sweep.lines)
        yield
        return
    with Resident(socket, sweep.lines):
        node.launcher = launcher(tmp_path, socket, NEVER_COLD)
        yield


@pytest.mark.usefixtures("start")
def test_an_add_is_answered_before_and_its_streams_are_closed(node: Node, sweep: Sweep) -> None:
    pod = node.pod(4)
    assert node.add(pod, mapping(PORT)).json == config(pod)["prevResult"]
    assert sweep.is_alive
    assert not sweep.descriptors - {"/dev/null"}


@pytest.mark.usefixtures("start")
def test_what_is_left_to_be_done_is_done_although_the_caller_has_gone(node: Node, sweep: Sweep) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    translate(node)
    old = towards_nobody(node, NODE4)
    with Dialling(node.client, NODE4) as dialling:
        assert eventually(lambda: opened(node))
        node.nft(f"delete table {old}")
        node.add(pod, mapping(PORT))
        assert sweep.is_alive
        sweep.go_on()
        assert dialling.hears() == "web"
    assert eventually(lambda: not sweep.is_alive)


def added(node: Node, *mappings: dict[str, object]) -> Pod:
    """Return a pod whose ADD is over, with all that was left to be done after it."""
    pod, late, node.launcher = node.pod(4), node.launcher, LAUNCHER
    node.add(pod, *mappings)
    node.launcher = late
    return pod


@pytest.mark.usefixtures("start")
def test_a_del_is_answered_when_clients_of_udp_are_forgotten_and_connections_end_later(
    node: Node, sweep: Sweep
) -> None:
    pod = added(node, mapping(PORT, 8888), *udp())
    pod.serve("udp", 53, "web")
    with Conversation(node.client, NODE4, PORT, pod) as connection, Talker(node.client, NODE4) as talker:
        assert talker.hears() == "web"
        node.delete(pod)
        assert talker.hears_nothing()
        assert sweep.is_alive
        assert connection.goes_on()
        sweep.go_on()
        assert eventually(lambda: not opened(node))
        assert not connection.is_heard(QUIET)


def test_an_add_whose_result_cannot_be_written_leaves_what_its_del_leaves(
    node: Node, tmp_path: Path, sweep: Sweep
) -> None:
    path = tmp_path / "socket"
    with Resident(path):
        lines = ("import cni_hostport.handover as h", "h.UNTIL_TAKEN = 20", sweep.lines)
        node.launcher = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *launcher(tmp_path, path, *lines)]
        pod = node.pod(4)
        assert node.cni("ADD", pod, config(pod, mapping(PORT))).status == 1
        assert not node.holds(pod)
        assert sweep.is_alive


@pytest.mark.usefixtures("start")
def test_what_a_del_left_to_be_done_spares_connections_by_a_later_add_of_the_pod(node: Node, sweep: Sweep) -> None:
    pod = added(node, mapping(PORT, 8888))
    node.delete(pod)
    process = sweep.process
    node.launcher = LAUNCHER
    node.add(pod, mapping(PORT, 8888))
    with Conversation(node.client, NODE4, PORT, pod) as connection:
        sweep.go_on()
        assert eventually(lambda: not Path(f"/proc/{process}/fd/0").exists())
        assert connection.goes_on()
        assert opened(node)


@pytest.mark.usefixtures("start")
def test_what_a_del_left_to_be_done_ends_connections_by_a_port_that_the_pod_has_no_more(
    node: Node, sweep: Sweep
) -> None:
    pod = added(node, mapping(PORT, 8888))
    with Conversation(node.client, NODE4, PORT, pod) as connection:
        node.delete(pod)
        process = sweep.process
        node.launcher = LAUNCHER
        node.add(pod, mapping(PORT + 1, 8888))
        sweep.go_on()
        assert eventually(lambda: not Path(f"/proc/{process}/fd/0").exists())
        assert not opened(node)
        assert not connection.is_heard(QUIET)


def test_it_is_no_longer_the_resident_process_that_does_it(node: Node, tmp_path: Path, sweep: Sweep) -> None:
    with Resident(tmp_path / "socket", sweep.lines) as resident:
        node.launcher = launcher(tmp_path, tmp_path / "socket", NEVER_COLD)
        for number in range(MAX_CHILDREN + 1):
            node.add(node.pod(4), mapping(PORT + number))
        resident.kill()
        assert sweep.is_alive


def test_where_no_process_can_be_made_an_add_does_it_before_it_ends(node: Node, tmp_path: Path) -> None:
    refuses = "import os\ndef refuse():\n    raise OSError(11, 'no')\nos.fork = refuse"
    node.launcher = launcher(tmp_path, tmp_path / "socket", refuses)
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    translate(node)
    old = towards_nobody(node, NODE4)
    with Dialling(node.client, NODE4) as dialling:
        assert eventually(lambda: opened(node))
        node.nft(f"delete table {old}")
        outcome = node.add(pod, mapping(PORT))
        assert not opened(node)
        assert outcome.json == config(pod)["prevResult"]
        assert dialling.hears() == "web"


def test_an_add_that_was_answered_has_succeeded_even_if_nothing_can_be_done_afterwards(
    node: Node, tmp_path: Path
) -> None:
    node.launcher = launcher(tmp_path, tmp_path / "none", 'sys.modules["cni_hostport.afterwards"] = None')
    pod = node.pod(4)
    outcome = node.add(pod, mapping(PORT))
    assert outcome.json == config(pod)["prevResult"]
    assert outcome.stderr.startswith("hostport: what was left to be done after the answer is not done: ")
