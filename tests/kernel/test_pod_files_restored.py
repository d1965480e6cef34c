"""What a pod is told of its dynamic host ports stays true through a loss of the ruleset, and of what tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from libcni_cache import Cache
from restoration import restore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Node

PLUGIN = {"type": "hostport", "capabilities": {"dynamicPorts": True}, "dynamicPorts": "40000-40999"}
REQUEST = "80/tcp, 9000-9001/udp"


class Asking:
    """A pod that asks for dynamic host ports, and what it is told of them."""

    def __init__(self, node: Node, cache: Cache) -> None:
        self.node = node
        self.pod = node.pod(4)
        self.file = Path(f"/run/hostport/pods/{self.pod.id}/dynamic-ports.json")
        node.add(self.pod, dynamicPorts=PLUGIN["dynamicPorts"], runtimeConfig={"dynamicPorts": REQUEST})
        cache.add(self.pod, plugin=PLUGIN, capabilityArgs={"dynamicPorts": REQUEST})

    @property
    def note(self) -> str:
        [interface] = json.loads(self.pod.run("ip", "-json", "link", "show", "eth0").stdout)
        return str(interface["ifalias"])

    @property
    def told(self) -> dict[str, int]:
        return {name: item["hostPort"] for name, item in json.loads(self.file.read_text()).items()}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def asking(node: Node, cache: Cache) -> Iterator[Asking]:
    made = Asking(node, cache)
    yield made
    node.delete(made.pod)
    assert not made.file.parent.exists()


def test_a_pod_that_is_restored_is_told_the_same_as_before(asking: Asking, node: Node, cache: Cache) -> None:
    told, note = asking.told, asking.note
    node.nft("flush ruleset")
    asking.file.unlink()
    restore(node, cache)
    assert (asking.told, asking.note) == (told, note)


@pytest.mark.parametrize("wrong", [None, "{}", "x" * 100])
def test_a_file_that_is_lost_or_wrong_is_made_again_though_no_port_was_lost(
    asking: Asking, node: Node, cache: Cache, wrong: str | None
) -> None:
    told = asking.told
    asking.file.unlink()
    if wrong:
        asking.file.write_text(wrong)
    restore(node, cache, options=("--dry-run",))
    assert asking.file.exists() == bool(wrong)
    restore(node, cache)
    assert asking.told == told


def test_a_pod_without_a_note_gets_one_of_what_it_is_given(asking: Asking, node: Node, cache: Cache) -> None:
    asking.pod.run("ip", "link", "set", "eth0", "alias", "")
    node.nft("flush ruleset")
    restore(node, cache)
    assert asking.note == f"hostport 80/tcp={asking.told['80/tcp']} 9000-9001/udp={asking.told['9000/udp']}"
