"""From where a connection is looked at: a client's address, and how its packets come in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from socket import AF_INET, AF_INET6, if_indextoname
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni_hostport.operate.mappings import PortMapping

Address = IPv4Address | IPv6Address

FAMILIES = {4: AF_INET, 6: AF_INET6}
RTN_LOCAL = 2  # linux/rtnetlink.h
RT_SCOPE_UNIVERSE = 0
# addresses that no host has (RFC 5737, RFC 3849), to ask for the way to all others
ANYBODY: dict[int, Address] = {4: IPv4Address("203.0.113.1"), 6: IPv6Address("2001:db8:ffff::1")}
LOOPBACK = IPv4Address("127.0.0.1")


@dataclass(frozen=True)
class Client:
    """Who connects to which address of the node; its packets come in on an interface, or, if empty, from the node."""

    source: Address
    destination: Address
    interface: str

    def __str__(self) -> str:
        """Name it as a sentence does."""
        return str(self.source) if self.interface else f"the node itself ({self.source})"


def choose(mapping: PortMapping, source: Address | None) -> Client:
    """Return a client of a mapping: one with this address, or else one from outside of the node if there can be any.

    Raises ``OSError`` if there is no way to and from such a client.
    """
    given = None if mapping.host_ip.is_unspecified else mapping.host_ip
    if source is None and given is not None and given.is_loopback:
        source = LOOPBACK
    with IPRoute() as route:
        own = {index: addresses for index, addresses in _addresses(route, mapping.version) if addresses}
        if source is None:
            return _somebody(route, own, mapping, given)
        found = _route(route, source)
        if found["type"] == RTN_LOCAL:
            return Client(source, given or source, "")
        return Client(source, given or _destination(found, own), if_indextoname(found.get_attr("RTA_OIF")))


def _somebody(
    route: IPRoute, own: dict[int, list[IPv4Interface | IPv6Interface]], mapping: PortMapping, given: Address | None
) -> Client:
    """Return a client beyond the default route, or else one on a link of the node's that is not the pod's."""
    anybody = ANYBODY[mapping.version]
    try:
        found = _route(route, anybody)
        return Client(anybody, given or _destination(found, own), if_indextoname(found.get_attr("RTA_OIF")))
    except OSError:
        pass
    for index, addresses in own.items():
        for address in addresses:
            if mapping.pod_ip not in address.network:
                neighbour = next(of for of in address.network.hosts() if of != address.ip)
                return Client(neighbour, given or address.ip, if_indextoname(index))
    own_address = next((address.ip for addresses in own.values() for address in addresses), LOOPBACK)
    return Client(own_address, given or own_address, "")


def _addresses(route: IPRoute, version: int) -> Iterable[tuple[int, list[IPv4Interface | IPv6Interface]]]:
    found: dict[int, list[IPv4Interface | IPv6Interface]] = {}
    for message in route.get_addr(family=FAMILIES[version]):
        if message["scope"] == RT_SCOPE_UNIVERSE:
            address = ip_interface(f"{message.get('local') or message.get('address')}/{message['prefixlen']}")
            found.setdefault(message["index"], []).append(address)
    return found.items()


def _route(route: IPRoute, to: Address) -> Any:
    try:
        return next(iter(route.route("get", dst=str(to), family=FAMILIES[to.version])))
    except NetlinkError as error:
        raise OSError(error.code, f"no way back to {to}: {os.strerror(error.code)}") from error


def _destination(found: Any, own: dict[int, list[IPv4Interface | IPv6Interface]]) -> Address:
    """Return the node's address that a client on the other side of a route knows."""
    preferred = found.get_attr("RTA_PREFSRC")
    if preferred:
        return ip_address(preferred)
    here = [address.ip for address in own.get(found.get_attr("RTA_OIF"), [])]
    return (here or [address.ip for addresses in own.values() for address in addresses])[0]
