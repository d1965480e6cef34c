"""The clients whose connections are explained: their address, and the interface on which their packets come in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from errno import EADDRNOTAVAIL, ENODEV
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from typing import TYPE_CHECKING, Any

from cni_hostport.kernel import interfaces, namespaces
from cni_hostport.kernel.routes import RTN_LOCAL, NoRouteError
from cni_hostport.operate.explain import routing
from cni_hostport.operate.explain.packet import IPAddress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.operate.mappings import PortMapping

NodeAddresses = dict[int, list[IPv4Interface | IPv6Interface]]  # by the index of the interface
Predicate = Callable[[IPAddress], bool]

# addresses that no host has (RFC 5737, RFC 3849): the routes to them are those to everybody who has no other route
EXAMPLES: dict[int, IPAddress] = {4: IPv4Address("203.0.113.1"), 6: IPv6Address("2001:db8:ffff::1")}
LOOPBACK = IPv4Address("127.0.0.1")


@dataclass(frozen=True)
class Client:
    """A client's address, and the address of the node to which it connects.

    Its packets come in on ``interface``; that is empty if the client is the node itself. ``is_example`` is whether
    nobody named this client: it stands for others.
    """

    source: IPAddress
    destination: IPAddress
    interface: str
    is_example: bool = False

    def __str__(self) -> str:
        """Name it as a sentence does."""
        if not self.interface:
            return f"the node itself ({self.source})"
        return f"a client such as {self.source}" if self.is_example else str(self.source)


def choose(
    mapping: PortMapping, source: IPAddress | None, destination: IPAddress | None, is_mapped: Predicate
) -> Client:
    """Return a client of a mapping.

    It has the address ``source``; without that, it is one from outside of the node if there can be any. It connects to
    ``destination``; without that, to an address of the node that ``is_mapped``, if there is any. Its packets come in on
    the interface by which the node would answer from that address. Raises ``OSError`` if there is no route to and from
    such a client.
    """
    given = destination or (None if mapping.host_ip.is_unspecified else mapping.host_ip)
    if source is None and given is not None and given.is_loopback:
        source = LOOPBACK if given.version == LOOPBACK.version else given
    if isinstance(given, IPv6Address) and given.is_link_local:
        return _client_on_link(source, given)
    node_addresses = _node_addresses(mapping.version)
    if source is None:
        return _example(node_addresses, mapping, given, is_mapped)
    route = _route_back(source)
    if route["type"] == RTN_LOCAL:
        return Client(source, given or _first_mapped([source, *_flat(node_addresses)], is_mapped), "")
    given = given or _known_address(route, node_addresses, is_mapped)
    return Client(source, given, _incoming_interface(source, given, route))


def further(mapping: PortMapping, client: Client, is_mapped: Predicate) -> Iterator[Client]:
    """Yield clients like an example that come in on other interfaces.

    These are the interfaces by which the node answers from its other addresses.
    """
    if not client.is_example or not mapping.host_ip.is_unspecified:
        return
    seen = {client.interface}
    for index, addresses in _node_addresses(mapping.version).items():
        for address in addresses:
            with suppress(NoRouteError):
                outgoing = routing.route(client.source, address.ip).get_attr("RTA_OIF")
                name = _interface_name(outgoing)
                if name not in seen and outgoing == index and is_mapped(address.ip):
                    seen.add(name)
                    yield Client(client.source, address.ip, name, is_example=True)


def _example(
    node_addresses: NodeAddresses, mapping: PortMapping, given: IPAddress | None, is_mapped: Predicate
) -> Client:
    """Return a client beyond the default route, or else one on a link of the node's that is not the pod's.

    It connects to the ``given`` address, if there is one. Without such a link it is the node itself.
    """
    source = EXAMPLES[mapping.version]
    with suppress(NoRouteError):
        route = _route_back(source)
        destination = given or _known_address(route, node_addresses, is_mapped)
        return Client(source, destination, _incoming_interface(source, destination, route), is_example=True)
    for index, addresses in node_addresses.items():
        for address in addresses:
            neighbour = next((host for host in address.network.hosts() if host != address.ip), None)
            if neighbour and (mapping.pod_ip is None or mapping.pod_ip not in address.network):
                destination = given or _first_mapped([address.ip, *_flat(node_addresses)], is_mapped)
                return Client(neighbour, destination, _interface_name(index), is_example=True)
    loopback = [LOOPBACK] if mapping.version == LOOPBACK.version else []
    node = _first_mapped([*_flat(node_addresses), *loopback], is_mapped)
    return Client(node, given or node, "")


def _client_on_link(source: IPAddress | None, given: IPv6Address) -> Client:
    """Return a client on the link of one of the node's link-local addresses."""
    for address in namespaces.addresses():
        if address.ip.ip == given:
            neighbour = source or type(given)(int(given) ^ 2)
            return Client(neighbour, given, _interface_name(address.interface), is_example=source is None)
    raise OSError(EADDRNOTAVAIL, f"{given} is not an address of this node")


def _incoming_interface(source: IPAddress, destination: IPAddress, route: Any) -> str:
    """Return the interface by which the node would answer from ``destination``, that of ``route`` if it would not."""
    with suppress(NoRouteError):
        route = routing.route(source, destination)
    return _interface_name(route.get_attr("RTA_OIF"))


def _interface_name(index: int) -> str:
    name = interfaces.name(index)
    if not name:
        raise NoRouteError(ENODEV, "an interface has just gone")
    return name


def _node_addresses(version: int) -> NodeAddresses:
    found: NodeAddresses = {}
    for address in namespaces.addresses():
        if address.is_global and address.ip.version == version:
            found.setdefault(address.interface, []).append(address.ip)
    return found


def _flat(node_addresses: NodeAddresses) -> list[IPAddress]:
    return [address.ip for addresses in node_addresses.values() for address in addresses]


def _first_mapped(addresses: Sequence[IPAddress], is_mapped: Predicate) -> IPAddress:
    """Return the first address that is mapped, or if none is, the first."""
    if not addresses:
        raise NoRouteError(EADDRNOTAVAIL, "the node has no address of this IP version to connect to")
    return next((address for address in addresses if is_mapped(address)), addresses[0])


def _route_back(source: IPAddress) -> Any:
    try:
        return routing.route(source)
    except NoRouteError as error:
        raise NoRouteError(error.errno, f"no way back to {source}: {error.strerror}") from error


def _known_address(route: Any, node_addresses: NodeAddresses, is_mapped: Predicate) -> IPAddress:
    """Return the node's address that a client on the other side of a route knows."""
    preferred = route.get_attr("RTA_PREFSRC")
    on_interface = [address.ip for address in node_addresses.get(route.get_attr("RTA_OIF"), [])]
    candidates = [*([ip_address(preferred)] if preferred else []), *on_interface, *_flat(node_addresses)]
    return _first_mapped(candidates, is_mapped)
