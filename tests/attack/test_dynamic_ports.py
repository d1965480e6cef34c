"""Whatever happens on a node, dynamic host ports are one pod's alone, in the range, and the same after a restoration.

Which ports pods are given is not predicted here: what has to hold of them is looked at after each step.
"""

from __future__ import annotations

import shutil
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import dynamic_ports
import pytest
from attack import ruleset
from attack.effort import FACTOR, searching
from attack.world import ATTACHMENTS, CONTAINERS, World
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from lab import mapping
from resident import eventually

from cni_hostport.dynamic_ports import keys
from cni_hostport.dynamic_ports.request import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from attack.model import Attachment
    from lab import Node

EXAMPLES, STEPS = 12, 25
PORTS = range(40000, 40006)

attachments = st.sampled_from(ATTACHMENTS)
texts = st.sampled_from(
    ["", "80", "80", "80, 81", "80-82", "80/udp", "192.0.2.1:80", "[2001:db8::1]:80, 81", "[::]:80"]
)
fixed = st.lists(
    st.builds(
        mapping,
        st.sampled_from(PORTS),
        st.just(80),
        st.sampled_from(["tcp", "tcp", "udp"]),
        hostIP=st.sampled_from(["", "192.0.2.1", "127.0.0.1", "2001:db8::1", "::"]),
    ),
    max_size=1,
)
families = st.sampled_from([(4, 6), (4, 6), (4,), (6,)])


class Ports(RuleBasedStateMachine):
    """What can happen on a node."""

    world: World
    steps = restored = 0

    @initialize()
    def begin(self) -> None:
        self.world.reset()
        forget_files()
        for container in CONTAINERS:
            self.world.revive(container)  # without the notes of the run before
        self.added: dict[Attachment, dict[str, Any]] = {}

    @rule(attachment=attachments, text=texts, mappings=fixed, families=families)
    def add(self, attachment: Attachment, text: str, mappings: list[Any], families: tuple[int, ...]) -> None:
        number = 50 + ATTACHMENTS.index(attachment)
        ips = [{"address": {4: f"10.88.0.{number}/24", 6: f"fd00:88::{number}/64"}[family]} for family in families]
        asked = dynamic_ports.asking(text, *mappings, dynamicPorts=f"{PORTS[0]}-{PORTS[-1]}")
        asked["prevResult"] = {"cniVersion": "1.1.0", "ips": ips}
        answer = self.world.call("ADD", attachment, asked)
        assert answer.code in {0, 100}, answer
        if not answer.code:
            self.added.pop(attachment, None)
            self.added[attachment] = asked
            self.world.store(attachment, asked)

    @rule(attachment=attachments, knows=st.booleans())
    def delete(self, attachment: Attachment, knows: bool) -> None:
        asked = self.added.pop(attachment, None)
        answer = self.world.call("DEL", attachment, asked if asked and knows else {})
        assert not answer.code, answer
        self.world.forget(attachment)

    @rule(attachment=attachments)
    def check(self, attachment: Attachment) -> None:
        asked = self.added.get(attachment)
        if asked:
            answer = self.world.call("CHECK", attachment, asked)
            assert answer.code == 0, answer

    @rule(container=st.sampled_from(CONTAINERS))
    def die(self, container: str) -> None:
        self.world.revive(container)
        for attachment in [attachment for attachment in self.added if attachment.container == container]:
            self.delete(attachment, knows=False)

    @rule(everything=st.booleans())
    def flush_and_restore(self, everything: bool) -> None:
        before = self.given()
        if before or everything:
            self.world.node.nft("flush ruleset" if everything else "flush map inet hostport dynamic_ports")
        outcomes = self.world.restore()
        assert set(outcomes.values()) <= {"present", "restored"}, outcomes
        assert self.given() == before
        type(self).restored += bool(before)

    def given(self) -> dict[str, dict[str, set[int]]]:
        """Return the host ports that containers have, by what they asked for."""
        found: dict[str, dict[str, set[int]]] = {}
        for name, (key, _) in self.elements():
            if name == "dynamic_ports":
                request, _, container = key["elem"]["comment"].partition(" ")
                found.setdefault(container, {}).setdefault(request, set()).add(key["elem"]["val"]["concat"][2])
        return found

    def elements(self) -> list[tuple[str, Any]]:
        """Return the elements of ports, each with the name of its map."""
        table = ruleset.elements(ruleset.read(self.world.node))
        return [(name, element) for name, element in table if name.startswith(("hostports", "dynamic_ports"))]

    @invariant()
    def ports_are_one_attachments_alone(self) -> None:
        type(self).steps += 1
        holders: dict[tuple[int, str, int], list[tuple[str, str]]] = {}
        for name, (key, verdict) in self.elements():
            address, protocol, port = key["elem"]["val"]["concat"]
            version = int(address[-1]) if address in {"ipv4", "ipv6"} else ip_address(address).version
            holders.setdefault((version, protocol, port), []).append((name, verdict["goto"]["target"]))
        for place, held in holders.items():
            if any(name == "dynamic_ports" for name, _ in held):
                assert place[2] in PORTS
                assert (len(held), len({target for _, target in held})) == (2, 1), (place, held)

    @invariant()
    def each_container_has_what_it_asked_for_and_is_told(self) -> None:
        given = self.given()
        wanted: dict[str, set[str]] = {}
        for attachment, asked in self.added.items():
            versions = {4 + 2 * (":" in ip["address"]) for ip in asked["prevResult"]["ips"]}
            for block in parse(asked["runtimeConfig"][keys.ANNOTATIONS][keys.REQUEST]):
                if block[0].host_ip is None or block[0].host_ip.version in versions:
                    wanted.setdefault(attachment.container, set()).update(map(str, block))
        assert {container: {*ports} for container, ports in given.items()} == wanted
        assert eventually(lambda: self.are_told(given)), (given, [*map(dynamic_ports.told, CONTAINERS)])

    @staticmethod
    def are_told(given: dict[str, dict[str, set[int]]]) -> bool:
        """Tell whether containers' files say what they have."""
        told = {container: dynamic_ports.told(container) for container in CONTAINERS}
        return all(
            {*told[container]} == {*given.get(container, ())}
            and all(port["hostPort"] in given[container][request] for request, port in told[container].items())
            for container in CONTAINERS
        )


@pytest.fixture
def world(node: Node, tmp_path: Path) -> Iterator[World]:
    with World(node, tmp_path / "cni") as made:
        yield made
    forget_files()


def forget_files() -> None:
    for container in CONTAINERS:
        shutil.rmtree(dynamic_ports.FILES / container, ignore_errors=True)


def test_dynamic_ports_stay_what_they_are(world: World, record_property: Callable[[str, object], None]) -> None:
    class OnNode(Ports):
        pass

    OnNode.world = world
    run_state_machine_as_test(OnNode, settings=searching(EXAMPLES, STEPS if FACTOR == 1 else 2 * STEPS))
    record_property("steps of random sequences of dynamic ports", OnNode.steps)
    assert OnNode.restored
