"""Pythons that refuse BLAKE2, as some do on machines in FIPS mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab import NODE4, Node, config, key_of, mapping
from libcni_cache import Cache
from resident import NEVER_COLD, Resident, launcher

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


STATUS = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
UNTOUCHED = "assert 'cni_hostport.attachment' not in sys.modules"
REFUSAL = """
import types
def refuse(*_, **__):
    raise ValueError("_blake2 is not available in FIPS mode")
sys.modules["_blake2"] = types.SimpleNamespace(blake2b=refuse, blake2s=refuse)
"""
REFUSALS = {"the import": 'sys.modules["_blake2"] = None', "the use": REFUSAL}


@pytest.fixture(params=REFUSALS)
def refusal(request: pytest.FixtureRequest) -> str:
    return REFUSALS[request.param]


@pytest.fixture
def cold(_kernel: None, tmp_path: Path, refusal: str) -> Iterator[Node]:
    with Node(launcher=launcher(tmp_path, tmp_path / "absent", UNTOUCHED, refusal)) as node:
        yield node


@pytest.fixture
def warm(_kernel: None, tmp_path: Path, refusal: str) -> Iterator[Node]:
    path = tmp_path / "socket"
    with (
        Resident(path, "import sys", UNTOUCHED, refusal),
        Node(launcher=launcher(tmp_path, path, refusal, NEVER_COLD)) as node,
    ):
        yield node


def life(node: Node) -> None:
    """Add, check and delete a pod, whose keys are those that it has everywhere."""
    pod, other = node.pod(4), node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    node.add(other, mapping(9090))
    assert {f"dnat-{key_of(item)}" in node.ruleset() for item in (pod, other)} == {True}
    assert node.client.ask("tcp", NODE4, 8080).startswith("web")
    assert node.cni("CHECK", pod, config(pod, mapping(8080))).status == 0
    node.delete(pod)
    assert not node.holds(pod)
    assert node.holds(other)


def test_a_cold_call_works_where_blake2_is_refused(cold: Node) -> None:
    assert cold.cni("STATUS", None, STATUS).status == 0
    life(cold)
    assert cold.cni("GC", None, {**STATUS, "cni.dev/valid-attachments": []}).status == 0
    assert "dnat-" not in cold.ruleset()


def test_a_warm_call_works_where_blake2_is_refused(warm: Node) -> None:
    life(warm)


def test_what_was_installed_is_found_where_blake2_is_refused(node: Node, cold: Node, tmp_path: Path) -> None:
    pod = node.pod(4)
    node.add(pod, mapping(8080))
    cache = Cache(tmp_path / "cni")
    cache.add(pod, mapping(8080))
    node.launcher = cold.launcher
    assert "alive" in node.run(*cold.launcher, "list").stdout
    restored = node.run(*cold.launcher, "restore", "--watch", "0", f"--cache-dir={cache.directory}")
    assert restored.stderr.endswith("1 present\n")
    node.delete(pod)
    assert not node.holds(pod)
