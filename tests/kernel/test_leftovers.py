from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import inprocess
import pytest
from cache import Cache
from compare.plugins import PLUGINS, PORTMAP, Bench, Plugin
from lab import CLIENT4, CLIENT6, LAUNCHER, NODE4, NODE6, Pod, mapping, require
from tools import unavailable

from cni_hostport.errors import CNIError
from cni_hostport.operate import doctor, leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni_hostport.operate.statements import Statement

IPTABLES, NFTABLES, _ = PLUGINS
LEGACY = replace(IPTABLES, name="portmap-iptables-legacy")
# addresses that no other test's pods have: those count as well
NUMBER = os.getpid()
PREFIX4, PREFIX6 = f"10.{64 + NUMBER % 128}.{NUMBER >> 7 & 255}", f"fd00:{NUMBER & 0xFFFF:x}"
FOREIGN = """
add table ip foreign
add chain ip foreign c
add rule ip foreign c tcp dport 8080 counter comment "foreign"
add table ip6 foreign
add chain ip6 foreign c
add rule ip6 foreign c tcp dport 8080 counter comment "foreign"
"""


@pytest.fixture(params=[NFTABLES, IPTABLES, LEGACY], ids=lambda plugin: plugin.name)
def node(request: pytest.FixtureRequest, _kernel: None, tmp_path: Path) -> Iterator[Bench]:
    require(shutil.which("iptables"), "needs the program iptables")
    require(not (need := unavailable("plugins", "portmap")), f"needs {need}")
    with Bench(with_legacy_iptables(tmp_path) if request.param is LEGACY else request.param) as made:
        made.bridge("cni9", f"{PREFIX4}.1/24", f"{PREFIX6}::1/64")
        made.nft_file(FOREIGN)
        yield made


def with_legacy_iptables(directory: Path) -> Plugin:
    legacy = shutil.which("xtables-legacy-multi")
    require(legacy, "needs legacy iptables")
    for program in ("iptables", "ip6tables"):
        (directory / program).symlink_to(legacy or "")
    return replace(LEGACY, launcher=["env", f"PATH={directory}", str(PORTMAP)])


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def web(node: Bench, number: int, host_port: int) -> Pod:
    """A pod of portmap's that answers as its host port on ports 80 and 81."""
    addresses, gateways = [f"{PREFIX4}.{number}/24", f"{PREFIX6}::{number:x}/64"], [f"{PREFIX4}.1", f"{PREFIX6}::1"]
    pod = node.web(name=str(host_port), addresses=addresses, gateways=gateways, bridge="cni9")
    node.add(pod, mapping(host_port), mapping(host_port, 81, "udp"), mapping(host_port + 1, hostIP=NODE4))
    return pod


def remove(node: Bench, cache: Cache) -> list[str]:
    with inprocess.on(node):
        return leftovers.remove([cache.directory])


def told(node: Bench, caches: Sequence[Path]) -> list[Statement]:
    with inprocess.on(node):
        return [one for one in doctor.examine([], caches) if "portmap" in one.text]


def everything(node: Bench) -> list[str]:
    """Return the lines of all rules of the node, without counters' values, and without those that close a block."""
    lines = node.nft("-s list ruleset").splitlines()
    for flavour in ("nft", "legacy") if "legacy" in node.plugin.name else ("nft",):
        for program in ("iptables", "ip6tables"):
            lines += node.run(f"{program}-{flavour}-save", "-t", "nat").stdout.splitlines()
    uncounted = [re.sub(r"\[\d+:\d+\]|counter packets \d+ bytes \d+", "", line) for line in lines if line[:1] != "#"]
    return [line for line in uncounted if line.strip() not in {"", "}"}]


def answers(node: Bench, host_port: int) -> bool:
    return (
        node.client.ask("tcp", NODE4, host_port) == f"{host_port} {CLIENT4}"
        and node.client.ask("tcp", NODE6, host_port) == f"{host_port} {CLIENT6}"
        and node.client.ask("udp", NODE4, host_port) == f"{host_port}-81 {CLIENT4}"
        and node.client.ask("tcp", NODE4, host_port + 1) == f"{host_port} {CLIENT4}"
    )


def traces(node: Bench, pods: Sequence[Pod], ports: str) -> list[str]:
    """Return regular expressions for what only these pods' rules hold."""
    comments = [f'id: \\"{pod.id}\\"' for pod in pods]
    jumps = [line for line in everything(node) if any(comment in line for comment in comments)]
    addresses = [re.escape(address) for pod in pods for address in (pod.ip4, pod.ip6)]
    return [*(pod.id for pod in pods), *addresses, *(line.rpartition(" ")[2] for line in jumps), rf"dport {ports}"]


def without(lines: list[str], patterns: list[str]) -> list[str]:
    return [line for line in lines if not any(re.search(rf"{pattern}(?![\w.])", line) for pattern in patterns)]


def test_exactly_the_rules_of_dead_containers_are_removed(node: Bench, cache: Cache) -> None:
    known, _, forgotten, dead = (web(node, 2 + number, 8000 + 10 * number) for number in range(4))
    foreign = "-A PREROUTING -p tcp -m tcp --dport 9 -j DNAT --to-destination 9.9.9.9"
    node.run("iptables-nft", "-t", "nat", *foreign.split())
    for pod in (known, dead):
        cache.add(pod, plugin={"type": "portmap"})
    for pod in (forgotten, dead):
        pod.remove()
    expected = without(everything(node), traces(node, [forgotten, dead], r"80[23]\d"))
    gone = remove(node, cache)
    assert {line.split()[1] for line in gone} == {forgotten.id, dead.id}
    assert len(gone) == 4
    assert everything(node) == expected
    assert foreign in expected
    assert answers(node, 8000)
    assert answers(node, 8010)
    assert node.client.is_silent("tcp", NODE4, 8020)
    assert node.client.is_silent("tcp", NODE6, 8030)
    assert remove(node, cache) == []


def test_nothing_is_removed_where_every_container_lives(node: Bench, cache: Cache) -> None:
    web(node, 2, 8000)
    before = everything(node)
    assert remove(node, cache) == []
    assert everything(node) == before


def test_the_rules_of_a_dead_container_are_removed_when_the_cache_says_whose_its_addresses_are_now(
    node: Bench, cache: Cache
) -> None:
    old = web(node, 2, 8000)
    old.remove()
    heir = web(node, 2, 8010)
    assert remove(node, cache) == []
    cache.add(heir)
    assert {line.split()[1] for line in remove(node, cache)} == {old.id}
    assert answers(node, 8010)
    assert node.client.is_silent("tcp", NODE4, 8000)


def test_leftovers_that_lead_into_another_pod_are_a_problem(node: Bench, cache: Cache) -> None:
    old = web(node, 2, 8000)
    old.remove()
    heir = web(node, 2, 8010)
    cache.add(heir)
    problem, fine = (one for one in told(node, [cache.directory]) if "left nothing" not in one.text)
    assert problem.status == "problem"
    assert old.id in problem.text
    assert f"{old.ip4} is now that of container {heir.id}" in problem.meaning
    assert "--remove-portmap-leftovers" in problem.remedy
    assert any(detail.startswith("8001/tcp on 192.0.2.1 -> ") for detail in problem.details)
    assert fine.status == "ok"
    assert heir.id in fine.details[0]


def test_leftovers_that_lead_nowhere_are_worth_a_note(node: Bench, cache: Cache) -> None:
    old = web(node, 2, 8000)
    old.remove()
    (note,) = (one for one in told(node, [cache.directory]) if "left nothing" not in one.text)
    assert note.status == "note"
    assert old.id in note.text
    assert len(note.details) == 5


def test_a_container_whose_namespace_lives_is_kept_although_nobody_has_its_address(node: Bench, cache: Cache) -> None:
    pod = web(node, 2, 8000)
    pod.ip("addr flush dev eth0")
    cache.add(pod, plugin={"type": "portmap"})
    assert remove(node, cache) == []


def test_without_a_cache_nothing_is_removed(node: Bench, tmp_path: Path) -> None:
    web(node, 2, 8000).remove()
    before = everything(node)
    with inprocess.on(node), pytest.raises(CNIError, match="there is no cache of a runtime in"):
        leftovers.remove([tmp_path / "absent"])
    assert everything(node) == before
    assert any("could not be checked" in one.text and one.status == "note" for one in told(node, [tmp_path / "absent"]))


def test_containers_that_are_all_gone_are_cleared_where_their_namespaces_would_be_seen(
    node: Bench, cache: Cache
) -> None:
    pods = [web(node, number, 8000 + 10 * number) for number in (2, 3)]
    for pod in pods:
        cache.add(pod, plugin={"type": "portmap"})
        pod.remove()
    assert {line.split()[1] for line in remove(node, cache)} == {pod.id for pod in pods}


def test_a_removal_that_is_refused_is_a_problem_that_says_why(node: Bench, tmp_path: Path) -> None:
    web(node, 2, 8000).remove()
    with inprocess.on(node):
        [refused] = leftovers.removal([tmp_path / "absent"])
    assert (refused.status, refused.text[:42]) == ("problem", "portmap's leftovers were not removed: ther")


@pytest.mark.parametrize("known", [True, False], ids=["in the cache", "in no cache"])
def test_a_living_container_is_safe_from_a_process_that_does_not_see_it(node: Bench, cache: Cache, known: bool) -> None:
    pod = web(node, 2, 8000)
    if known:
        cache.add(pod, plugin={"type": "portmap"})
    blind = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        'mount -t tmpfs t /run; exec "$@"',
        "sh",
    ]
    ran = node.run(
        *blind, *LAUNCHER, "doctor", "--remove-portmap-leftovers", f"--cache-dir={cache.directory}", check=False
    )
    assert (ran.returncode, "cannot tell who lives" in ran.stdout) == (1, True)
    assert answers(node, 8000)


def test_nothing_is_removed_by_a_process_that_sees_nobody_alive(node: Bench, cache: Cache) -> None:
    for number in (2, 3):
        pod = web(node, number, 8000 + 10 * number)
        cache.add(pod, netns=f"/run/elsewhere/{number}")
        pod.remove()
    with pytest.raises(CNIError, match="may not see the runtime's mounts"):
        remove(node, cache)


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "cniCacheV1"}'], ids=["empty", "other", "incomplete"])
def test_a_container_whose_entry_cannot_be_read_is_kept(node: Bench, cache: Cache, content: str) -> None:
    pod = web(node, 2, 8000)
    pod.remove()
    cache.path(pod).write_text(content)
    kept = remove(node, cache) == []
    assert kept == (content != "{}")
    assert kept == any("cannot be told" in one.text for one in told(node, [cache.directory]))


def test_rules_that_are_not_quite_portmaps_are_kept(node: Bench, cache: Cache) -> None:
    if node.plugin is NFTABLES:
        node.nft_file("add table ip cni_hostport; add chain ip cni_hostport hostports")
        node.nft_file("add rule ip cni_hostport hostports tcp dport 9 dnat to 9.9.9.9:9")
    else:
        pod = web(node, 2, 8000)
        pod.remove()
        flavour = "legacy" if "legacy" in node.plugin.name else "nft"
        (chain,) = {line.split()[1] for line in everything(node) if line.startswith("-A CNI-DN-")}
        for program in ("iptables", "ip6tables"):
            node.run(f"{program}-{flavour}", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", chain)
    before = everything(node)
    assert remove(node, cache) == []
    assert everything(node) == before


def test_a_node_without_portmap_has_nothing_left_of_it(node: Bench, cache: Cache) -> None:
    assert [one.text for one in told(node, [cache.directory])] == [
        "portmap left nothing in nftables",
        "portmap left nothing in iptables",
    ]
    assert remove(node, cache) == []


def test_iptables_that_is_not_installed_is_named(
    node: Bench, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web(node, 2, 8000).remove()
    monkeypatch.setattr("cni_hostport.operate.leftovers_iptables.PATH", str(tmp_path / "nowhere"))
    if node.plugin is NFTABLES:
        assert len(remove(node, cache)) == 2
        return
    with pytest.raises(CNIError, match=r"iptables-.*-save is not installed"):
        remove(node, cache)
