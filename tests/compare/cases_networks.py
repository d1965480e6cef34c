"""Addresses and networks that a host port shares with others: Services under IPVS, subnets, a container's networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compare.cases import case
from compare.cases_packets import set_bridge_nf
from compare.expect import fall_short, reached, silent, succeeded
from kernel.test_localnet_guard import other_loopback
from kernel.test_masquerade import own_veth
from lab import BRIDGE4, CLIENT4, NODE4, NODE6, config, mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compare.plugins import Bench
    from lab import Outcome, Pod

CLUSTER_IP = "10.96.0.1"
PODMAN = "'podman network disconnect' takes a container off one of its networks, and leaves it running"
ADMITTED = "the API server admits such a pod"


@case("with kube-proxy in IPVS mode a pod with host port 443 cuts all pods off from the API server")
def cluster_ip(node: Bench) -> None:
    """A ClusterIP on kube-ipvs0 stays a Service's, for other pods, the node and clients outside."""
    node.ip("link add kube-ipvs0 type bridge", f"addr add {CLUSTER_IP}/32 dev kube-ipvs0")
    node.client.ip(f"route add {CLUSTER_IP}/32 via {NODE4}")
    node.serve("tcp", 443, "service", CLUSTER_IP)
    node.add(node.web(), mapping(443))
    for asking in (node.pod(), node.client, node):
        reached(asking, CLUSTER_IP, 443, by="service")
    reached(node.client, NODE4, 443)


@case("an address range can be extended by a second one, and pods of both are on one bridge")
def two_subnets(node: Bench) -> None:
    """Neighbours in both subnets of a pod with two addresses are answered, with bridge-nf-call-iptables 0."""
    set_bridge_nf(node, 0)
    node.ip("addr add 10.99.0.1/24 dev cni0")
    pod = node.web(addresses=["10.88.0.77/24", "10.99.0.77/24"], gateways=[BRIDGE4])
    node.add(pod, mapping(8080))
    for neighbour in (node.pod(4), node.pod(addresses=["10.99.0.5/24"], gateways=["10.99.0.1"])):
        reached(neighbour, NODE4)


@case("a pod behind a veth of its own has no neighbours on the link, and its logs should tell who called")
def neighbour_behind_a_veth(node: Bench) -> None:
    """Where a host route leads to the pod, another pod of the subnet is seen with its own address."""
    pod, neighbour = own_veth(node, 2), own_veth(node, 3)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    reached(neighbour, NODE4, seen_as="10.97.0.3")
    reached(pod, NODE4)


@case("WSL2 has a second loopback interface, and management VRFs have addresses of 127.0.0.0/8")
def another_loopback(node: Bench) -> None:
    """What another program lets through to 127.0.0.1 on an interface of its own goes on."""
    with other_loopback(node) as beside:
        node.serve("tcp", 9000, "theirs", "127.0.0.1")
        pod = node.web()
        node.add(pod, mapping(8080))
        reached(beside, "127.0.0.1", 9000, by="theirs")
        node.delete(pod)
        reached(beside, "127.0.0.1", 9000, by="theirs")


def second_network(node: Bench, pod: Pod) -> dict[str, Any]:
    """Put a pod on a second network, and return what its configuration has there."""
    node.bridge("cni1", "10.89.0.1/24")
    node.ip(f"link add second type veth peer name eth1 netns {pod.name}", "link set second master cni1")
    node.ip("link set second up")
    pod.ip("addr add 10.89.0.9/24 dev eth1", "link set eth1 up")
    return {"name": "second", "prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.89.0.9/24"}]}}


def call(node: Bench, command: str, pod: Pod, keys: dict[str, Any]) -> Outcome:
    return node.cni(command, pod, config(pod, mapping(8080), **keys), IFNAME="eth1" if keys else "eth0")


@case(PODMAN)
def second_network_outlives_the_first(node: Bench) -> None:
    """A container on two networks keeps its port when the first of them goes."""
    pod = node.web(4)
    second = second_network(node, pod)
    for keys in ({}, second):
        succeeded(call(node, "ADD", pod, keys), "ADD")
    reached(node.client, NODE4)
    succeeded(call(node, "DEL", pod, {}), "DEL")
    reached(node.client, NODE4)
    succeeded(call(node, "DEL", pod, second), "the second DEL")
    silent(node.client, NODE4)


@case(PODMAN)
def check_of_two_networks(node: Bench) -> None:
    """CHECK of a container on two networks passes for both, and for the second when the first is gone."""
    pod = node.web(4)
    second = second_network(node, pod)
    for keys in ({}, second):
        succeeded(call(node, "ADD", pod, keys), "ADD")
    for keys in ({}, second):
        succeeded(call(node, "CHECK", pod, keys), "CHECK")
    succeeded(call(node, "DEL", pod, {}), "DEL")
    succeeded(call(node, "CHECK", pod, second), "CHECK of the second")
    node.nft("flush ruleset")
    if not call(node, "CHECK", pod, second).status:
        fall_short("CHECK succeeds without any rules")


def both(mappings: Sequence[dict[str, Any]], node: Bench) -> None:
    pod = node.web()
    node.add(pod, *mappings)
    reached(node.client, NODE4, by="web-81", seen_as=CLIENT4)
    reached(node.client, NODE6, by="web")


@case(ADMITTED)
def all_addresses_of_ipv4(node: Bench) -> None:
    """A port with hostIP 0.0.0.0 and the same without hostIP: IPv4 goes to the one, IPv6 to the other."""
    both([mapping(8080), mapping(8080, 81, hostIP="0.0.0.0")], node)


@case(ADMITTED)
def all_addresses_of_ipv4_first(node: Bench) -> None:
    """The same, the one with hostIP 0.0.0.0 first."""
    both([mapping(8080, 81, hostIP="0.0.0.0"), mapping(8080)], node)
