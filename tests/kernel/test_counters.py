from __future__ import annotations

import pytest
from lab import BRIDGE4, NODE4, NODE6, Node, config, key_of, mapping

LOOPBACK4 = "127.0.0.1"


def test_each_mapping_counts_its_new_connections(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 53, "dns")
    node.add(pod, mapping(8080), mapping(8081), mapping(8082), mapping(8081, hostIP=NODE4), mapping(5353, 53, "udp"))
    for number in range(7):
        node.client.ask("tcp", NODE4, 8080)
        node.client.ask("udp", NODE4, 5353, source_port=30000 + number % 2)
    for address, port in ((NODE6, 8080), (NODE4, 8081), (NODE4, 8081), (NODE6, 8081)):
        node.client.ask("tcp", address, port)
    for address in (LOOPBACK4, LOOPBACK4, BRIDGE4):
        node.ask("tcp", address, 8081)
    assert node.connections() == {
        "ipv4 . tcp . 8080": 7,
        "ipv6 . tcp . 8080": 1,
        f"{NODE4} . tcp . 8081": 2,
        "ipv4 . tcp . 8081": 3,
        "ipv6 . tcp . 8081": 1,
        "ipv4 . tcp . 8082": 0,
        "ipv6 . tcp . 8082": 0,
        "ipv4 . udp . 5353": 2,
        "ipv6 . udp . 5353": 0,
    }


def test_each_of_20_mappings_counts_for_itself(node: Node) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    ports = range(8000, 8020)
    node.add(pod, *map(mapping, ports))
    for port in ports:
        for _ in range(port % 4):
            node.client.ask("tcp", NODE4, port)
    assert node.connections() == {f"ipv4 . tcp . {port}": port % 4 for port in ports}
    assert node.cni("CHECK", pod, config(pod, *map(mapping, ports))).code == 0


def test_a_connection_counts_that_the_pod_refuses_or_that_meets_no_condition(node: Node) -> None:
    pod, other = node.pod(4), node.pod(4)
    node.add(pod, mapping(8080, 81))
    node.add(other, mapping(9090), conditionsV4=["ip", "saddr", "203.0.113.0/24"])
    for port in (8080, 9090):
        assert node.client.is_silent("tcp", NODE4, port)
    assert node.connections() == {"ipv4 . tcp . 8080": 1, "ipv4 . tcp . 9090": 1}


def test_an_add_of_another_pod_keeps_what_was_counted_and_an_own_one_begins_anew(node: Node) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    for _ in range(3):
        node.client.ask("tcp", NODE4, 8080)
    node.add(node.pod(4), mapping(9090))
    assert node.connections() == {"ipv4 . tcp . 8080": 3, "ipv4 . tcp . 9090": 0}
    node.add(pod, mapping(8080))
    assert node.connections() == {"ipv4 . tcp . 8080": 0, "ipv4 . tcp . 9090": 0}


@pytest.mark.parametrize("name", ["front-end.net_1", "n" * 128, "n" * 200])
def test_a_pods_addresses_name_its_network_as_far_as_a_comment_reaches(node: Node, name: str) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080), name=name)
    ruleset, masq = node.ruleset(), f"masq-{key_of(pod, name)}"
    for address in (pod.ip4, pod.ip6):
        assert f'elements = {{ {address} comment "{name[:128]}" : goto {masq} }}' in ruleset
    assert node.cni("CHECK", pod, config(pod, mapping(8080), name=name)).code == 0
    node.delete(pod, name=name)
    assert masq not in node.ruleset()
