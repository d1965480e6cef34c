from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from lab import NODE4, NODE6, Node, Outcome, config, mapping, wait
from resident import NEVER_COLD, Resident, eventually, launcher

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Pod

LONG, SHORT = 20, 1
NOTES = """
from cni_hostport import port_wait
wait = port_wait._wait
def noting(*arguments):
    with open("{notes}", "a") as out:
        out.write(".")
    return wait(*arguments)
port_wait._wait = noting
"""
PATIENT = "import cni_hostport.handover; cni_hostport.handover.UNTIL_TAKEN = 20"
ARGUMENTS = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=first"


class Callers(Node):
    """A node on which every wait of an ADD is noted in a file."""

    def __init__(self, executable: list[str], notes: Path) -> None:
        super().__init__(executable)
        self.notes = notes
        self.waiting: list[subprocess.Popen[str]] = []

    def __exit__(self, *_: object) -> None:
        for item in self.waiting:
            item.kill()
            item.communicate()
        super().__exit__()

    def wanting(
        self, pod: Pod, *mappings: dict[str, Any], seconds: int = LONG, **variables: str
    ) -> subprocess.Popen[str]:
        """Start an ADD that waits for so many seconds."""
        started = self.start("ADD", pod, config(pod, *mappings, waitForHolder=seconds), **variables)
        self.waiting.append(started)
        return started

    def wait_for(self, waiting: int) -> None:
        """See so many waits begin."""
        assert eventually(lambda: self.notes.exists() and len(self.notes.read_text()) >= waiting)


@pytest.fixture(params=["cold", "warm"])
def node(request: pytest.FixtureRequest, _kernel: None, tmp_path: Path) -> Iterator[Callers]:
    path, notes = tmp_path / "socket", tmp_path / "notes"
    noting = NOTES.format(notes=notes)
    if request.param == "cold":
        with Callers(launcher(tmp_path, path, noting), notes) as made:
            yield made
    else:
        with Resident(path, noting), Callers(launcher(tmp_path, path, NEVER_COLD, PATIENT), notes) as made:
            yield made


@pytest.fixture
def first(node: Callers) -> Pod:
    pod = node.pod()
    mappings = mapping(8080), mapping(53, 53, "udp", hostIP=NODE4), mapping(9090, hostIP=NODE6)
    assert node.cni("ADD", pod, config(pod, *mappings), ARGS=ARGUMENTS).status == 0
    return pod


def refusal(first: Pod, port: str = "8080/tcp") -> str:
    return f"host port {port} is taken by pod shop/first, container {first.id[:12]} (eth0)"


def is_told(outcome: Outcome, first: Pod, port: str = "8080/tcp") -> bool:
    before, output, after = outcome.stderr.partition(f" s for an end of this: {refusal(first, port)}\n")
    return before.startswith("hostport: waited ") and bool(output) and not after


@pytest.mark.parametrize(
    ("wanted", "port"),
    [
        (mapping(8080), "8080/tcp"),
        (mapping(53, 53, "udp", hostIP=NODE4), f"53/udp on {NODE4}"),
        (mapping(9090, hostIP=NODE6), f"9090/tcp on {NODE6}"),
    ],
    ids=["any address", "IPv4 address", "IPv6 address"],
)
def test_a_port_is_taken_when_its_holder_is_deleted_and_the_wait_is_told(
    node: Callers, first: Pod, wanted: dict[str, Any], port: str
) -> None:
    second = node.pod()
    started = node.wanting(second, wanted)
    node.wait_for(1)
    assert started.poll() is None
    node.delete(first)
    outcome = wait(started)
    assert (outcome.status, is_told(outcome, first, port)) == (0, True), outcome
    assert node.cni("CHECK", second, config(second, wanted)).code == 0
    assert node.notes.read_text() == "."


def test_a_port_is_taken_over_when_its_holders_namespace_goes(node: Callers, first: Pod) -> None:
    second = node.pod()
    second.serve("tcp", 80, "second")
    started = node.wanting(second, mapping(8080))
    node.wait_for(1)
    first.remove()
    outcome = wait(started)
    assert outcome.status == 0
    assert refusal(first) in outcome.stderr
    assert f"whose namespace {first.path} is gone" in outcome.stderr
    assert node.client.ask("tcp", NODE4, 8080).startswith("second")
    assert not node.footprint(first)


def test_a_port_is_taken_when_its_holder_no_longer_wants_it(node: Callers, first: Pod) -> None:
    second = node.pod()
    started = node.wanting(second, mapping(8080))
    node.wait_for(1)
    node.add(first, mapping(9090))
    assert wait(started).status == 0
    assert node.footprint(first)


def test_a_holder_that_is_added_again_keeps_its_port(node: Callers, first: Pod) -> None:
    second = node.pod()
    started = node.wanting(second, mapping(8080), seconds=SHORT)
    node.wait_for(1)
    node.add(first, mapping(8080))
    assert wait(started).code == 100
    assert node.cni("CHECK", first, config(first, mapping(8080))).code == 0


def test_a_flush_of_the_ruleset_frees_the_port(node: Callers, first: Pod) -> None:
    second = node.pod()
    started = node.wanting(second, mapping(8080))
    node.wait_for(1)
    node.nft("flush ruleset")
    assert is_told(wait(started), first)


def test_nobody_waits_where_the_configuration_says_0(node: Callers, first: Pod) -> None:
    outcome = wait(node.wanting(node.pod(), mapping(8080), seconds=0))
    assert (outcome.code, outcome.msg, outcome.stderr) == (100, refusal(first), "")
    assert not node.notes.exists()


def test_who_waited_in_vain_is_refused_in_the_same_words(node: Callers, first: Pod) -> None:
    before = node.ruleset()
    outcome = wait(node.wanting(node.pod(), mapping(8080), seconds=SHORT))
    assert (outcome.code, outcome.msg, outcome.stderr) == (100, refusal(first), "")
    assert node.notes.read_text() == "."
    assert node.ruleset() == before


def test_five_seconds_are_waited_unless_the_configuration_says_otherwise(node: Callers, first: Pod) -> None:
    second = node.pod()
    wanted = config(second, mapping(8080))
    del wanted["waitForHolder"]
    started = node.start("ADD", second, wanted)
    node.wait_for(1)
    node.delete(first)
    assert is_told(wait(started), first)


def test_a_waiting_add_has_nothing_installed_and_is_in_nobodys_way(node: Callers, first: Pod) -> None:
    second, third = node.pod(), node.pod()
    before = node.ruleset()
    started = node.wanting(second, mapping(8080), mapping(8081))
    node.wait_for(1)
    assert node.ruleset() == before
    node.add(third, mapping(8081))
    node.delete(third)
    assert not node.footprint(second)
    assert started.poll() is None
    node.delete(first)
    assert wait(started).status == 0
    assert node.footprint(second)["hostports"] == 4


def test_a_repeated_add_that_waits_keeps_what_was_installed(node: Callers, first: Pod) -> None:
    second = node.pod()
    node.add(second, mapping(8081))
    started = node.wanting(second, mapping(8080), mapping(8081))
    node.wait_for(1)
    assert node.cni("CHECK", second, config(second, mapping(8081))).code == 0
    node.delete(first)
    assert wait(started).status == 0


def test_ports_of_two_holders_are_waited_for_one_after_the_other(node: Callers, first: Pod) -> None:
    other, taker = node.pod(), node.pod()
    node.add(other, mapping(8081))
    started = node.wanting(taker, mapping(8080), mapping(8081))
    node.wait_for(1)
    node.delete(first)
    node.wait_for(2)
    assert not node.footprint(taker)
    node.delete(other)
    assert is_told(wait(started), first)


def test_a_port_that_goes_to_the_holders_second_network_is_waited_for_on(node: Callers, first: Pod) -> None:
    other = config(first, mapping(8080), name="other", prevResult={"ips": [{"address": "10.88.0.201/24"}]})
    assert node.cni("ADD", first, other, IFNAME="eth1").status == 0
    taker = node.pod(4)
    started = node.wanting(taker, mapping(8080))
    node.wait_for(1)
    node.delete(first)
    node.wait_for(2)
    assert node.cni("DEL", first, other, IFNAME="eth1").status == 0
    assert is_told(wait(started), first)
    assert node.footprint(taker)


def test_of_eight_that_wait_for_one_port_one_gets_it_and_the_others_are_refused(node: Callers, first: Pod) -> None:
    pods = [node.pod(4) for _ in range(8)]
    started = [node.wanting(pod, mapping(8080), mapping(9000 + n), seconds=8) for n, pod in enumerate(pods)]
    node.wait_for(8)
    node.delete(first)
    outcomes = [wait(item) for item in started]
    assert sorted(outcome.code for outcome in outcomes) == [0] + [100] * 7
    for pod, outcome in zip(pods, outcomes, strict=True):
        assert bool(node.footprint(pod)) == (outcome.code == 0)
    [winner] = [pod for pod, outcome in zip(pods, outcomes, strict=True) if not outcome.code]
    assert all(winner.id[:12] in outcome.msg for outcome in outcomes if outcome.code)
    assert node.footprint(winner)["hostports"] == 2


def test_a_container_that_goes_while_it_waits_gets_nothing(node: Callers, first: Pod) -> None:
    second = node.pod()
    started = node.wanting(second, mapping(8080))
    node.wait_for(1)
    second.remove()
    node.delete(first)
    assert wait(started).code == 100
    assert "goto dnat-" not in node.ruleset()


def test_a_killed_executable_takes_nothing_any_more(node: Callers, first: Pod) -> None:
    second = node.pod()
    started = node.wanting(second, mapping(8080))
    node.wait_for(1)
    started.kill()
    wait(started)
    node.delete(first)
    third = node.pod()
    node.add(third, mapping(8080))
    assert not node.footprint(second)


@pytest.mark.usefixtures("_kernel")
def test_calls_are_warm_however_many_wait_and_a_killed_executables_child_ends(tmp_path: Path) -> None:
    path, notes = tmp_path / "socket", tmp_path / "notes"
    executable = launcher(tmp_path, path, NEVER_COLD, PATIENT)
    with Resident(path, NOTES.format(notes=notes)) as resident, Callers(executable, notes) as node:
        holder, taker, other = (node.pod(4) for _ in range(3))
        node.add(holder, mapping(8080))
        idle = len(resident.children)
        started = [node.wanting(taker, mapping(8080), CONTAINERID=f"c{number}") for number in range(34)]
        try:
            node.wait_for(len(started))
            for _ in range(3):
                node.add(other, mapping(8081))
                node.delete(other)
            assert [item.poll() for item in started] == [None] * len(started)
            assert len(resident.children) >= len(started)
        finally:
            for item in started:
                item.kill()
            for item in started:
                wait(item)
        assert eventually(lambda: len(resident.children) <= idle)
