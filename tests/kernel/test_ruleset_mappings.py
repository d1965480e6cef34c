from __future__ import annotations

import re
from typing import Any

import pytest
from lab import NODE4, NODE6, Node, config, mapping

ELEMENT = re.compile(r'(?:\{|,)\s+([^,{}"]+) counter comment "')
RULE = re.compile(r"^\t\t(.*) dnat ip6? to (\S+)$", re.MULTILINE)
WEB4, WEB6 = "10.88.0.2:80", "[fd00:88::2]:80"


@pytest.mark.parametrize(
    ("mappings", "elements", "rules"),
    [
        (
            [mapping(8080, hostIP="0.0.0.0"), mapping(8081, hostIP="0.0.0.0")],
            {"ipv4 . tcp . 8080", "ipv4 . tcp . 8081"},
            {("meta nfproto ipv4 tcp dport 8080", WEB4), ("meta nfproto ipv4 tcp dport 8081", WEB4)},
        ),
        (
            [mapping(53, 1053, "TCP", hostIP="::"), mapping(53, 2053, "Udp", hostIP="::")],
            {"ipv6 . tcp . 53", "ipv6 . udp . 53"},
            {
                ("meta nfproto ipv6 tcp dport 53", "[fd00:88::2]:1053"),
                ("meta nfproto ipv6 udp dport 53", "[fd00:88::2]:2053"),
            },
        ),
        (
            [mapping(8080, protocol="sctp")],
            {"ipv4 . sctp . 8080", "ipv6 . sctp . 8080"},
            {("meta nfproto ipv4 sctp dport 8080", WEB4), ("meta nfproto ipv6 sctp dport 8080", WEB6)},
        ),
        (
            [mapping(8080, hostIP=NODE4), mapping(8080, hostIP=NODE6)],
            {f"{NODE4} . tcp . 8080", f"{NODE6} . tcp . 8080"},
            {(f"ip daddr {NODE4} tcp dport 8080", WEB4), (f"ip6 daddr {NODE6} tcp dport 8080", WEB6)},
        ),
        (
            [mapping(8080, hostIP="127.0.0.1")],
            {"127.0.0.1 . tcp . 8080"},
            {("ip daddr 127.0.0.1 tcp dport 8080", WEB4)},
        ),
        (
            [mapping(8080, hostIP=NODE4), mapping(8080, 81, hostIP="192.0.2.3"), mapping(8080, 82, hostIP="0.0.0.0")],
            {f"{NODE4} . tcp . 8080", "192.0.2.3 . tcp . 8080", "ipv4 . tcp . 8080"},
            {
                (f"ip daddr {NODE4} tcp dport 8080", WEB4),
                ("ip daddr 192.0.2.3 tcp dport 8080", "10.88.0.2:81"),
                ("meta nfproto ipv4 tcp dport 8080", "10.88.0.2:82"),
            },
        ),
        (
            [mapping(8080), mapping(8080), mapping(0, 81), mapping(8080, hostIP="")],
            {"ipv4 . tcp . 8080", "ipv6 . tcp . 8080"},
            {("meta nfproto ipv4 tcp dport 8080", WEB4), ("meta nfproto ipv6 tcp dport 8080", WEB6)},
        ),
    ],
    ids=[
        "two host ports to one container port, IPv4 only",
        "tcp and udp to different targets, IPv6 only",
        "sctp",
        "an address of each family",
        "loopback",
        "one port on two addresses and on all others",
        "the same mapping twice",
    ],
)
def test_mappings_become_these_elements_and_rules(
    node: Node, mappings: list[dict[str, Any]], elements: set[str], rules: set[tuple[str, str]]
) -> None:
    node.add(node.pod(), *mappings)
    assert sorted(ELEMENT.findall(node.ruleset())) == sorted(elements)
    assert sorted(RULE.findall(node.ruleset())) == sorted(rules)


@pytest.mark.parametrize("families", [(4,), (6,)], ids=["IPv4", "IPv6"])
def test_a_host_address_of_a_family_the_pod_lacks_maps_nothing_and_says_so(
    node: Node, families: tuple[int, ...]
) -> None:
    pod = node.pod(*families)
    added = node.add(pod, mapping(8080, hostIP=NODE6 if families == (4,) else NODE4))
    assert node.nft("list ruleset") == ""
    (line,) = added.stderr.splitlines()
    assert "8080/tcp" in line


@pytest.mark.parametrize("first", ["", NODE4], ids=["wildcard first", "address first"])
def test_a_wildcard_and_a_given_address_do_not_collide_in_two_pods(node: Node, first: str) -> None:
    for host_ip in (first, NODE4 if first == "" else ""):
        node.add(node.pod(4), mapping(8080, hostIP=host_ip))
    assert sorted(ELEMENT.findall(node.ruleset())) == [f"{NODE4} . tcp . 8080", "ipv4 . tcp . 8080"]


@pytest.mark.parametrize(
    ("keys", "masquerade"),
    [
        ({}, {"ip saddr 127.0.0.0/8", "ip saddr 10.88.0.0/24", "ip6 saddr fd00:88::/64"}),
        ({"masqAll": True}, {"meta nfproto ipv4", "meta nfproto ipv6"}),
        ({"snat": False}, set()),
        ({"snat": False, "masqAll": True}, set()),
    ],
    ids=["default", "masqAll", "no snat", "no snat although masqAll"],
)
def test_these_sources_are_masqueraded(node: Node, keys: dict[str, bool], masquerade: set[str]) -> None:
    node.add(node.pod(), mapping(8080), **keys)
    assert set(re.findall(r"\t\t(.*) masquerade", node.ruleset())) == masquerade


def test_conditions_reach_the_forwards_of_their_network_and_family_only(node: Node) -> None:
    pod, other = node.pod(), node.pod()
    node.add(pod, mapping(8080), conditionsV4=["ip", "saddr", "192.0.2.0/24"])
    assert node.cni("ADD", other, config(other, mapping(9090), name="another")).code == 0
    assert {match for match, _ in RULE.findall(node.ruleset())} == {
        "ip saddr 192.0.2.0/24 tcp dport 8080",
        "meta nfproto ipv6 tcp dport 8080",
        "meta nfproto ipv4 tcp dport 9090",
        "meta nfproto ipv6 tcp dport 9090",
    }
