from __future__ import annotations

import pytest
from hostport_list import add, hosts, listed, shown
from lab import LAUNCHER, Node, mapping

from cni_hostport.attachment import Attachment

WEB, DNS = "shop/web-7d4b9c-x2x1z", "kube-system/dns"


def test_names_are_those_of_the_runtime_as_far_as_they_reach(node: Node) -> None:
    item, other = node.pod(4), node.pod(4)
    long = "n" * 200
    add(node, item, WEB, mapping(1), name="front-end.net_1")
    add(node, other, "", mapping(2), name=long)
    assert [(row[2], row[5]) for row in shown(node)[1:]] == [(WEB, "front-end.net_1"), ("-", f"{'n' * 128}...")]
    assert [item["pod"] for item in listed(node)] == [WEB, ""]
    for name in (long, f"{'n' * 128}..."):
        assert hosts(node, "--network", name) == ["0.0.0.0:2/tcp"]
    assert listed(node, "--network", "n" * 128) == []


def test_a_network_of_which_the_name_is_not_known_is_shown_and_found_by_its_hash(node: Node) -> None:
    pod = node.pod(4)
    node.add(pod, mapping(1))
    node.nft("flush map inet hostport pods_ip4")
    hashed = Attachment.network_key("pods")
    assert [item["network"] for item in listed(node)] == [hashed]
    assert len(listed(node, "--network", "pods")) == len(listed(node, "--network", hashed)) == 1


@pytest.fixture
def busy(node: Node) -> Node:
    add(node, node.pod(4), WEB, mapping(80), mapping(53, 53, "udp"), name="front")
    add(node, node.pod(4), DNS, mapping(53, 53), mapping(81))
    add(node, node.pod(4), "dns", mapping(82), mapping(81, protocol="udp"))
    return node


@pytest.mark.parametrize(
    ("options", "ports"),
    [
        ("--port 53", "53/tcp 53/udp"),
        ("--port 53/udp", "53/udp"),
        ("--port 53/TCP", "53/tcp"),
        ("--port 53/sctp", ""),
        ("--port 5", ""),
        ("--pod kube-system/dns", "53/tcp 81/tcp"),
        ("--pod dns", "53/tcp 81/tcp 81/udp 82/tcp"),
        ("--pod kube-system", ""),
        ("--pod shop/dns", ""),
        ("--network front", "53/udp 80/tcp"),
        ("--network pods", "53/tcp 81/tcp 81/udp 82/tcp"),
        ("--network fron", ""),
        ("--network pods --port 81", "81/tcp 81/udp"),
        ("--network pods --port 81 --pod kube-system/dns", "81/tcp"),
        ("--network front --pod dns", ""),
    ],
)
def test_filters_select_and_combine(busy: Node, options: str, ports: str) -> None:
    found = listed(busy, *options.split())
    assert [f"{item['host_port']}/{item['protocol']}" for item in found] == ports.split()


def test_a_filter_that_nothing_passes_says_so_and_succeeds(busy: Node) -> None:
    ran = busy.run(*LAUNCHER, "list", "--port", "1")
    assert (ran.stdout, ran.stderr) == ("", "No host ports.\n")


def test_a_pod_whose_name_is_cut_is_found_by_its_whole_name(node: Node) -> None:
    name = f"{'s' * 63}/{'p' * 253}"
    add(node, node.pod(4), name, mapping(80))
    assert [item["pod"] for item in listed(node)] == [name[:128]]
    for known in (name, "p" * 253, name[:128]):
        assert len(listed(node, "--pod", known)) == 1
    assert listed(node, "--pod", "q" * 253) == []


def test_a_pod_is_found_by_a_name_that_nftables_cannot_quote(node: Node) -> None:
    name = 'shop/we"b\\1\u00e9'
    add(node, node.pod(4), name, mapping(80))
    assert [item["pod"] for item in listed(node, "--pod", name)] == ["shop/we?b?1?"]
