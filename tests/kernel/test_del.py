from __future__ import annotations

from typing import Any

import pytest
from lab import Node, Pod, mapping, wait

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}


@pytest.fixture
def first(node: Node) -> Pod:
    pod = node.pod()
    node.add(pod, mapping(8080), mapping(5353, 53, "udp"))
    return pod


@pytest.fixture
def second(node: Node) -> Pod:
    pod = node.pod()
    node.add(pod, mapping(9999))
    return pod


@pytest.mark.parametrize(
    ("keys", "variables"),
    [
        ({}, {}),
        ({}, {"NETNS": ""}),
        ({}, {"NETNS": "/run/netns/never-was"}),
        ({}, {"NETNS": "/etc/hostname"}),
        ({"cniVersion": "0.1.0"}, {}),
        ({"cniVersion": "0.4.0", "prevResult": None}, {}),
        ({"runtimeConfig": None}, {}),
        ({"runtimeConfig": {"portMappings": []}}, {}),
        ({"runtimeConfig": {"portMappings": [mapping(9999)]}}, {}),
        ({"runtimeConfig": {"portMappings": [mapping(70000), "nonsense", mapping(1, -1, "icmp")]}}, {}),
        ({"runtimeConfig": "nonsense"}, {}),
        ({"backend": "iptables", "externalSetMarkChain": "KUBE-MARK-MASQ", "conditionsV4": ["-s", "192.0.2.2"]}, {}),
        ({"prevResult": {"ips": [{"address": "192.0.2.99/24"}]}, "snat": "yes"}, {}),
    ],
)
def test_del_removes_all_whatever_it_is_called_with(
    node: Node, first: Pod, second: Pod, keys: dict[str, Any], variables: dict[str, str]
) -> None:
    bystander = node.footprint(second)
    for _ in range(2):
        deleted = node.cni("DEL", first, {**BARE, **keys}, **variables)
        assert (deleted.code, deleted.stdout) == (0, "")
        assert not node.footprint(first)
        assert node.footprint(second) == bystander


def test_ten_dels_at_once_all_succeed(node: Node, first: Pod, second: Pod) -> None:
    bystander = node.footprint(second)
    assert [wait(started).code for started in [node.start("DEL", first, BARE) for _ in range(10)]] == [0] * 10
    assert not node.footprint(first)
    assert node.footprint(second) == bystander


def test_del_on_a_node_without_the_table_succeeds_and_makes_none(node: Node) -> None:
    node.delete(node.pod())
    assert node.nft("list ruleset") == ""


@pytest.mark.parametrize(
    "damage",
    ["flush map inet hostport hostports", "flush map inet hostport pods_ip4", "flush table inet hostport"],
)
def test_del_removes_what_a_stranger_left_of_an_attachment(node: Node, first: Pod, damage: str) -> None:
    node.nft(damage)
    node.delete(first)
    assert not node.footprint(first)
