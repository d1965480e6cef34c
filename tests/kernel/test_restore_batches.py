"""Many attachments in one transaction: each has the outcome that it would have alone."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from unittest import mock

import node_process
import pytest
from lab import CLIENT4, NODE4, Node, config, key_of, mapping
from libcni_cache import CAPABLE, Cache
from restoration import restore, running

import cni_hostport.operate.restore as restoring
from cni_hostport import check
from cni_hostport.errors import NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Lookup
from cni_hostport.names import DELETED, FAMILY, TABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lab import Pod


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


class Observed(Nft):
    """Counts transactions that restore, and comparisons, and lets others act before the first that restores."""

    transactions = comparisons = 0
    others: Callable[[], object] | None = None

    def run(self, commands: Sequence[str], *, names_refused: bool = True) -> None:
        if not any(command.startswith(f"create element {FAMILY} {TABLE} {DELETED} ") for command in commands):
            Observed.comparisons += any(command.startswith("create chain ") for command in commands)
        else:
            Observed.transactions += 1
            act, Observed.others = Observed.others, None
            if act:
                act()
        super().run(commands, names_refused=names_refused)


def observed(node: Node, cache: Cache, others: Callable[[], object] | None = None) -> tuple[list[str], int]:
    """Restore in this process; return the outcomes as lines, and the number of transactions."""
    Observed.transactions, Observed.comparisons, Observed.others = 0, 0, others
    with (
        node_process.on(node),
        mock.patch.object(restoring, "Nft", Observed),
        mock.patch.object(check, "Nft", Observed),
    ):
        outcomes = list(restoring.restore(restoring.candidates([cache.directory]), print))
    lines = [f"{item.status}: {item.attachment.split(' (')[0]}: {item.text}".removesuffix(": ") for _, item in outcomes]
    return lines, Observed.transactions


def pods_in_turn(node: Node, cache: Cache, count: int, **odd: Any) -> list[Pod]:
    """Have pods that lost their rules, each of which was added a second after the one before; the second one is odd."""
    pods = [node.pod(4) for _ in range(count)]
    for number, pod in enumerate(pods):
        path = cache.add(pod, mapping(8000 + number), **(odd if number == 1 else {}))
        os.utime(path, (1_000_000_000 + number,) * 2)
    return pods


def named(status: str, pod: Pod, text: str = "") -> str:
    return f"{status}: pod shop/{pod.host_end}" + (f": {text}" if text else "")


def test_three_hundred_attachments_take_one_transaction_and_one_comparison(node: Node, cache: Cache) -> None:
    pod = node.pod(4)
    for number in range(300):
        address = f"10.88.{1 + number // 200}.{number % 200 + 1}/16"
        pod.ip(f"addr add {address} dev eth0")
        cache.add(pod, mapping(8000 + number), network=f"n{number}", result={"ips": [{"address": address}]})
    lines, transactions = observed(node, cache)
    assert (set(lines), len(lines), transactions) == ({named("restored", pod)}, 300, 1)
    node.nft(f"flush chain inet hostport dnat-{key_of(pod, 'n7')}")
    lines, transactions = observed(node, cache)
    assert (lines.count(named("present", pod)), lines.count(named("restored", pod))) == (299, 1)
    assert (transactions, Observed.comparisons) == (1, 3)  # all at once, and the damaged one in two ways


def test_one_that_nftables_refuses_costs_the_others_nothing(node: Node, cache: Cache) -> None:
    wrong = {**CAPABLE, "conditionsV4": ["ip", "saddr", "no-such-host"]}
    pods = pods_in_turn(node, cache, 9, plugin=wrong)
    lines, transactions = observed(node, cache)
    assert lines[1].startswith(named("failed", pods[1], "nftables refused the host port rules: "))
    assert lines[:1] + lines[2:] == [named("restored", pod) for pod in pods[:1] + pods[2:]]
    assert not node.footprint(pods[1])
    assert all(node.footprint(pod) for pod in pods[:1] + pods[2:])
    assert transactions < 9


def test_a_port_that_is_taken_between_the_look_and_the_transaction_is_not_taken_back(node: Node, cache: Cache) -> None:
    pods, newer = pods_in_turn(node, cache, 5), node.pod(4)
    lines, _ = observed(node, cache, lambda: node.add(newer, mapping(8001)))
    assert lines[1].startswith(named("failed", pods[1], f"host port 8001/tcp is taken by container {newer.id[:12]}"))
    assert lines[:1] + lines[2:] == [named("restored", pod) for pod in pods[:1] + pods[2:]]
    assert node.footprint(newer)
    assert not node.footprint(pods[1])


@pytest.mark.parametrize("told", [True, False], ids=["DEL with mappings", "DEL without mappings"])
def test_one_that_is_deleted_between_the_look_and_the_transaction_does_not_come_back(
    node: Node, cache: Cache, told: bool
) -> None:
    pods = pods_in_turn(node, cache, 5)
    known: dict[str, Any] = {"runtimeConfig": {"portMappings": [mapping(8001)]}} if told else {}
    lines, _ = observed(node, cache, lambda: node.delete(pods[1], **known))
    expected = [named("restored", pod) for pod in pods]
    expected[1] = named("gone", pods[1], "it was deleted")
    assert lines == expected
    assert not node.footprint(pods[1])


def test_one_that_is_added_between_the_look_and_the_transaction_is_present(node: Node, cache: Cache) -> None:
    pods = pods_in_turn(node, cache, 5)
    lines, _ = observed(node, cache, lambda: node.add(pods[1], mapping(8001)))
    assert lines == [named("present" if pod is pods[1] else "restored", pod) for pod in pods]


def test_a_flush_between_the_look_and_the_transaction_is_no_failure(node: Node, cache: Cache) -> None:
    pods = [running(node, cache, mapping(8000 + number)) for number in range(4)]
    node.nft("flush map inet hostport hostports")
    lines, _ = observed(node, cache, lambda: node.nft("flush ruleset"))
    assert sorted(lines) == sorted(named("restored", pod) for pod in pods)
    for number, pod in enumerate(pods):
        assert node.cni("CHECK", pod, config(pod, mapping(8000 + number))).status == 0


def test_of_two_that_want_one_port_the_older_one_gets_it(node: Node, cache: Cache) -> None:
    pods = pods_in_turn(node, cache, 5, capabilityArgs={"portMappings": [mapping(8000), mapping(9000)]})
    lines, _ = observed(node, cache)
    holder = f"pod shop/{pods[0].host_end}, container {pods[0].id[:12]} (eth0)"
    assert lines[1] == named("failed", pods[1], f"host port 8000/tcp is taken by {holder}")
    assert lines[:1] + lines[2:] == [named("restored", pod) for pod in pods[:1] + pods[2:]]
    assert not node.footprint(pods[1])


def test_one_port_at_various_addresses_takes_one_transaction(node: Node, cache: Cache) -> None:
    for address in ("127.0.0.1", NODE4):
        cache.add(node.pod(4), mapping(8080, hostIP=address))
    lines, transactions = observed(node, cache)
    assert ([line.partition(":")[0] for line in lines], transactions) == (["restored"] * 2, 1)


def test_two_that_take_ports_over_from_the_same_container_both_get_theirs(node: Node, cache: Cache) -> None:
    pods, absent = pods_in_turn(node, cache, 3), node.pod(4)
    node.add(absent, *(mapping(8000 + number) for number in range(3)))
    absent.remove()
    lines, _ = observed(node, cache)
    assert lines == [named("restored", pod) for pod in pods]
    assert all(node.footprint(pod) for pod in pods)
    assert not node.footprint(absent)


def in_turn(cache: Cache, pods: Sequence[Pod], *ports: Sequence[int], **keys: Any) -> None:
    """Have the cache know these pods, each of which was added a second after the one before, with these host ports."""
    for number, (pod, wanted) in enumerate(zip(pods, ports, strict=True)):
        path = cache.add(pod, *map(mapping, wanted), **(keys if not number else {}))
        os.utime(path, (1_000_000_000 + number,) * 2)


def test_one_that_waits_for_another_look_goes_before_a_younger_one_all_the_same(node: Node, cache: Cache) -> None:
    holder, *pods = (node.pod(4) for _ in range(4))
    node.add(holder, mapping(8000), mapping(8001))
    holder.remove()
    in_turn(cache, pods, [8000], [8001, 9000], [9000])
    lines, _ = observed(node, cache)
    taken = f"host port 9000/tcp is taken by pod shop/{pods[1].host_end}"
    assert lines[:2] == [named("restored", pod) for pod in pods[:2]]
    assert lines[2].startswith(named("failed", pods[2], taken))


def test_what_one_wants_that_is_refused_is_for_the_older_of_the_others(node: Node, cache: Cache) -> None:
    pods = [node.pod(4) for _ in range(3)]
    wrong = {**CAPABLE, "conditionsV4": ["ip", "saddr", "no-such-host"]}
    in_turn(cache, pods, [8000], [8000, 9000], [9000], plugin=wrong)
    lines, _ = observed(node, cache)
    assert lines[0].startswith(named("failed", pods[0], "nftables refused"))
    assert lines[1] == named("restored", pods[1])
    assert lines[2].startswith(named("failed", pods[2], "host port 9000/tcp is taken by pod"))


@pytest.mark.parametrize("keys", [{"netns": "/run/netns/gone"}, {"netns": None}], ids=["gone", "untold"])
def test_nothing_is_said_of_a_pod_without_host_ports(node: Node, cache: Cache, keys: dict[str, Any]) -> None:
    pod, other = running(node, cache, mapping(8000)), node.pod(4)
    cache.add(other, mapping(0), **keys)
    assert observed(node, cache)[0] == [named("present", pod)]


@pytest.mark.parametrize("element", ["::1 : accept", "::1 : goto localnet-x"])
def test_an_element_that_nobody_of_ours_wrote_stops_no_restoration(node: Node, cache: Cache, element: str) -> None:
    pods = [running(node, cache, mapping(8000 + number)) for number in range(2)]
    node.nft("flush map inet hostport hostports")
    node.nft_file(f"add chain inet hostport localnet-x\nadd element inet hostport localnet_needs {{ {element} }}\n")
    assert sorted(observed(node, cache)[0]) == sorted(named("restored", pod) for pod in pods)


def test_where_what_was_restored_cannot_be_watched_it_is_restored(
    node: Node, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NFTError([("no", "")])

    monkeypatch.setattr(Lookup, "tokens", refuse)
    pods = pods_in_turn(node, cache, 3)
    assert observed(node, cache)[0] == [named("restored", pod) for pod in pods]


def test_an_attachment_that_two_caches_have_is_restored_once(node: Node, cache: Cache, tmp_path: Path) -> None:
    other = Cache(tmp_path / "other")
    pod = node.pod(4)
    cache.add(pod, mapping(8080))
    other.add(pod, mapping(8080))
    assert restore(node, cache, other) == "1 present, 1 restored\n"


def test_clients_of_all_that_were_restored_at_once_are_answered(node: Node, cache: Cache) -> None:
    limited = {**CAPABLE, "hostAddresses": [f"{NODE4}/32"]}
    pods = [node.pod(4) for _ in range(3)]
    for number, pod in enumerate(pods):
        cache.add(pod, mapping(5300 + number, 53, "udp"), plugin=limited if number == 1 else CAPABLE)
        pod.serve("udp", 53, pod.host_end)
        # this flow finds no mapping, and would never find one while it goes on
        assert node.client.is_silent("udp", NODE4, 5300 + number, source_port=40000)
    assert restore(node, cache) == "3 restored\n"
    for number, pod in enumerate(pods):
        answer = node.client.ask("udp", NODE4, 5300 + number, source_port=40000)
        assert answer == f"{pod.host_end} {CLIENT4}"


@pytest.mark.parametrize("ports", [1, 20])
def test_what_is_restored_of_an_attachment_that_the_cache_forgets_is_removed(
    node: Node, cache: Cache, ports: int
) -> None:
    pods = [node.pod(4) for _ in range(2)]
    for number, pod in enumerate(pods):
        cache.add(pod, *(mapping(8000 + 100 * number + port) for port in range(ports)))
    with node_process.on(node):
        outcomes = restoring.restore(restoring.candidates([cache.directory]), print, watch_seconds=0.1)
        assert [outcome.status for _, outcome in (next(outcomes), next(outcomes))] == ["restored", "restored"]
        cache.remove(pods[0])
        assert [(path, outcome.text) for path, outcome in outcomes] == [(cache.path(pods[0]), "it was deleted")]
    assert not node.footprint(pods[0])
    assert node.footprint(pods[1])


def test_a_file_that_is_being_written_keeps_no_other_attachment_waiting(node: Node, cache: Cache) -> None:
    pods = pods_in_turn(node, cache, 3)
    whole = cache.path(pods[1]).read_text()
    cache.path(pods[1]).write_text(whole[:100])
    os.utime(cache.path(pods[1]), (1_000_000_001,) * 2)

    def finish() -> None:
        cache.path(pods[1]).write_text(whole)

    lines, transactions = observed(node, cache, finish)
    assert lines == [named("restored", pod) for pod in pods]
    assert transactions == 2
