"""Whatever a call is given, it keeps the protocol, changes nothing when it fails, and leaves nothing after its DEL."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from attack import configurations, fork, ruleset
from attack.effort import searching
from hypothesis import given
from hypothesis import strategies as st
from lab import Node, mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lab import Pod

# an answer comes at once, so that a question is told by this counter and not by a wait
NAME_SERVERS = """
table inet questions {
    chain output { type filter hook output priority -400; udp dport 53 counter reject; tcp dport 53 counter reject; }
}
"""


@dataclass
class Target:
    """A node with a pod of somebody else's, whose host port 8080 nobody may touch, and the ruleset as it was then."""

    node: Node
    pod: Pod
    generation: ruleset.Generation
    ruleset: ruleset.Table
    questions: int = 0


def questions(node: Node) -> int:
    """Return how many packets went to name servers."""
    return sum(map(int, re.findall(r"counter packets (\d+)", node.nft("list table inet questions"))))


@pytest.fixture
def target(node: Node) -> Iterator[Target]:
    node.ip("route add default via 192.0.2.2")
    node.nft_file(NAME_SERVERS)
    bystander = node.pod()
    node.add(bystander, mapping(8080), name="bystanders")
    with ruleset.Generation(node) as generation:
        yield Target(node, node.pod(), generation, ruleset.read(node))


@pytest.mark.parametrize(
    ("commands", "keys", "examples"),
    [
        ([], (), 500),
        (["ADD", "STATUS"], ("conditionsV4", "conditionsV6"), 150),
        (["ADD"], ("runtimeConfig",), 200),
        (["ADD", "CHECK"], ("runtimeConfig", "dynamicPorts"), 100),
        (["ADD", "CHECK"], ("prevResult",), 150),
        (["GC"], ("cni.dev/valid-attachments", "name"), 50),
    ],
    ids=["anything", "conditions", "mappings", "dynamic ports", "results", "attachments"],
)
def test_any_call_keeps_the_protocol_and_leaves_nothing(
    target: Target,
    record_property: Callable[[str, object], None],
    commands: list[str],
    keys: tuple[str, ...],
    examples: int,
) -> None:
    calls = 0
    pod = target.pod
    environments = configurations.environments(pod)
    if commands:
        environments = st.sampled_from([configurations.environment(pod, command) for command in commands])

    @searching(examples)
    @given(environ=environments, stdin=configurations.stdins_with(pod, *keys) if keys else configurations.stdins(pod))
    def attack(environ: dict[str, str], stdin: bytes) -> None:
        nonlocal calls
        calls += 1
        _attack(target, environ, stdin)

    attack()
    record_property("calls with hostile input", calls)


def _attack(target: Target, environ: dict[str, str], stdin: bytes) -> None:
    command, before = environ["CNI_COMMAND"], target.generation.number
    answer = fork.call(target.node, environ, stdin)
    assert not answer.breach(command), answer
    if command == "ADD" and not answer.status:
        config = json.loads(stdin)
        bare = {key: config[key] for key in ("cniVersion", "name") if key in config}
        deleted = fork.call(target.node, environ | {"CNI_COMMAND": "DEL"}, json.dumps(bare).encode())
        assert not deleted.status, (answer, deleted)
    if target.generation.number != before:
        assert not ruleset.difference(target.ruleset, ruleset.read(target.node)), answer
    asked, target.questions = target.questions, questions(target.node)
    assert asked == target.questions, answer
