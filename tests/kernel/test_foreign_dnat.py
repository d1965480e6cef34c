from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from go_tools import unavailable
from kube_proxy import FAMILIES, KubeProxy, Services
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, Namespace, Node, Pod, config, mapping, require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

BALANCER4, BALANCER6 = "192.0.2.10", "2001:db8::10"
PUBLISHED = "172.17.0.2"
ORDERS = pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
HOOKS = (
    "chain in { type nat hook prerouting priority dstnat; %s; }; chain out { type nat hook output priority -100; %s; };"
)
DOCKER = """
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o bridge1 -j MASQUERADE
-A DOCKER ! -i bridge1 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
NETAVARK_IPTABLES = """
*nat
:NETAVARK-HOSTPORT-DNAT - [0:0]
:NETAVARK-HOSTPORT-MASQ - [0:0]
:NETAVARK-HOSTPORT-SETMARK - [0:0]
:NETAVARK-DN-1 - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A POSTROUTING -j NETAVARK-HOSTPORT-MASQ
-A NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 8080 -j NETAVARK-DN-1
-A NETAVARK-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A NETAVARK-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000
-A NETAVARK-DN-1 -s 172.17.0.0/16 -p tcp -m tcp --dport 8080 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-1 -s 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-1 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
NETAVARK_NFTABLES = """
table inet netavark {
    chain PREROUTING { type nat hook prerouting priority dstnat; fib daddr type local jump HOSTPORT-DNAT; }
    chain OUTPUT { type nat hook output priority -100; fib daddr type local jump HOSTPORT-DNAT; }
    chain POSTROUTING { type nat hook postrouting priority srcnat; meta mark & 0x2000 == 0x2000 masquerade; }
    chain HOSTPORT-DNAT { tcp dport 8080 jump nv_1_dnat; }
    chain HOSTPORT-SETMARK { meta mark set meta mark | 0x2000; }
    chain nv_1_dnat {
        ip saddr 172.17.0.0/16 tcp dport 8080 jump HOSTPORT-SETMARK
        ip saddr 127.0.0.1 tcp dport 8080 jump HOSTPORT-SETMARK
        tcp dport 8080 dnat ip to 172.17.0.2:80
    }
}
"""
PUBLISHERS = {
    "docker": ("iptables-restore", DOCKER),
    "netavark-iptables": ("iptables-restore", NETAVARK_IPTABLES),
    "netavark-nftables": ("nft", NETAVARK_NFTABLES),
}


def answers(asking: Namespace, address: str, port: int) -> str:
    return asking.ask("tcp", address, port).split()[0]


def named(node: Node, name: str) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, name)
    node.ip(f"link set {pod.host_end} type bridge_slave hairpin on")
    return pod


def test_what_somebody_else_translates_is_not_taken(node: Node) -> None:
    item, two = named(node, "one"), named(node, "two")
    node.nft_file(
        "table ip other { chain c { type nat hook prerouting priority dstnat;"
        f" fib daddr type local tcp dport 30080 dnat to {two.ip4}:80; }}; }}"
    )
    node.add(item, mapping(30080))
    assert node.client.ask("tcp", NODE4, 30080) == f"two {CLIENT4}"


@ORDERS
@pytest.mark.parametrize("priority", [-150, -100])
def test_the_priority_of_somebody_elses_chain_and_who_came_first_do_not_matter(
    node: Node, priority: int, is_first: bool
) -> None:
    item, two = named(node, "one"), named(node, "two")
    rules = (
        f"ip daddr {NODE4} tcp dport 30080 dnat ip to {two.ip4}:80;"
        f" ip6 daddr {NODE6} tcp dport 30080 dnat ip6 to [{two.ip6}]:80"
    )
    theirs = f"table inet other {{ {HOOKS % (rules, rules)} }}".replace("dstnat;", f"{priority};")

    def add() -> None:
        node.add(item, mapping(30080), mapping(9090))

    in_order(add, lambda: node.nft_file(theirs.replace("-100;", f"{priority};")), is_first)
    for asking in (node.client, named(node, "neighbour"), node):
        for address in (NODE4, NODE6):
            assert answers(asking, address, 30080) == "two"
            assert answers(asking, address, 9090) == "one"
    assert answers(node, BRIDGE4, 30080) == "one"


def in_order(add: Callable[[], object], others: Callable[[], object], is_first: bool) -> None:
    for step in (others, add) if is_first else (add, others):
        step()


@pytest.fixture
def services(node: Node) -> Services:
    """Services by a node's port, on a load balancer's addresses, and on the node's own as k3s has them."""
    require(not (need := unavailable("kubernetes", "kube-proxy")), f"needs {need}")
    node.ip(f"addr add {BALANCER4}/32 dev uplink", f"addr add {BALANCER6}/128 dev uplink nodad")
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    node.ip(f"route add default via {CLIENT4}", f"route add default via {CLIENT6}")
    services, pod = Services(), named(node, "service")
    services.add("by-the-nodes-port", pod, 8000, node_port=30080)
    services.add("balanced", pod, 8080, ingress=[BALANCER4, BALANCER6])
    services.add("on-the-node", pod, 8081, ingress=[NODE4, NODE6])
    return services


@ORDERS
@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_services_keep_their_connections_and_the_pod_its_other_ports(
    node: Node, services: Services, tmp_path: Path, mode: str, is_first: bool
) -> None:
    web, neighbour = named(node, "web"), node.pod()
    mappings = [mapping(port) for port in (30080, 8080, 8081, 9090)]
    running: list[KubeProxy] = []

    def proxy() -> None:
        running.append(KubeProxy(node, services, tmp_path, mode))

    def expect(port: int, who: str, addresses: Sequence[str]) -> None:
        for asking in (node.client, neighbour, web, node):
            assert {address: answers(asking, address, port) for address in addresses} == dict.fromkeys(addresses, who)

    try:
        in_order(lambda: node.add(web, *mappings), proxy, is_first)
        for _ in range(2):
            expect(30080, "service", [NODE4, NODE6])
            expect(30080, "service" if mode == "iptables" else "web", [BALANCER4, BRIDGE6])
            expect(8080, "service", [BALANCER4, BALANCER6, "10.96.0.11", "fd00:96::11"])
            expect(8080, "web", [NODE4, NODE6])
            expect(8081, "service", [NODE4, NODE6])
            expect(8081, "web", [BALANCER4, BALANCER6])
            expect(9090, "web", [NODE4, NODE6, BALANCER4, BALANCER6])
            assert answers(node, "127.0.0.1", 9090) == "web"
            assert answers(node, "127.0.0.1", 30080) == ("service" if mode == "iptables" else "web")
            assert node.client.ask("tcp", NODE4, 9090) == f"web {CLIENT4}"
            checked = node.cni("CHECK", web, config(web, *mappings))
            assert not checked.status, checked
            node.add(web, *mappings)
        node.delete(web)
        expect(30080, "service", [NODE4, NODE6])
        assert node.client.is_silent("tcp", NODE4, 9090)
    finally:
        for item in running:
            item.stop()


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_behind_a_service_and_a_host_port_of_the_same_number_is_reached_by_both(
    node: Node, services: Services, tmp_path: Path, mode: str, family: str
) -> None:
    _, prefix, address = FAMILIES[family]
    web, neighbour = named(node, "web"), node.pod()
    services.add("same", web, 9090, node_port=31090)
    node.add(web, mapping(31090), mapping(9090))
    with KubeProxy(node, services, tmp_path, mode):
        for asking in (node.client, neighbour, web, node):
            assert answers(asking, address, 31090) == "web"
            assert answers(asking, address, 9090) == "web"
            assert answers(asking, f"{prefix}13", 9090) == "web"


@ORDERS
@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_a_port_that_another_runtime_published_keeps_its_connections(
    node: Node, publisher: str, is_first: bool
) -> None:
    node.bridge("bridge1", "172.17.0.1/16")
    node.set_sysctl("net/ipv4/conf/bridge1/route_localnet", 1)
    other = node.pod(addresses=[f"{PUBLISHED}/16"], gateways=["172.17.0.1"], bridge="bridge1")
    other.serve("tcp", 80, "other")
    web, neighbour = named(node, "web"), node.pod()
    program, rules = PUBLISHERS[publisher]

    def publish() -> None:
        command = ["nft", "-f", "-"] if program == "nft" else [program, "-n"]
        node.run(*command, input=rules)

    in_order(lambda: node.add(web, mapping(8080), mapping(9090)), publish, is_first)
    for asking in (node.client, neighbour, web, node):
        for address in (NODE4, BRIDGE4):
            if asking is not node.client or address == NODE4:
                assert answers(asking, address, 8080) == "other"
                assert answers(asking, address, 9090) == "web"
    assert answers(node, "127.0.0.1", 8080) == ("web" if publisher == "docker" else "other")
    assert answers(node, "127.0.0.1", 9090) == "web"
    assert answers(node.client, NODE6, 8080) == "web"
    node.delete(web)
    assert answers(node.client, NODE4, 8080) == "other"
