from __future__ import annotations

from typing import TYPE_CHECKING

import node_process
import pytest
from lab import LAUNCHER, NODE4, NODE6
from libcni_cache import Cache
from portmap_node import NFTABLES, answers, everything, flavour, on_every_back_end, traces, web, without

from cni_hostport.errors import CNIError
from cni_hostport.operate.doctor import checks, leftovers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compare.plugins import Bench

    from cni_hostport.operate.statements import Statement

node = on_every_back_end()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def remove(node: Bench, cache: Cache) -> list[str]:
    with node_process.on(node):
        return leftovers.remove([cache.directory])


def told(node: Bench, caches: Sequence[Path]) -> list[Statement]:
    with node_process.on(node):
        return [item for item in checks.examine([], caches) if "portmap" in item.text]


def test_exactly_the_rules_of_dead_containers_are_removed(node: Bench, cache: Cache) -> None:
    known, _, forgotten, dead = (web(node, 2 + number, 8000 + 10 * number) for number in range(4))
    foreign = "-A PREROUTING -p tcp -m tcp --dport 9 -j DNAT --to-destination 9.9.9.9"
    node.run("iptables-nft", "-t", "nat", *foreign.split())
    for pod in (known, dead):
        cache.add(pod, plugin={"type": "portmap"})
    for pod in (forgotten, dead):
        pod.remove()
    expected = without(everything(node), traces(node, [forgotten, dead], r"80[23]\d"))
    removed = remove(node, cache)
    assert {line.split()[1] for line in removed} == {forgotten.id, dead.id}
    assert len(removed) == 4
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
    problem, fine = (item for item in told(node, [cache.directory]) if "left nothing" not in item.text)
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
    (note,) = (item for item in told(node, [cache.directory]) if "left nothing" not in item.text)
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
    with node_process.on(node), pytest.raises(CNIError, match="there is no cache of a runtime in"):
        leftovers.remove([tmp_path / "absent"])
    assert everything(node) == before
    assert any(
        "could not be checked" in item.text and item.status == "note" for item in told(node, [tmp_path / "absent"])
    )


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
    with node_process.on(node):
        [refused] = leftovers.remove_and_tell([tmp_path / "absent"])
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
    assert kept == any("cannot be told" in item.text for item in told(node, [cache.directory]))


def test_rules_that_are_not_quite_portmaps_are_kept(node: Bench, cache: Cache) -> None:
    if node.plugin is NFTABLES:
        node.nft_file("add table ip cni_hostport; add chain ip cni_hostport hostports")
        node.nft_file("add rule ip cni_hostport hostports tcp dport 9 dnat to 9.9.9.9:9")
    else:
        pod = web(node, 2, 8000)
        pod.remove()
        (chain,) = {line.split()[1] for line in everything(node) if line.startswith("-A CNI-DN-")}
        for program in ("iptables", "ip6tables"):
            node.run(f"{program}-{flavour(node)}", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", chain)
    before = everything(node)
    assert remove(node, cache) == []
    assert everything(node) == before


def test_a_node_without_portmap_has_nothing_left_of_it(node: Bench, cache: Cache) -> None:
    assert [item.text for item in told(node, [cache.directory])] == [
        "portmap left nothing in nftables",
        "portmap left nothing in iptables",
    ]
    assert remove(node, cache) == []


def test_iptables_that_is_not_installed_is_named(
    node: Bench, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web(node, 2, 8000).remove()
    monkeypatch.setattr("cni_hostport.migration.iptables.PROGRAM_PATH", str(tmp_path / "nowhere"))
    if node.plugin is NFTABLES:
        assert len(remove(node, cache)) == 2
        return
    with pytest.raises(CNIError, match=r"iptables-.*-save is not installed"):
        remove(node, cache)
