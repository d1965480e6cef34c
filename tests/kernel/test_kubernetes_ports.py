from __future__ import annotations

from typing import Any

import pytest
from lab import NODE4, NODE6, Node, config, mapping

ANY4, ANY6 = "0.0.0.0", "::"


def served(node: Node, *families: int) -> Any:
    pod = node.pod(*families)
    for protocol in ("tcp", "udp"):
        for port in (80, 81):
            pod.serve(protocol, port, str(port))
    return pod


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("given", [ANY4, ANY6])
def test_all_addresses_of_one_family_are_more_specific_than_none(node: Node, given: str, first: int) -> None:
    pod = served(node)
    pair = [mapping(8190, 80), mapping(8190, 81, hostIP=given)]
    mappings = pair if first else pair[::-1]
    assert node.add(pod, *mappings).stderr == ""
    assert node.client.ask("tcp", NODE4, 8190).split()[0] == ("81" if given == ANY4 else "80")
    assert node.client.ask("tcp", NODE6, 8190).split()[0] == ("81" if given == ANY6 else "80")
    assert not node.cni("CHECK", pod, config(pod, *mappings)).status


def test_a_mapping_that_has_nothing_left_is_told_and_the_pod_starts(node: Node) -> None:
    pod = served(node, 4)
    added = node.add(pod, mapping(8190, 80), mapping(8190, 81, hostIP=ANY4))
    reason = "another mapping has the same port and 0.0.0.0 or :: as its hostIP"
    assert added.stderr == f"hostport: host port 8190/tcp is not mapped: {reason}\n"
    assert node.client.ask("tcp", NODE4, 8190).split()[0] == "81"


@pytest.mark.parametrize(
    ("mappings", "answers"),
    [
        ([mapping(8190, 80), mapping(8190, 81, "udp")], {("tcp", NODE4): "80", ("udp", NODE4): "81"}),
        (
            [mapping(8190, 80, hostIP=NODE4), mapping(8190, 81, hostIP=NODE6)],
            {("tcp", NODE4): "80", ("tcp", NODE6): "81"},
        ),
        ([mapping(8190, 80), mapping(8190, 81, hostIP=NODE4)], {("tcp", NODE4): "81", ("tcp", NODE6): "80"}),
        (
            [mapping(8190, 80), mapping(8190, 81, hostIP=ANY4), mapping(8190, 80, hostIP=NODE4)],
            {("tcp", NODE4): "80", ("tcp", "10.88.0.1"): "81", ("tcp", NODE6): "80"},
        ),
        ([mapping(8190, 80), mapping(8190, 80, hostIP=ANY4)], {("tcp", NODE4): "80", ("tcp", NODE6): "80"}),
        ([mapping(8190, 80), mapping(8191, 80)], {("tcp", NODE4): "80"}),
    ],
    ids=["protocols", "addresses", "address-and-none", "three-degrees", "the-same-twice", "two-ports-to-one"],
)
def test_what_the_api_server_admits_starts(
    node: Node, mappings: list[dict[str, Any]], answers: dict[tuple[str, str], str]
) -> None:
    pod = served(node)
    node.client.ip(f"route add 10.88.0.0/24 via {NODE4}")
    for order in (mappings, mappings[::-1]):
        node.add(pod, *order)
        for (protocol, address), answer in answers.items():
            assert node.client.ask(protocol, address, 8190).split()[0] == answer
        assert not node.cni("CHECK", pod, config(pod, *order)).status


@pytest.mark.parametrize("given", ["", NODE4, ANY4])
def test_one_port_of_one_address_to_two_container_ports_is_refused(node: Node, given: str) -> None:
    pod = served(node)
    refused = node.cni("ADD", pod, config(pod, mapping(8190, 80, hostIP=given), mapping(8190, 81, hostIP=given)))
    assert refused.code == 7
    assert refused.msg.endswith("is mapped to two container ports, 80 and 81")
    assert not node.ruleset()
