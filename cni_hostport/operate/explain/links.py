"""How a pod is linked to its node: where its answers come in there, if they do."""

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
from cni_hostport.operate.explain import routing

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.operate.mappings import PortMapping

    Address = IPv4Address | IPv6Address

RTM_GETNSID, NETNSA_NSID, NETNSA_FD = 90, 1, 3  # linux/rtnetlink.h, linux/net_namespace.h
RTGENMSG = Struct("=B3x")
# what comes from one of these does not reach the interface that it is on, nor the other way round
# (Documentation/networking/ipvlan.rst; drivers/net/macvlan.c)
STACKED = {"macvlan", "macvtap", "ipvlan", "ipvtap"}


@dataclass(frozen=True)
class Arrival:
    """Where what a pod sends comes in: the device that takes it, and the interface that rules see.

    ``macs`` are what its frames go to and come from, where the device is a port of a bridge.
    """

    device: str
    interface: str
    macs: tuple[bytes, bytes] | None = None


@dataclass(frozen=True)
class Passing:
    """Why what a pod sends does not come to its node, or cannot be followed there.

    ``hop`` is who gets it instead. With ``kind`` the pod's interface is one of that kind on ``parent``, an interface of
    the node, and the kernel lets nothing pass between the two. Without ``hop``, its other end is in ``parent``, which
    is of that ``kind``: it comes to the node, but not as a packet for it.
    """

    hop: Address | None = None
    kind: str = ""
    parent: str = ""


def home(of: PortMapping, to: Address, by: str) -> Arrival | Passing:
    """Return how a pod's answers to an address come to the node, which reaches the pod by an interface.

    Raises ``OSError`` if the pod has no route to it, or if its network namespace cannot be looked at.
    """
    node = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with netns.inside(of.netns):
            route = routing.to(to, of.pod_ip)
            with IPRoute() as own:
                [link] = own.get_links(route.get_attr("RTA_OIF"))
            is_of_node = link.get_attr("IFLA_LINK_NETNSID") == _number(node)
    finally:
        os.close(node)
    with IPRoute() as here:
        links = {message["index"]: message for message in here.get_links()}
    hop = _hop(route) or to
    holder = next((links.get(address.interface) for address in namespaces.addresses() if address.ip.ip == hop), None)
    below = links.get(link.get_attr("IFLA_LINK") or 0) if is_of_node else None
    if below is not None and _kind(link) == "veth":
        master = links.get(below.get_attr("IFLA_MASTER") or 0)
        return _from_peer(link, below, master, holder, of.version) or Passing(hop)
    if below is not None and _kind(link) in STACKED and by == _name(below):
        return Passing(hop, _kind(link), by)
    return Passing(hop) if holder is None else Arrival(_name(holder), _name(holder))


def _from_peer(link: Any, peer: Any, master: Any, holder: Any, version: int) -> Arrival | Passing | None:
    """Return how it comes to the node from the other end of a veth there, directly or through a bridge.

    ``holder`` is the node's interface that has the address of who gets it, ``None`` if none has; and the answer is
    ``None`` where the bridge then passes it on.
    """
    if master is None or _kind(master) == "vrf":
        return Arrival(_name(peer), _name(peer))
    if _kind(master) != "bridge":
        return Passing(kind=_kind(master), parent=_name(master))
    if holder is None:
        # the kernel then translates what goes from one port of a bridge to another, too (br_netfilter)
        is_called = routing.setting(f"net/bridge/{routing.CALLS[version]}")
        return Passing(kind="bridge", parent=_name(master)) if is_called else None
    gateway = holder if any(_mac(holder)) else master  # lo has none
    return Arrival(_name(peer), _name(master), (_mac(gateway), _mac(link)))


def _hop(route: Any) -> Address | None:
    via = route.get_attr("RTA_VIA")  # a gateway of the other IP version
    gateway = route.get_attr("RTA_GATEWAY") or (via and via["addr"])
    return ip_address(gateway) if gateway else None


def _number(namespace: int) -> int | None:
    """Return the number that this network namespace has for an open one, ``None`` if it has none."""
    asked = RTGENMSG.pack(0) + attribute(NETNSA_FD, namespace.to_bytes(4, byteorder))
    [(error, answers)] = Netlink(NETLINK_ROUTE).ask([(RTM_GETNSID, 0, asked)])
    number = b"" if error else dict(attributes(answers[0][RTGENMSG.size :])).get(NETNSA_NSID, b"")
    return int.from_bytes(number, byteorder, signed=True) if number else None


def _kind(link: Any) -> str:
    return link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""


def _name(link: Any) -> str:
    return str(link.get_attr("IFLA_IFNAME"))


def _mac(link: Any) -> bytes:
    return bytes.fromhex((link.get_attr("IFLA_ADDRESS") or "").replace(":", ""))
