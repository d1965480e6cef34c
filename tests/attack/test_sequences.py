"""Sequences of operations, with what else happens on a node between them, leave the ruleset that a plain model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from attack.effort import FACTOR, searching
from attack.model import Attachment, Model, PortMapping, RefusedError
from attack.world import ATTACHMENTS, CONTAINERS, World, expected, observed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lab import Node

EXAMPLES, STEPS = 25, 30

attachments = st.sampled_from(ATTACHMENTS)
mappings = st.lists(
    st.builds(
        PortMapping,
        st.sampled_from([0, 8080, 8080, 8080, 8081]),
        st.sampled_from([80, 81]),
        st.sampled_from(["tcp", "tcp", "udp"]),
        st.sampled_from(["", "", "", "192.0.2.1", "2001:db8::1", "::1"]),
    ),
    max_size=3,
    unique_by=lambda mapping: (mapping.port, mapping.protocol, mapping.host_ip),
)
families = st.sampled_from([(4, 6), (4, 6), (4,), (6,)])


class Sequences(RuleBasedStateMachine):
    """What can happen on a node."""

    world: World
    steps = 0

    @initialize()
    def begin(self) -> None:
        self.world.reset()
        self.births = 0
        self.model = Model(namespaces=dict.fromkeys(CONTAINERS, 0))
        self.cached: dict[Attachment, tuple[list[PortMapping], list[str]]] = {}

    @rule(attachment=attachments, mappings=mappings)
    def add(self, attachment: Attachment, mappings: list[PortMapping]) -> None:
        self.add_with(attachment, mappings, (4, 6), attachment)

    @rule(attachment=attachments, mappings=mappings, families=families, other=attachments)
    def add_with_an_address_of_another(
        self, attachment: Attachment, mappings: list[PortMapping], families: tuple[int, ...], other: Attachment
    ) -> None:
        self.add_with(attachment, mappings, families, other)

    def add_with(
        self, attachment: Attachment, mappings: list[PortMapping], families: tuple[int, ...], owner: Attachment
    ) -> None:
        if self.model.namespaces[attachment.container] is None:
            return  # a runtime has it made before
        number = 50 + ATTACHMENTS.index(owner)
        addresses = [{4: f"10.88.0.{number}", 6: f"fd00:88::{number}"}[family] for family in families]
        answer = self.world.add(attachment, mappings, addresses)
        try:
            self.model.claim(attachment, mappings, addresses)
        except RefusedError:
            assert answer.status == 1, answer
            assert answer.code == 100, answer
            return
        assert not answer.status, answer
        self.cached.pop(attachment, None)
        self.cached[attachment] = (mappings, addresses)
        self.world.remember(attachment, mappings, addresses)

    @rule(attachment=attachments, has_mappings=st.booleans(), forgets=st.sampled_from([True, True, False]))
    def delete(self, attachment: Attachment, has_mappings: bool, forgets: bool) -> None:
        asked, _ = self.cached.get(attachment, ([], []))
        answer = self.world.delete(attachment, asked if has_mappings else None)
        assert not answer.status, answer
        self.model.release(attachment, wants_ports=has_mappings and any(mapping.port for mapping in asked))
        if forgets:
            self.cached.pop(attachment, None)
            self.world.forget(attachment)

    @rule(attachment=attachments)
    def check(self, attachment: Attachment) -> None:
        asked, addresses = self.cached.get(attachment, ([PortMapping(8080, 80, "tcp", "")], ["10.88.0.99"]))
        assert self.world.check(attachment, asked, addresses).code == (
            0 if self.model.has(attachment, asked, addresses) else 103
        )

    @rule(network=st.sampled_from(["red", "blue", "green"]), valid=st.sets(attachments))
    def collect(self, network: str, valid: set[Attachment]) -> None:
        answer = self.world.collect(network, valid)
        assert not answer.status, answer
        self.model.collect(network, valid)

    @rule(what=st.sampled_from(["ruleset", "table inet hostport"]))
    def flush(self, what: str) -> None:
        self.world.flush(what)
        self.model.flush()

    @precondition(lambda self: self.model.is_whole)
    @rule(chain=st.sampled_from(["dispatch", "postrouting", "loopback"]))
    def damage(self, chain: str) -> None:
        self.world.node.nft(f"flush chain inet hostport {chain}")
        self.model.is_whole = False

    @rule(container=st.sampled_from(CONTAINERS), comes_back=st.booleans())
    def die(self, container: str, comes_back: bool) -> None:
        self.world.die(container)
        self.model.namespaces[container] = None
        if comes_back:
            self.births += 1
            self.world.revive(container)
            self.model.namespaces[container] = self.births

    @rule()
    def restore(self) -> None:
        outcomes = self.world.restore()
        assert outcomes == self.model.restore(self.cached)

    @invariant()
    def is_as_in_the_model(self) -> None:
        type(self).steps += 1
        present, should = observed(self.world), expected(self.model)
        assert present == (should if self.model.is_whole else should._replace(lacks=present.lacks))


@pytest.fixture
def world(node: Node, tmp_path: Path) -> Iterator[World]:
    with World(node, tmp_path / "cni") as made:
        yield made


def test_the_ruleset_is_that_of_the_model(world: World, record_property: Callable[[str, object], None]) -> None:
    class OnNode(Sequences):
        pass

    OnNode.world = world
    run_state_machine_as_test(OnNode, settings=searching(EXAMPLES, STEPS if FACTOR == 1 else 2 * STEPS))
    record_property("steps of random sequences", OnNode.steps)
