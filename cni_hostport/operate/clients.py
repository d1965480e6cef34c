"""From where a connection is looked at: a client's address, and how its packets come in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from errno import EADDRNOTAVAIL
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from socket import if_indextoname
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute

from cni_hostport.operate import routing

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cni_hostport.operate.mappings import PortMapping

Address = IPv4Address | IPv6Address
Addresses = dict[int, list[IPv4Interface | IPv6Interface]]  # of the node, by interface

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
    made_up: bool = False

    def __str__(self) -> str:
        """Name it as a sentence does."""
        if not self.interface:
            return f"the node itself ({self.source})"
        return f"a client such as {self.source}" if self.made_up else str(self.source)


def choose(mapping: PortMapping, source: Address | None, taken: Collection[Address]) -> Client:
    """Return a client of a mapping: one with this address, or else one from outside of the node if there can be any.

    It connects to an address that is not ``taken`` by another mapping, if there is any. Raises ``OSError`` if there is
    no way to and from such a client.
    """
    given = None if mapping.host_ip.is_unspecified else mapping.host_ip
    if source is None and given is not None and given.is_loopback:
        source = LOOPBACK
    with IPRoute() as route:
        own = _addresses(route, mapping.version)
    if source is None:
        return _somebody(own, mapping, given, taken)
    found = _route(source)
    if found["type"] == routing.RTN_LOCAL:
        return Client(source, given or _free([source, *_all(own)], taken), "")
    return Client(source, given or _destination(found, own, taken), if_indextoname(found.get_attr("RTA_OIF")))


def _somebody(own: Addresses, mapping: PortMapping, given: Address | None, taken: Collection[Address]) -> Client:
    """Return a client beyond the default route, or else one on a link of the node's that is not the pod's."""
    anybody = ANYBODY[mapping.version]
    with suppress(OSError):
        found = _route(anybody)
        interface = if_indextoname(found.get_attr("RTA_OIF"))
        return Client(anybody, given or _destination(found, own, taken), interface, made_up=True)
    for index, addresses in own.items():
        for address in addresses:
            neighbour = next((of for of in address.network.hosts() if of != address.ip), None)
            if neighbour and (mapping.pod_ip is None or mapping.pod_ip not in address.network):
                destination = given or _free([address.ip, *_all(own)], taken)
                return Client(neighbour, destination, if_indextoname(index), made_up=True)
    itself = _free([*_all(own), *([LOOPBACK] if mapping.version == LOOPBACK.version else [])], taken)
    return Client(itself, given or itself, "")


def _addresses(route: IPRoute, version: int) -> Addresses:
    found: Addresses = {}
    for message in route.get_addr(family=routing.FAMILIES[version]):
        if message["scope"] == RT_SCOPE_UNIVERSE:
            address = ip_interface(f"{message.get('local') or message.get('address')}/{message['prefixlen']}")
            found.setdefault(message["index"], []).append(address)
    return found


def _all(own: Addresses) -> list[Address]:
    return [address.ip for addresses in own.values() for address in addresses]


def _free(addresses: Sequence[Address], taken: Collection[Address]) -> Address:
    """Return the first address that is not taken, or if all of them are, the first."""
    if not addresses:
        raise OSError(EADDRNOTAVAIL, "the node has no address of this IP version to connect to")
    return next((address for address in addresses if address not in taken), addresses[0])


def _route(to: Address) -> Any:
    try:
        return routing.to(to)
    except OSError as error:
        raise OSError(error.errno, f"no way back to {to}: {error.strerror}") from error


def _destination(found: Any, own: Addresses, taken: Collection[Address]) -> Address:
    """Return the node's address that a client on the other side of a route knows."""
    preferred = found.get_attr("RTA_PREFSRC")
    here = [address.ip for address in own.get(found.get_attr("RTA_OIF"), [])]
    return _free([*([ip_address(preferred)] if preferred else []), *here, *_all(own)], taken)
