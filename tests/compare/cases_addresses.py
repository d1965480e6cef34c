"""Mappings on given addresses of the node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.cases_packets import OTHER4, OTHER6, another_interface
from compare.expect import reached, silent
from lab import NODE4, NODE6, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench

SPECIFIC = "sockets have always worked so: a bind to one address beats a bind to all, whichever was first"


@case()
def given_ipv4(node: Bench) -> None:
    """A port on an IPv4 address answers there and nowhere else."""
    another_interface(node)
    node.add(node.web(), mapping(8080, hostIP=NODE4))
    reached(node.client, NODE4)
    for address in (OTHER4, NODE6):
        silent(node.client, address)


@case()
def given_ipv6(node: Bench) -> None:
    """A port on an IPv6 address answers there and nowhere else."""
    another_interface(node)
    node.add(node.web(), mapping(8080, hostIP=NODE6))
    reached(node.client, NODE6)
    for address in (OTHER6, NODE4):
        silent(node.client, address)


@case()
def spelling(node: Bench) -> None:
    """An IPv6 address is the same in another spelling."""
    pod = node.web()
    node.add(pod, mapping(8080, hostIP="2001:0DB8:0::0001"))
    reached(node.client, NODE6)
    node.delete(pod)
    silent(node.client, NODE6)


@case()
def any_ipv4(node: Bench) -> None:
    """A port on 0.0.0.0 answers on every IPv4 address, and no IPv6 one."""
    another_interface(node)
    node.add(node.web(), mapping(8080, hostIP="0.0.0.0"))
    for address in (NODE4, OTHER4):
        reached(node.client, address)
    silent(node.client, NODE6)


@case()
def any_ipv6(node: Bench) -> None:
    """A port on :: answers on every IPv6 address, and no IPv4 one."""
    another_interface(node)
    node.add(node.web(), mapping(8080, hostIP="::"))
    for address in (NODE6, OTHER6):
        reached(node.client, address)
    silent(node.client, NODE4)


@case()
def family_the_pod_lacks(node: Bench) -> None:
    """A port on an address of a family that the pod lacks fails nothing."""
    pod = node.web(4)
    node.add(pod, mapping(8080, hostIP=NODE6), mapping(8081))
    silent(node.client, NODE6)
    silent(node.client, NODE4)
    reached(node.client, NODE4, 8081)
    node.delete(pod)


@case()
def loopback_address(node: Bench) -> None:
    """A port on 127.0.0.1 answers there and nowhere else."""
    node.add(node.web(), mapping(8080, hostIP="127.0.0.1"))
    reached(node, "127.0.0.1")
    silent(node, "127.0.0.2")
    silent(node.client, NODE4)


@case()
def two_pods_on_loopback(node: Bench) -> None:
    """Two pods have one port on 127.0.0.1 and 127.0.0.2."""
    addresses = ("127.0.0.1", "127.0.0.2")
    for address in addresses:
        node.add(node.web(name=address), mapping(8080, hostIP=address))
    for address in addresses:
        reached(node, address, by=address)


@case()
def two_pods_on_two_addresses(node: Bench) -> None:
    """Two pods have one port on two addresses of the node, and the DEL of one leaves the other."""
    another_interface(node)
    item, two = node.web(name="one"), node.web(name="two")
    for pod, address in ((item, NODE4), (two, OTHER4)):
        node.add(pod, mapping(8080, hostIP=address))
    reached(node.client, NODE4, by="one")
    reached(node.client, OTHER4, by="two")
    node.delete(item)
    silent(node.client, NODE4)
    reached(node.client, OTHER4, by="two")


@case()
def two_addresses_of_one_pod(node: Bench) -> None:
    """One port of a pod leads to two container ports by the address."""
    another_interface(node)
    node.add(node.web(), mapping(8080, 80, hostIP=NODE4), mapping(8080, 81, hostIP=OTHER4))
    reached(node.client, NODE4)
    reached(node.client, OTHER4, by="web-81")


def specific_and_general(node: Bench, *order: str) -> None:
    another_interface(node)
    pods = {name: node.web(name=name) for name in order}
    for name in order:
        node.add(pods[name], mapping(8080, hostIP=NODE4 if name == "specific" else ""))
    reached(node.client, NODE4, by="specific")
    reached(node.client, OTHER4, by="general")
    node.delete(pods["specific"])
    reached(node.client, NODE4, by="general")


@case(SPECIFIC)
def specific_first(node: Bench) -> None:
    """A given address beats every address, when it was first."""
    specific_and_general(node, "specific", "general")


@case(SPECIFIC)
def general_first(node: Bench) -> None:
    """A given address beats every address, when it came second."""
    specific_and_general(node, "general", "specific")
