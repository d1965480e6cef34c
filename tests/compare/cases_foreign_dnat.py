"""Ports that somebody else on the node translates as well: Services, and containers of other runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import reached
from kernel.test_foreign_dnat import DOCKER, NETAVARK_NFTABLES, PUBLISHED, in_order
from lab import NODE4, NODE6, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench
    from lab import Pod

BALANCER = "192.0.2.10"
SERVICE = "what is more specific wins, whoever came first: a pod can ask for a Service's port number (CVE-2019-9946)"
RUNTIME = "a container of another runtime keeps the port that it was given, whoever came first"
CHAINS = """
table ip services {
    chain prerouting { type nat hook prerouting priority dstnat; jump services; }
    chain output { type nat hook output priority -100; jump services; }
    chain postrouting { type nat hook postrouting priority srcnat; meta mark & 0x4000 == 0x4000 masquerade; }
    chain services {
        ip daddr 192.0.2.10 tcp dport 8080 meta mark set meta mark | 0x4000 dnat to SERVICE:80
        fib daddr type local ip daddr != 127.0.0.0/8 tcp dport 30080 meta mark set meta mark | 0x4000 dnat to SERVICE:80
    }
}
"""
IPTABLES = """
*nat
:KUBE-SERVICES - [0:0]
-I PREROUTING -j KUBE-SERVICES
-I OUTPUT -j KUBE-SERVICES
-I POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
-A KUBE-SERVICES -d 192.0.2.10 -p tcp --dport 8080 -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 192.0.2.10 -p tcp --dport 8080 -j DNAT --to-destination SERVICE:80
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -p tcp --dport 30080 -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -p tcp --dport 30080 -j DNAT --to-destination SERVICE:80
COMMIT
"""
SERVICES = {"nftables": ("nft -f -", CHAINS), "iptables": ("iptables-restore -n", IPTABLES)}


def beside_a_service(node: Bench, mode: str, *, is_first: bool) -> None:
    """Have a Service and a host port of its numbers, the Service's rules before or after ADD."""
    node.ip(f"addr add {BALANCER}/32 dev uplink")
    service, neighbour = node.web(name="service"), node.pod()
    program, rules = SERVICES[mode]

    def load() -> None:
        node.run(*program.split(), input=rules.replace("SERVICE", service.ip4))

    in_order(lambda: node.add(node.web(), *map(mapping, (30080, 8080, 9090))), load, is_first)
    for asking in (node.client, neighbour, node):
        reached(asking, NODE4, 30080, by="service")
        reached(asking, BALANCER, 8080, by="service")
        for address, port in ((NODE4, 8080), (NODE4, 9090), (BALANCER, 9090), (NODE6, 30080)):
            reached(asking, address, port)


@case(SERVICE)
def service_by_nftables_first(node: Bench) -> None:
    """A Service's NodePort and load balancer's address stay the Service's, with rules in nftables made before ADD."""
    beside_a_service(node, "nftables", is_first=True)


@case(SERVICE)
def service_by_nftables_later(node: Bench) -> None:
    """A Service's NodePort and load balancer's address are the Service's, with rules in nftables made after ADD."""
    beside_a_service(node, "nftables", is_first=False)


@case(SERVICE)
def service_by_iptables_first(node: Bench) -> None:
    """A Service's NodePort and load balancer's address stay the Service's, with rules in iptables made before ADD."""
    beside_a_service(node, "iptables", is_first=True)


@case(SERVICE)
def service_by_iptables_later(node: Bench) -> None:
    """A Service's NodePort and load balancer's address are the Service's, with rules in iptables made after ADD."""
    beside_a_service(node, "iptables", is_first=False)


def other_runtime(node: Bench) -> Pod:
    node.bridge("bridge1", "172.17.0.1/16")
    other = node.pod(addresses=[f"{PUBLISHED}/16"], gateways=["172.17.0.1"], bridge="bridge1")
    other.serve("tcp", 80, "other")
    return other


def beside_a_published_port(node: Bench, program: str, rules: str, *, is_first: bool) -> None:
    """Have a container of another runtime and a host port of its number, its rules before or after ADD."""
    other_runtime(node)
    neighbour = node.pod()
    in_order(
        lambda: node.add(node.web(), mapping(8080), mapping(9090)),
        lambda: node.run(*program.split(), input=rules),
        is_first,
    )
    for asking in (node.client, neighbour, node):
        reached(asking, NODE4, 8080, by="other")
        reached(asking, NODE4, 9090)


@case(RUNTIME)
def docker_first(node: Bench) -> None:
    """A port that docker published before ADD stays docker's."""
    beside_a_published_port(node, "iptables-restore -n", DOCKER, is_first=True)


@case(RUNTIME)
def docker_later(node: Bench) -> None:
    """A port that docker published after ADD is docker's."""
    beside_a_published_port(node, "iptables-restore -n", DOCKER, is_first=False)


@case(RUNTIME)
def netavark_first(node: Bench) -> None:
    """A port that netavark published in nftables before ADD stays netavark's."""
    beside_a_published_port(node, "nft -f -", NETAVARK_NFTABLES, is_first=True)


@case(RUNTIME)
def netavark_later(node: Bench) -> None:
    """A port that netavark published in nftables after ADD is netavark's."""
    beside_a_published_port(node, "nft -f -", NETAVARK_NFTABLES, is_first=False)
