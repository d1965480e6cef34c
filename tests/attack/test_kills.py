"""Whoever is killed at whatever moment: the ruleset is as before or as after, and what comes next puts all right."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
import resident as executables
from attack import ruleset
from attack.effort import FACTOR, chance
from lab import Node, config, mapping
from resident import NATIVE, PYTHON, Resident, eventually, launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


ROUNDS = 12 * FACTOR
MAPPINGS = [mapping(8080), mapping(8081, 81, hostIP="192.0.2.1"), mapping(5353, 53, "udp")]


class Stage:
    """A node, a bystander, and the two states of the ruleset between which an attachment's calls move it."""

    def __init__(self, node: Node) -> None:
        self.node, self.pod, bystander = node, node.pod(), node.pod()
        node.add(bystander, mapping(7000), name="bystanders")
        begun = time.monotonic()
        node.add(self.pod, *MAPPINGS)
        self.seconds = time.monotonic() - begun
        self.states = {"ADD": ruleset.read(node)}
        node.delete(self.pod)
        self.states["DEL"] = ruleset.read(node)

    def start_and_kill(self, command: str, after: float, victim: Callable[[int], list[int]]) -> int | None:
        """Start a call, kill somebody after some seconds, and return the status of the call, ``None`` if it was it."""
        started = self.node.start(command, self.pod, config(self.pod, *MAPPINGS))
        victims = victim(started.pid)
        time.sleep(after)
        for process in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        started.communicate(timeout=60)
        return None if started.returncode == -signal.SIGKILL else started.returncode

    def is_settled(self) -> bool:
        return ruleset.read(self.node) in self.states.values()


@pytest.fixture(params=["cold", "warm", "native", "resident's child"])
def mode(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, node: Node, tmp_path: Path
) -> Iterator[tuple[str, Callable[[int], list[int]]]]:
    if request.param == "cold":
        yield request.param, lambda caller: [caller]
        return
    monkeypatch.setattr(executables, "kind", NATIVE if request.param == "native" else PYTHON)
    with Resident(tmp_path / "socket") as resident:
        node.launcher = launcher(tmp_path, tmp_path / "socket")

        def children(_caller: int) -> list[int]:
            return resident.children

        yield request.param, children if "child" in request.param else lambda caller: [caller]


def test_a_kill_at_any_moment_leaves_the_ruleset_whole(
    node: Node, mode: tuple[str, Callable[[int], list[int]]], record_property: Callable[[str, object], None]
) -> None:
    name, victim = mode
    stage, random = Stage(node), chance(name)
    statuses = list[int | None]()
    for _ in range(ROUNDS):
        for command in ("ADD", "DEL"):
            status = stage.start_and_kill(command, random.uniform(0, 1.2 * stage.seconds), victim)
            statuses.append(status)
            assert status in {None, 0}
            # the child of a caller that was killed ends with it, but not before it
            assert eventually(stage.is_settled)
            if status == 0:
                assert ruleset.read(node) == stage.states[command]
            if command == "ADD":
                node.add(stage.pod, *MAPPINGS)
                assert ruleset.read(node) == stage.states["ADD"]
        node.delete(stage.pod)
        assert ruleset.read(node) == stage.states["DEL"]
    assert None in statuses or name == "resident's child"
    record_property("kills", len(statuses))
