"""From where a connection is looked at: a client's address, and how its packets come in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from errno import EADDRNOTAVAIL, ENODEV
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import interfaces, namespaces
from cni_hostport.kernel.routes import NoRouteError
from cni_hostport.operate.explain import routing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cni_hostport.operate.mappings import PortMapping

    Fits = Callable[[IPv4Address | IPv6Address], bool]

Address = IPv4Address | IPv6Address
Addresses = dict[int, list[IPv4Interface | IPv6Interface]]  # of the node, by interface

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


def choose(mapping: PortMapping, source: Address | None, to: Address | None, fits: Fits) -> Client:
    """Return a client of a mapping: one with this address, or else one from outside of the node if there can be any.

    It connects ``to`` an address, or to one that ``fits`` the mapping, if there is any. Its packets come
    in on the interface by which the node itself would answer from that address.
    Raises ``OSError`` if there is no way to and from such a client.
    """
    given = to or (None if mapping.host_ip.is_unspecified else mapping.host_ip)
    if source is None and given is not None and given.is_loopback:
        source = LOOPBACK if given.version == LOOPBACK.version else given
    if isinstance(given, IPv6Address) and given.is_link_local:
        return _on_link(source, given)
    own = _addresses(mapping.version)
    if source is None:
        return _somebody(own, mapping, given, fits)
    found = _route(source)
    if found["type"] == routing.RTN_LOCAL:
        return Client(source, given or _free([source, *_all(own)], fits), "")
    destination = given or _destination(found, own, fits)
    return Client(source, destination, _incoming(source, destination, found))


def beside(mapping: PortMapping, client: Client, fits: Fits) -> Iterator[Client]:
    """Yield clients like one that come in on other interfaces: those by which the node answers from other addresses."""
    if not client.made_up or not mapping.host_ip.is_unspecified:
        return
    seen = {client.interface}
    for index, addresses in _addresses(mapping.version).items():
        for address in addresses:
            with suppress(NoRouteError):
                way = routing.to(client.source, address.ip).get_attr("RTA_OIF")
                name = _interface(way)
                if name not in seen and way == index and fits(address.ip):
                    seen.add(name)
                    yield Client(client.source, address.ip, name, made_up=True)


def _somebody(own: Addresses, mapping: PortMapping, given: Address | None, fits: Fits) -> Client:
    """Return a client beyond the default route, or else one on a link of the node's that is not the pod's."""
    anybody = ANYBODY[mapping.version]
    with suppress(NoRouteError):
        found = _route(anybody)
        destination = given or _destination(found, own, fits)
        return Client(anybody, destination, _incoming(anybody, destination, found), made_up=True)
    for index, addresses in own.items():
        for address in addresses:
            neighbour = next((of for of in address.network.hosts() if of != address.ip), None)
            if neighbour and (mapping.pod_ip is None or mapping.pod_ip not in address.network):
                destination = given or _free([address.ip, *_all(own)], fits)
                return Client(neighbour, destination, _interface(index), made_up=True)
    itself = _free([*_all(own), *([LOOPBACK] if mapping.version == LOOPBACK.version else [])], fits)
    return Client(itself, given or itself, "")


def _on_link(source: Address | None, given: Address) -> Client:
    """Return a client on the link of one of the node's link-local addresses."""
    for address in namespaces.addresses():
        if address.ip.ip == given:
            neighbour = source or type(given)(int(given) ^ 2)
            return Client(neighbour, given, _interface(address.interface), made_up=source is None)
    raise OSError(EADDRNOTAVAIL, f"{given} is not an address of this node")


def _incoming(source: Address, destination: Address, found: Any) -> str:
    """Return the interface by which the node would answer from an address, and by the found route if it would not."""
    with suppress(NoRouteError):
        found = routing.to(source, destination)
    return _interface(found.get_attr("RTA_OIF"))


def _interface(index: int) -> str:
    name = interfaces.name(index)
    if not name:
        raise NoRouteError(ENODEV, "an interface has just gone")
    return name


def _addresses(version: int) -> Addresses:
    found: Addresses = {}
    for address in namespaces.addresses():
        if address.is_global and address.ip.version == version:
            found.setdefault(address.interface, []).append(address.ip)
    return found


def _all(own: Addresses) -> list[Address]:
    return [address.ip for addresses in own.values() for address in addresses]


def _free(addresses: Sequence[Address], fits: Fits) -> Address:
    """Return the first address that fits, or if none does, the first."""
    if not addresses:
        raise NoRouteError(EADDRNOTAVAIL, "the node has no address of this IP version to connect to")
    return next((address for address in addresses if fits(address)), addresses[0])


def _route(to: Address) -> Any:
    try:
        return routing.to(to)
    except NoRouteError as error:
        raise NoRouteError(error.errno, f"no way back to {to}: {error.strerror}") from error


def _destination(found: Any, own: Addresses, fits: Fits) -> Address:
    """Return the node's address that a client on the other side of a route knows."""
    preferred = found.get_attr("RTA_PREFSRC")
    here = [address.ip for address in own.get(found.get_attr("RTA_OIF"), [])]
    return _free([*([ip_address(preferred)] if preferred else []), *here, *_all(own)], fits)
