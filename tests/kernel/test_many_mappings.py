from __future__ import annotations

import resource
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hostport_list import listed
from kernel.test_upgrade import make_older
from lab import NODE4, Node, Pod, config, mapping
from libcni_cache import Cache
from restoration import restore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MANY = 4000  # dual stack; what nftables says of their refusal does not fit the usual receive buffer
FEW, MORE = 500, 4000
GROWTH = 16  # eight times as many mappings: if each is compared with each, 64


def ports(count: int, protocol: str = "tcp") -> list[dict[str, Any]]:
    return [mapping(10000 + number, 80, protocol) for number in range(count)]


def test_a_repeated_add_of_many_mappings_replaces_them(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, *ports(MANY))
    node.add(pod, *ports(MANY - 1), mapping(9999))
    assert node.footprint(pod)["hostports"] == 2 * MANY
    assert node.client.ask("tcp", NODE4, 9999).startswith("web ")
    assert node.client.is_silent("tcp", NODE4, 10000 + MANY - 1)


def test_many_mappings_of_which_somebody_else_has_the_ports_are_refused_with_the_holder_s_name(node: Node) -> None:
    first, second = node.pod(), node.pod()
    node.add(first, *ports(MANY))
    refused = node.cni("ADD", second, config(second, *ports(MANY)))
    assert refused.code == 100
    assert first.id[:12] in refused.msg
    assert node.footprint(first)["hostports"] == 2 * MANY
    assert not node.footprint(second)


def test_many_mappings_of_a_container_that_is_gone_are_taken_over(node: Node) -> None:
    first, second = node.pod(), node.pod()
    second.serve("tcp", 80, "heir")
    node.add(first, *ports(MANY))
    first.remove()
    assert "takes over" in node.add(second, *ports(MANY)).stderr
    assert node.client.ask("tcp", NODE4, 10000).startswith("heir ")
    assert not node.footprint(first)


def test_what_nftables_will_not_take_is_named_however_much_it_is(node: Node) -> None:
    ports_of = "hostports { type nf_proto . inet_proto . inet_service : verdict; size 100; counter; }"
    node.nft_file(f'table inet hostport {{ comment "CNI hostport plugin"; map {ports_of}; }}')
    pod = node.pod()
    refused = node.cni("ADD", pod, config(pod, *ports(MANY)))
    assert refused.code == 101
    assert "Too many open files in system: create element inet hostport hostports" in refused.msg
    assert len(refused.stdout) < 10000
    assert not node.footprint(pod)


class Work:
    """One pod's mappings through every operation, with the processor time that each took."""

    def __init__(self, node: Node, cache: Cache, protocol: str) -> None:
        self.node, self.cache, self.protocol = node, cache, protocol

    def of(self, count: int) -> dict[str, float]:
        node, first, second, mappings = self.node, self.node.pod(), self.node.pod(), ports(count, self.protocol)

        def cni(command: str, pod: Pod = first) -> None:
            outcome = node.cni(command, pod, config(pod, *mappings, **{"cni.dev/valid-attachments": []}))
            assert not outcome.status, outcome

        took = {
            "ADD": _seconds(lambda: cni("ADD")),
            "CHECK": _seconds(lambda: cni("CHECK")),
            "repeated ADD": _seconds(lambda: cni("ADD")),
            "list": _seconds(lambda: listed(node)),
            "DEL": _seconds(lambda: cni("DEL")),
            "ADD after DEL": _seconds(lambda: cni("ADD")),
            "GC": _seconds(lambda: cni("GC")),
        }
        node.nft("flush ruleset")
        self.cache.add(first, *mappings)
        took["restore"] = _seconds(lambda: restore(node, self.cache))
        assert node.footprint(first)["hostports"] == 2 * count
        self.cache.remove(first)
        make_older(node)
        took["upgrade"] = _seconds(lambda: cni("ADD"))
        first.remove()
        took["take-over"] = _seconds(lambda: cni("ADD", second))
        cni("DEL", second)
        return took


def _seconds(work: Callable[[], object]) -> float:
    """Return the processor time of the processes that some work starts, which others on the machine do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_work_grows_with_the_mappings_and_not_with_their_square(node: Node, tmp_path: Path, protocol: str) -> None:
    work = Work(node, Cache(tmp_path / "cni"), protocol)
    few, more = work.of(FEW), work.of(MORE)
    growth = {operation: more[operation] / few[operation] for operation in few}
    assert max(growth.values()) < GROWTH, growth


def test_waiting_for_many_ports_grows_with_them_and_not_with_their_square(node: Node) -> None:
    took = []
    for count in (FEW, MORE):
        pod = node.pod(4)

        def delete(given: dict[str, Any], pod: Pod = pod) -> None:
            assert not node.cni("DEL", pod, given).status

        both = [config(pod, *ports(count), name=name) for name in ("a", "b")]
        both[1]["prevResult"] = {"ips": [{"address": "10.99.0.2/24"}]}
        for given, ifname in zip(both, ("eth0", "eth1"), strict=True):
            assert not node.cni("ADD", pod, given, IFNAME=ifname).status
        took.append(_seconds(partial(delete, both[0])))
        assert node.footprint(pod, "b", "eth1")["hostports"] == count
        assert not node.cni("DEL", pod, both[1], IFNAME="eth1").status
    assert took[1] / took[0] < GROWTH, took
