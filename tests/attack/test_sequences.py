"""Sequences of operations, with what else happens on a node between them, leave the ruleset that a plain model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from attack.effort import FACTOR, searching
from attack.model import Model, RefusedError, Who, Wish
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

whos = st.sampled_from(ATTACHMENTS)
wishes = st.lists(
    st.builds(
        Wish,
        st.sampled_from([0, 8080, 8080, 8081, 8082]),
        st.sampled_from([80, 81]),
        st.sampled_from(["tcp", "tcp", "udp"]),
        st.sampled_from(["", "", "", "192.0.2.1", "2001:db8::1", "::1"]),
    ),
    max_size=3,
    unique_by=lambda wish: (wish.port, wish.protocol, wish.host_ip),
)
families = st.sampled_from([(4, 6), (4, 6), (4,), (6,)])
borrowed = st.sampled_from([None, None, None, *ATTACHMENTS])  # an address that is that of another attachment, or was


class Sequences(RuleBasedStateMachine):
    """What can happen on a node."""

    world: World
    steps = 0

    @initialize()
    def begin(self) -> None:
        self.world.reset()
        self.births = 0
        self.model = Model(namespaces=dict.fromkeys(CONTAINERS, 0))
        self.cached: dict[Who, tuple[list[Wish], list[str]]] = {}

    @rule(who=whos, wishes=wishes, families=families, borrowed=borrowed)
    def add(self, who: Who, wishes: list[Wish], families: tuple[int, ...], borrowed: Who | None) -> None:
        number = 50 + ATTACHMENTS.index(borrowed or who)
        addresses = [{4: f"10.88.0.{number}", 6: f"fd00:88::{number}"}[family] for family in families]
        answer = self.world.add(who, wishes, addresses)
        try:
            self.model.claim(who, wishes, addresses)
        except RefusedError:
            assert answer.status == 1, answer
            assert answer.code == 100, answer
            return
        assert not answer.status, answer
        self.cached.pop(who, None)
        self.cached[who] = (wishes, addresses)
        self.world.remember(who, wishes, addresses)

    @rule(who=whos, has_mappings=st.booleans(), forgets=st.sampled_from([True, True, False]))
    def delete(self, who: Who, has_mappings: bool, forgets: bool) -> None:
        asked, _ = self.cached.get(who, ([], []))
        answer = self.world.delete(who, asked if has_mappings else None)
        assert not answer.status, answer
        self.model.release(who, wants_ports=has_mappings and any(wish.port for wish in asked))
        if forgets:
            self.cached.pop(who, None)
            self.world.forget(who)

    @rule(who=whos)
    def check(self, who: Who) -> None:
        asked, addresses = self.cached.get(who, ([Wish(8080, 80, "tcp", "")], ["10.88.0.99"]))
        assert self.world.check(who, asked, addresses).code == (0 if self.model.has(who, asked, addresses) else 103)

    @rule(network=st.sampled_from(["red", "blue", "green"]), valid=st.sets(whos))
    def collect(self, network: str, valid: set[Who]) -> None:
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
        there, should = observed(self.world), expected(self.model)
        assert there == (should if self.model.is_whole else should._replace(lacks=there.lacks))


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
