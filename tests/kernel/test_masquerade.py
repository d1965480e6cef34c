from __future__ import annotations

import errno
import socket

import pytest
from lab import BRIDGE4, NODE4, NODE6, Node, Pod, config, mapping

TWO = ["10.88.0.77/24", "10.99.0.77/24"]


@pytest.mark.parametrize("nf_call", [0, 1])
def test_neighbours_in_every_subnet_of_the_interface_are_answered(node: Node, nf_call: int) -> None:
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", nf_call)
    node.ip("addr add 10.99.0.1/24 dev cni0")
    pod = node.pod(addresses=TWO, gateways=[BRIDGE4])
    neighbours = [node.pod(4), node.pod(addresses=["10.99.0.5/24"], gateways=["10.99.0.1"])]
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    for neighbour in neighbours:
        assert neighbour.ask("tcp", NODE4, 8080).startswith("web ")
    assert not node.cni("CHECK", pod, config(pod, mapping(8080))).status


def own_veth(node: Node, number: int) -> Pod:
    """Add a pod as ptp, kindnet, Calico and AWS do: a veth of its own, a host route, and no neighbours on the link."""
    pod = node.pod(4)
    address = f"10.97.0.{number}"
    node.ip(f"link set {pod.host_end} nomaster", f"addr add 169.254.7.1/32 dev {pod.host_end}")
    pod.ip(
        "addr flush dev eth0 scope global",
        f"addr add {address}/32 dev eth0",
        "route add 169.254.7.1 dev eth0",
        "route add default via 169.254.7.1",
    )
    node.ip(f"route add {address}/32 dev {pod.host_end}")
    pod.addresses = [f"{address}/24"]
    return pod


def test_behind_a_veth_of_its_own_a_neighbour_keeps_its_address(node: Node) -> None:
    pod, neighbour = own_veth(node, 2), own_veth(node, 3)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    assert neighbour.ask("tcp", NODE4, 8080) == "web 10.97.0.3"
    assert pod.ask("tcp", NODE4, 8080).startswith("web ")
    assert node.ask("tcp", "127.0.0.1", 8080).startswith("web ")
    assert node.client.ask("tcp", NODE4, 8080).startswith("web ")
    assert "ip saddr 10.97.0.2 masquerade" in node.ruleset()
    assert not node.cni("CHECK", pod, config(pod, mapping(8080))).status


def test_a_host_route_to_a_shared_link_has_neighbours(node: Node) -> None:
    node.ip(
        "link add shim link uplink type macvlan mode bridge", "link set shim up", "route add 192.0.2.50/32 dev shim"
    )
    pod = node.pod(4)
    result = {"cniVersion": "1.1.0", "ips": [{"address": "192.0.2.50/24"}]}
    node.add(pod, mapping(8080), prevResult=result)
    assert "ip saddr 192.0.2.0/24 masquerade" in node.ruleset()


def test_an_address_that_is_local_on_the_node_closes_nothing_on_its_loopback(node: Node) -> None:
    node.ip("route add local 10.99.1.0/24 dev lo")
    node.serve("tcp", 9000, "own", "127.0.0.1")
    pod = node.pod(4)
    node.add(pod, mapping(8080), prevResult={"cniVersion": "1.1.0", "ips": [{"address": "10.99.1.5/24"}]})
    assert node.ask("tcp", "127.0.0.1", 9000).startswith("own ")


def test_a_host_route_to_a_bridge_has_neighbours(node: Node) -> None:
    node.ip("route add 10.88.0.60/32 dev cni0")
    pod = node.pod(addresses=["10.88.0.60/24"], gateways=[BRIDGE4])
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    assert node.pod(4).ask("tcp", NODE4, 8080).startswith("web ")
    assert "ip saddr 10.88.0.0/24 masquerade" in node.ruleset()


@pytest.mark.parametrize("way", ["neighbour", "pod", "node", "outside"])
def test_a_link_local_address_is_refused_at_once_or_goes_to_who_listens_there(node: Node, way: str) -> None:
    node.set_sysctl("net/bridge/bridge-nf-call-ip6tables", 0)
    pod, neighbour = node.pod(), node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    asking = {"neighbour": neighbour, "pod": pod, "node": node, "outside": node.client}[way]
    inside = "uplink" if way == "outside" else "cni0"
    outside = {"node": "cni0", "outside": "uplink"}.get(way, "eth0")
    for namespace, interface, address in ((node, inside, "fe80::1"), (asking, outside, "fe80::2")):
        namespace.ip(f"addr add {address}/64 dev {interface} nodad")
    with asking.inside():
        scope = socket.if_nametoindex(outside)
    with asking.socket("tcp", "::1") as refused:
        refused.settimeout(3)
        assert refused.connect_ex(("fe80::1", 8080, 0, scope)) == errno.ECONNREFUSED
    node.serve("tcp", 8080, "node", "::")
    with asking.socket("tcp", "::1") as heard:
        heard.settimeout(3)
        heard.connect(("fe80::1", 8080, 0, scope))
        assert heard.recv(64).decode().startswith("node ")
    assert asking.ask("tcp", NODE6, 8080).startswith("web ")
