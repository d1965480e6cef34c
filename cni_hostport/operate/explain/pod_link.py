"""How a pod is linked to its node: the interface on which its answers come in there, or where they go instead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from struct import Struct
from sys import byteorder
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute

from cni_hostport.kernel import namespaces, netns
from cni_hostport.netlink import NETLINK_ROUTE, Netlink, attribute, attributes
from cni_hostport.operate import sysctls
from cni_hostport.operate.explain import routing

if TYPE_CHECKING:
    from cni_hostport.operate.explain.packet import IPAddress
    from cni_hostport.operate.mappings import PortMapping

RTM_GETNSID, NETNSA_NSID, NETNSA_FD = 90, 1, 3  # linux/rtnetlink.h, linux/net_namespace.h
RTGENMSG = Struct("=B3x")
# what comes from one of these does not reach the interface that it is on, nor the other way round
# (Documentation/networking/ipvlan.rst; drivers/net/macvlan.c)
STACKED_KINDS = {"macvlan", "macvtap", "ipvlan", "ipvtap"}


@dataclass(frozen=True)
class Arrival:
    """Where the node gets what a pod sends: the device that takes it, and the interface that rules see.

    ``macs`` are the destination and the source of its Ethernet frames, where the device is a port of a bridge.
    """

    device: str
    interface: str
    macs: tuple[bytes, bytes] | None = None


@dataclass(frozen=True)
class Bypass:
    """Why the node does not get what a pod sends, or why that cannot be followed on the node.

    There are three cases. With ``hop`` alone, that neighbour gets it instead of the node. With ``hop`` and ``kind``,
    the pod's interface is one of that kind on the node's interface ``parent``, and the kernel lets nothing pass between
    the two. Without ``hop``, the node's end of the pod's link is a port of ``parent``, which is an interface of that
    ``kind``: what the pod sends comes to the node, but not as a packet for it.
    """

    hop: IPAddress | None = None
    kind: str = ""
    parent: str = ""


def arrival(mapping: PortMapping, destination: IPAddress, interface: str) -> Arrival | Bypass:
    """Return where a pod's answers to ``destination`` come in on the node.

    ``interface`` is the one by which the node reaches the pod. Raises ``OSError`` if the pod has no route to the
    destination, or if its network namespace cannot be looked at.
    """
    node_netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with netns.inside(mapping.netns):
            route = routing.route(destination, mapping.pod_ip)
            with IPRoute() as netlink:
                [pod_interface] = netlink.get_links(route.get_attr("RTA_OIF"))
            is_linked_to_node = pod_interface.get_attr("IFLA_LINK_NETNSID") == _namespace_id(node_netns)
    finally:
        os.close(node_netns)
    with IPRoute() as netlink:
        node_interfaces = {link["index"]: link for link in netlink.get_links()}
    hop = _next_hop(route) or destination
    indexes = (address.interface for address in namespaces.addresses() if address.ip.ip == hop)
    hop_interface = next(map(node_interfaces.get, indexes), None)
    node_end = node_interfaces.get(pod_interface.get_attr("IFLA_LINK") or 0) if is_linked_to_node else None
    if node_end is not None and kind(pod_interface) == "veth":
        master = node_interfaces.get(node_end.get_attr("IFLA_MASTER") or 0)
        return _veth_arrival(pod_interface, node_end, master, hop_interface, mapping.version) or Bypass(hop)
    if node_end is not None and kind(pod_interface) in STACKED_KINDS and interface == _name(node_end):
        return Bypass(hop, kind(pod_interface), interface)
    return Bypass(hop) if hop_interface is None else Arrival(_name(hop_interface), _name(hop_interface))


def _veth_arrival(
    pod_end: Any, node_end: Any, master: Any, hop_interface: Any, version: int
) -> Arrival | Bypass | None:
    """Return where the node gets what comes out of a veth's end there, directly or through a bridge.

    ``hop_interface`` is the node's interface with the address of the next hop, ``None`` if the next hop is not the
    node. The result is ``None`` where the bridge passes it on to another port.
    """
    if master is None or kind(master) == "vrf":
        return Arrival(_name(node_end), _name(node_end))
    if kind(master) != "bridge":
        return Bypass(kind=kind(master), parent=_name(master))
    if hop_interface is None:
        # the kernel then translates what goes from one port of a bridge to another, too (br_netfilter)
        is_called = sysctls.value(sysctls.BRIDGE_CALLS[version])
        return Bypass(kind="bridge", parent=_name(master)) if is_called else None
    gateway = hop_interface if any(_mac(hop_interface)) else master  # lo has none
    return Arrival(_name(node_end), _name(master), (_mac(gateway), _mac(pod_end)))


def _next_hop(route: Any) -> IPAddress | None:
    via = route.get_attr("RTA_VIA")  # a gateway of the other IP version
    gateway = route.get_attr("RTA_GATEWAY") or (via and via["addr"])
    return ip_address(gateway) if gateway else None


def _namespace_id(descriptor: int) -> int | None:
    """Return the number that this network namespace has for an open one, ``None`` if it has none."""
    question = RTGENMSG.pack(0) + attribute(NETNSA_FD, descriptor.to_bytes(4, byteorder))
    [(error, answers)] = Netlink(NETLINK_ROUTE).ask([(RTM_GETNSID, 0, question)])
    number = b"" if error else dict(attributes(answers[0][RTGENMSG.size :])).get(NETNSA_NSID, b"")
    return int.from_bytes(number, byteorder, signed=True) if number else None


def kind(link: Any) -> str:
    """Return the kind of an interface from pyroute2's message about it, such as ``veth``; empty if it has none."""
    return link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""


def _name(link: Any) -> str:
    return str(link.get_attr("IFLA_IFNAME"))


def _mac(link: Any) -> bytes:
    return bytes.fromhex((link.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
