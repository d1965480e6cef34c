from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from doctor_node import Practice
from lab import BRIDGE4, LAUNCHER, PATIENCE, QUIET, Node, mapping

if TYPE_CHECKING:
    from pathlib import Path

    from cni_hostport.operate.statements import Statement

ALL, BRIDGE, UPLINK = (f"net/ipv4/conf/{name}/route_localnet" for name in ("all", "cni0", "uplink"))
OPEN = "route_localnet is 1 for cni0, and chain inet hostport loopback does not guard 127.0.0.0/8 there"


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


def about_it(practice: Practice) -> list[Statement]:
    return [find for find in practice.finds() if "CVE-2020-8558" in find.meaning]


def reaches(practice: Practice, seconds: float = QUIET) -> bool:
    """Tell whether a neighbour on the pods' bridge reaches what listens on the node's 127.0.0.1."""
    neighbour = practice.node.pod()
    neighbour.ip("addr del 127.0.0.1/8 dev lo", f"route add 127.0.0.0/8 via {BRIDGE4}")
    neighbour.set_sysctl("net/ipv4/conf/all/route_localnet", 1)
    return not neighbour.is_silent("tcp", "127.0.0.1", 9999, source=neighbour.ip4, timeout=seconds)


@pytest.mark.parametrize("setting", [BRIDGE, ALL])
@pytest.mark.parametrize("damage", ["flush chain inet hostport loopback", "flush set inet hostport localnet"])
def test_an_interface_to_a_pod_without_its_guard_is_a_problem_and_the_remedy_works(
    practice: Practice, damage: str, setting: str
) -> None:
    practice.node.serve("tcp", 9999, "private", "127.0.0.1")
    practice.running(mapping(8080))
    practice.node.set_sysctl(setting, 1)
    if setting == BRIDGE:
        assert about_it(practice) == []
    assert not reaches(practice)
    practice.node.nft(damage)
    found = about_it(practice)[0]
    assert (found.status, found.text) == ("problem", OPEN)
    assert reaches(practice, PATIENCE)
    practice.node.run(*LAUNCHER, *found.remedy.split()[1:2], f"--cache-dir={practice.cache.directory}")
    assert not reaches(practice)
    assert [item for item in about_it(practice) if item.status == "problem"] == []


def test_a_pod_that_is_not_reached_from_localhost_needs_no_guard(practice: Practice) -> None:
    pod = practice.node.pod()
    practice.node.add(pod, mapping(8080), snat=False)
    practice.cache.add(
        pod, mapping(8080), plugin={"type": "hostport", "capabilities": {"portMappings": True}, "snat": False}
    )
    assert about_it(practice) == []
    practice.node.set_sysctl(BRIDGE, 1)
    assert [item.status for item in about_it(practice)] == ["note"]


@pytest.mark.parametrize(("setting", "name"), [(ALL, "all"), (UPLINK, "uplink")])
def test_what_others_open_is_theirs_to_guard(practice: Practice, setting: str, name: str) -> None:
    practice.running(mapping(8080))
    practice.node.set_sysctl(setting, 1)
    found = practice.finding()
    assert (found.status, found.text) == (
        "note",
        f"route_localnet is 1 for {name}, and no host port of the ruleset needs that",
    )


def test_a_node_without_pods_is_told_of_what_others_open(practice: Practice) -> None:
    practice.node.set_sysctl(BRIDGE, 1)
    assert practice.finding().status == "note"
