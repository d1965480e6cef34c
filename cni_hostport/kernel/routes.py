"""The addresses of a pod, and how the node routes them."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EACCES, EHOSTUNREACH, EINVAL, ENETUNREACH
from struct import Struct
from sys import byteorder

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import interfaces, netns
from cni_hostport.netlink import ADDRESS_FAMILIES, NETLINK_ROUTE, Netlink, attribute, attributes
from cni_hostport.ruleset.plan import PodRoute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

RTM_GETROUTE, RTA_DST, RTA_OIF = 26, 1, 4  # linux/rtnetlink.h
RTM_F_FIB_MATCH = 0x2000  # linux/rtnetlink.h: answer with the route that matches, and its prefix length
RTN_LOCAL = 2  # linux/rtnetlink.h
# kinds of interfaces behind which there is one pod, if they have a host route; others, such as a macvlan, have
# neighbours on the link
KINDS_OF_ONE_POD = ("veth", "netkit", "tun")
# struct rtmsg (linux/rtnetlink.h): family, destination's and source's prefix length, tos, table, protocol, scope, type,
# flags
RTMSG = Struct("=BBBBBBBBL")
# no route, and what routes of the types unreachable, prohibit and blackhole say (net/ipv4/fib_semantics.c, fib_props)
UNROUTED = {ENETUNREACH, EHOSTUNREACH, EACCES, EINVAL}


def pod_addresses(path: str, ifname: str) -> list[IPv4Interface | IPv6Interface]:
    """Return the global addresses of a pod's interface, in the kernel's order; none if it has none.

    Raises ``CNIError`` with ``HOST_SETTING`` if the namespace cannot be entered.
    """
    from cni_hostport.kernel import addresses  # most often, the result of the plugin before tells them

    try:
        with netns.inside(path), Netlink(NETLINK_ROUTE) as netlink:
            index = interfaces.index(ifname)
            found = addresses.listed(netlink, index) if index else []
            return [address.ip for address in found if address.is_global]
    except (OSError, ValueError) as error:
        raise CNIError(
            Code.HOST_SETTING, f"cannot read the addresses of {ifname} in CNI_NETNS {path!r}: {error}"
        ) from error


class Route:
    """How the kernel routes an address: the index of the interface, the prefix length of the route, and its type."""

    __slots__ = ("interface", "prefix_length", "type")

    def __init__(self, interface: int, prefix_length: int, kind: int) -> None:
        """Take the numbers that the kernel has; the type is one of ``RTN_LOCAL`` and others of linux/rtnetlink.h."""
        self.interface = interface
        self.prefix_length = prefix_length
        self.type = kind


class NoRouteError(OSError):
    """The kernel has no route to an address."""


def route_to(address: IPv4Address | IPv6Address) -> Route:
    """Return the route to an address from this thread's network namespace.

    Raises ``NoRouteError`` where there is none, another ``OSError`` where the kernel cannot be asked. This is asked on
    every ADD, in less time than pyroute2 takes to import.
    """
    question = RTMSG.pack(ADDRESS_FAMILIES[address.version], address.max_prefixlen, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)
    with Netlink(NETLINK_ROUTE) as netlink:
        [(error, answers)] = netlink.ask([(RTM_GETROUTE, 0, question + attribute(RTA_DST, address.packed))])
    if error in UNROUTED:
        raise NoRouteError(error, os.strerror(error))
    if error:
        raise OSError(error, os.strerror(error))
    _, prefix_length, _, _, _, _, _, kind, _ = RTMSG.unpack_from(answers[0])
    index = dict(attributes(answers[0][RTMSG.size :])).get(RTA_OIF, b"")
    return Route(int.from_bytes(index, byteorder), prefix_length, kind)


def is_local(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether the node takes an address for its own, as it does all of 127.0.0.0/8 and what has a local route.

    0.0.0.0 is the node itself to the kernel, though no local route matches it. Raises ``OSError`` if the kernel cannot
    be asked.
    """
    if address.version == 4 and address.is_unspecified:  # noqa: PLR2004 - IP version
        return True
    try:
        return route_to(address).type == RTN_LOCAL
    except NoRouteError:
        return False


def pod_routes(addresses: Sequence[IPv4Interface | IPv6Interface]) -> dict[IPv4Address | IPv6Address, PodRoute]:
    """Return how the node reaches the first address of each family, if by another route than the default one.

    Raises ``OSError`` if the kernel cannot be asked.
    """
    routes = {}
    for address in {address.version: address.ip for address in reversed(addresses)}.values():
        with suppress(NoRouteError):
            route = route_to(address)
            if route.prefix_length and route.type != RTN_LOCAL:
                is_host_route = route.prefix_length == address.max_prefixlen
                routes[address] = PodRoute(
                    route.interface, is_host_route and interfaces.kind(route.interface) in KINDS_OF_ONE_POD
                )
    return routes
