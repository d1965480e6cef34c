from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from dynamic_ports import BARE, asking, given
from lab import BRIDGE4, CLIENT4, CLIENT6, NODE4, NODE6, Pod, config, mapping, wait
from libcni_cache import Cache
from portmap_node import HOSTPORT, NFTABLES, answers, everything, mappings, on_every_back_end, place, portmaps, web
from restoration import restore

if TYPE_CHECKING:
    from pathlib import Path

    from compare.plugins import Bench, Plugin

node = on_every_back_end()
WITHOUT_IPTABLES = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /usr/sbin && exec "$@"', "sh")
BLIND = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", 'mount -t tmpfs t /run; exec "$@"', "sh")


@pytest.fixture
def portmap(node: Bench) -> Plugin:
    return node.plugin


@pytest.fixture
def other(node: Bench, portmap: Plugin) -> Pod:
    """A pod that portmap set up, and that lives on."""
    assert portmap is not HOSTPORT
    return web(node, 3, 9000)


@pytest.fixture
def without_old(node: Bench, other: Pod) -> list[str]:
    """All rules of portmap's and others before the old pod came."""
    assert other
    return portmaps(node)


@pytest.fixture
def old(node: Bench, without_old: list[str]) -> Pod:
    """A pod that portmap set up, on a node that calls hostport now."""
    assert without_old
    pod = web(node, 2, 8000)
    node.swap(HOSTPORT)
    return pod


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def taken(pod: Pod, port: str = "8000/tcp") -> str:
    return f"host port {port} is taken by container {pod.id[:12]} (portmap)"


def test_dynamic_ports_are_picked_beside_those_of_portmaps_living_containers(node: Bench, old: Pod) -> None:
    before = portmaps(node)
    new = node.web(name="new", **place(4))
    assert old.id not in given(node)
    added = node.cni("ADD", new, config(new) | asking("80, 81/udp", dynamicPorts="8000-8002"))
    assert added.code == 0, added
    ports = given(node)[new.id]
    assert ports["80/tcp"] == 8002
    assert ports["81/udp"] in {8001, 8002}
    assert node.client.ask("tcp", NODE4, 8002) == f"new {CLIENT4}"
    assert answers(node, 8000)
    assert node.cni("DEL", new, BARE).code == 0
    assert portmaps(node) == before
    assert not node.footprint(new)


def test_a_port_of_a_living_container_of_portmaps_is_refused_and_nothing_changed(node: Bench, old: Pod) -> None:
    before = everything(node)
    new = node.web(name="new", **place(4))
    refused = node.attempt(new, mapping(7000), *mappings(8000))
    assert (refused.code, refused.msg) == (100, taken(old))
    assert refused.json["details"].startswith(f"its address {old.ip4} is in network namespace ")
    assert everything(node) == before
    assert answers(node, 8000)


def test_an_add_waits_for_a_container_of_portmaps_that_is_being_deleted(node: Bench, old: Pod) -> None:
    new = node.web(name="new", **place(4))
    waiting = node.start("ADD", new, config(new, *mappings(8000), waitForHolder=20))
    node.delete(old)
    added = wait(waiting)
    assert (added.code, taken(old) in added.stderr or added.stderr == "") == (0, True)
    assert answers(node, 8000, "new")


def test_a_port_of_a_container_of_portmaps_that_is_gone_is_taken_over(
    node: Bench, old: Pod, without_old: list[str]
) -> None:
    old.remove()
    new = node.web(name="new", **place(4))
    output = node.add(new, *mappings(8000)).stderr
    assert output == (
        f"hostport: host port 8000/tcp was held by container {old.id[:12]} (portmap), which no longer exists;"
        f" container {new.id} (eth0) takes over\n"
    )
    assert portmaps(node) == without_old
    assert answers(node, 8000, "new")
    assert answers(node, 9000)


def test_it_is_taken_over_by_the_container_that_has_its_address_now(
    node: Bench, old: Pod, without_old: list[str]
) -> None:
    old.remove()
    heir = node.web(name="heir", **place(2))
    assert "which no longer exists" in node.add(heir, *mappings(8000)).stderr
    assert portmaps(node) == without_old
    assert answers(node, 8000, "heir")


def test_its_address_that_somebody_else_has_now_keeps_a_container_alive(node: Bench, old: Pod) -> None:
    old.remove()
    node.web(name="heir", **place(2))
    assert node.attempt(node.web(name="new", **place(4)), mapping(8000)).msg == taken(old)


def cached(cache: Cache) -> tuple[str, ...]:
    script = (
        f'mount -t tmpfs t /var/lib && mkdir /var/lib/cni && mount --bind {cache.directory} /var/lib/cni && exec "$@"'
    )
    return ("unshare", "--mount", "sh", "-c", script, "sh")


def test_a_runtimes_cache_says_whose_an_address_is_now(node: Bench, old: Pod, cache: Cache) -> None:
    old.remove()
    cache.add(node.web(name="heir", **place(2)))
    node.confined(*cached(cache))
    node.add(node.web(name="new", **place(4)), *mappings(8000))
    assert answers(node, 8000, "new")


def test_a_container_that_has_its_address_elsewhere_lives_by_the_cache(node: Bench, old: Pod, cache: Cache) -> None:
    old.ip("addr flush dev eth0")
    cache.add(old, plugin={"type": "portmap"})
    node.confined(*cached(cache))
    refused = node.attempt(node.web(name="new", **place(4)), mapping(8000))
    assert (refused.code, refused.msg) == (100, taken(old))


def test_a_container_of_which_it_cannot_be_told_keeps_its_port(node: Bench, old: Pod) -> None:
    old.remove()
    before = everything(node)
    node.confined(*BLIND)
    refused = node.attempt(node.web(name="new", **place(4)), mapping(8000))
    assert (refused.code, refused.msg) == (100, taken(old))
    assert refused.json["details"].startswith("whether it exists cannot be told: ")
    assert everything(node) == before


@pytest.mark.parametrize(
    ("wanted", "port"),
    [
        (mapping(8000, hostIP=NODE4), "8000/tcp on 192.0.2.1"),
        (mapping(8000, 80, "udp"), "8000/udp"),
        (mapping(8000, hostIP=NODE6), "8000/tcp on 2001:db8::1"),
        (mapping(8001, hostIP=NODE4), "8001/tcp on 192.0.2.1"),
        (mapping(8001, hostIP="127.0.0.1"), ""),
        (mapping(8001), ""),
        (mapping(8000, 80, "sctp"), ""),
        (mapping(8002), ""),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value['hostPort']}{value['protocol']}{value.get('hostIP')}",
)
def test_what_portmap_has_for_one_address_leaves_the_others(
    node: Bench, old: Pod, wanted: dict[str, object], port: str
) -> None:
    outcome = node.attempt(node.web(name="new", **place(4)), wanted)
    assert outcome.msg == (taken(old, port) if port else "")
    assert answers(node, 8000)
    if wanted == mapping(8001):
        assert node.client.ask("tcp", BRIDGE4, 8001) == f"new {CLIENT4}"
        assert node.client.ask("tcp", NODE6, 8001) == f"new {CLIENT6}"


def test_only_for_a_port_that_is_claimed_iptables_is_run(node: Bench, portmap: Plugin, old: Pod) -> None:
    node.confined(*WITHOUT_IPTABLES)
    new = node.web(name="new", **place(4))
    unclaimed, claimed = node.attempt(new, mapping(7000)), node.attempt(new, mapping(8000))
    missing = "is not installed to show them"
    if portmap is NFTABLES:
        assert (unclaimed.code, claimed.msg) == (0, taken(old))
    elif "legacy" in portmap.name:
        assert (unclaimed.code, missing in unclaimed.msg) == (102, True)
    else:
        assert (unclaimed.code, claimed.code, missing in claimed.msg) == (0, 102, True)


def test_of_two_that_want_a_port_of_a_container_that_is_gone_one_gets_it(
    node: Bench, old: Pod, without_old: list[str]
) -> None:
    old.remove()
    pods = [node.web(name=f"new{number}", **place(number)) for number in (4, 5, 6, 7)]
    started = [node.start("ADD", pod, config(pod, *mappings(8000))) for pod in pods]
    outcomes = [wait(item) for item in started]
    assert sorted(outcome.code for outcome in outcomes) == [0, 100, 100, 100], outcomes
    [winner] = [number for number, outcome in enumerate(outcomes, 4) if not outcome.code]
    assert portmaps(node) == without_old
    assert answers(node, 8000, f"new{winner}")


def test_a_pod_of_one_family_minds_the_rules_of_that_family(node: Bench, portmap: Plugin) -> None:
    four = {key: value[:1] if isinstance(value, list) else value for key, value in place(2).items()}
    six = {key: value[1:] if isinstance(value, list) else value for key, value in place(4).items()}
    old = node.web(name="four", **four)
    node.add(old, mapping(8000))
    node.swap(HOSTPORT)
    before = portmaps(node)
    node.add(node.web(name="six", **six), mapping(8000))
    assert portmaps(node) == before
    assert node.client.ask("tcp", NODE4, 8000) == f"four {CLIENT4}"
    assert node.client.ask("tcp", NODE6, 8000) == f"six {CLIENT6}"
    assert portmap is not HOSTPORT


def test_restoring_fails_for_a_port_of_a_living_container_of_portmaps(node: Bench, old: Pod, cache: Cache) -> None:
    new = node.web(name="new", **place(4))
    cache.add(new, *mappings(8000))
    before = portmaps(node)
    assert taken(old) in restore(node, cache, status=1)
    restore(node, cache, options=("--dry-run",), status=1)
    assert portmaps(node) == before
    assert answers(node, 8000)


def test_restoring_takes_a_port_over_from_a_container_of_portmaps_that_is_gone(
    node: Bench, old: Pod, without_old: list[str], cache: Cache
) -> None:
    old.remove()
    cache.add(node.web(name="new", **place(4)), *mappings(8000))
    before = everything(node)
    assert "8000/tcp" in restore(node, cache, options=("--dry-run",))
    assert everything(node) == before
    restore(node, cache)
    assert portmaps(node) == without_old
    assert answers(node, 8000, "new")
