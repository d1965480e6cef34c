"""Programs of the node that listen on a mapped port: the mapping comes first, and they get no new connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.kernel import ipvs
from cni_hostport.operate import sockets
from cni_hostport.operate.mappings import endpoint
from cni_hostport.operate.statements import note
from cni_hostport.ruleset.plan import IPV6_LINK_LOCAL, IPV6_LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.sockets import Listener
    from cni_hostport.operate.statements import Statement


def statements(mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Say which programs of this node listen where connections go to a pod; to be called in the main thread.

    Raises ``OSError`` if the addresses of Services cannot be read.
    """
    by_port: dict[tuple[str, int, int], list[InstalledMapping]] = {}
    for mapping in mappings:
        if mapping.protocol in sockets.LISTENING_STATES and mapping.pod_ip:
            by_port.setdefault((mapping.protocol, mapping.host_port, mapping.version), []).append(mapping)
    services = ipvs.addresses()
    # where a program listens, and over which IP versions connections go to the pod: by program, pod, and connections
    shadowed: dict[tuple[str, str, str], tuple[dict[str, None], set[int]]] = {}
    listeners_by_port = sockets.listeners_by_port({(protocol, port) for protocol, port, _ in by_port})
    for key, listeners in sorted(listeners_by_port.items()):
        for listener in sorted(listeners):
            for mapping in _preferred_mappings(listener, by_port.get(key, ()), services):
                group = listener.process, mapping.container, _connections(mapping, listener)
                places, versions = shadowed.setdefault(group, ({}, set()))
                places[f"{endpoint(listener.address, mapping.host_port)}/{mapping.protocol}"] = None
                versions.add(mapping.version)
    for (process, pod, connections), (places, versions) in shadowed.items():
        families = " and ".join(f"IPv{version}" for version in sorted(versions))
        yield note(
            f"{process} listens on {' and '.join(places)}, where {pod} has a host port",
            f"New connections over {families}{connections} go to the pod. {process} keeps those that it has.",
            "If it is to get them: give it or the pod another port, or the mapping a hostIP that it does not need.",
        )


def _preferred_mappings(
    listener: Listener, mappings: Sequence[InstalledMapping], services: Collection[IPv4Address | IPv6Address]
) -> list[InstalledMapping]:
    """Return the mappings of a port that take connections which a listener would get."""
    address = listener.address
    if address.is_unspecified:
        return list(mappings)
    if address == IPV6_LOOPBACK or address in IPV6_LINK_LOCAL:
        return []
    address_mappings = [mapping for mapping in mappings if mapping.host_ip == address]
    any_address_mappings = [
        mapping for mapping in mappings if mapping.host_ip.is_unspecified and address not in services
    ]
    candidates = address_mappings or any_address_mappings
    return [mapping for mapping in candidates if mapping.rule is None or mapping.rule.takes(address)]


def _connections(mapping: InstalledMapping, listener: Listener) -> str:
    """Say which connections go to the pod instead of to a listener, where that is not all."""
    limits = mapping.rule.daddr if mapping.rule and listener.address.is_unspecified else ()
    addresses = " and ".join(" or ".join(map(_shortest, networks)) for networks in limits)
    conditions = " that meet the conditions of its network (conditionsV4, conditionsV6)" if mapping.conditional else ""
    return f"{addresses and f' to {addresses}'}{conditions}"


def _shortest(network: IPv4Network | IPv6Network) -> str:
    return str(network.network_address if network.prefixlen == network.max_prefixlen else network)
