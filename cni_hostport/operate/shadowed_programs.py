"""Programs of the node that listen on a mapped port: the mapping comes first, and they get no new connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.kernel import ipvs
from cni_hostport.operate.mappings import socket
from cni_hostport.operate.sockets import NUMBERS, on_ports
from cni_hostport.operate.statements import note
from cni_hostport.ruleset.plan import IPV6_LINK_LOCAL, IPV6_LOOPBACK

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.sockets import Listener
    from cni_hostport.operate.statements import Statement


def listeners(mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say which programs of this node listen where connections go to a pod; to be called in the main thread.

    Raises ``OSError`` if the addresses of Services cannot be read.
    """
    by_port: dict[tuple[str, int, int], list[PortMapping]] = {}
    for of in mappings:
        if of.protocol in NUMBERS and of.pod_ip:
            by_port.setdefault((of.protocol, of.host_port, of.version), []).append(of)
    services = ipvs.addresses()
    # where a program listens, and over which IP versions connections go to the pod: by program, pod, and connections
    hidden: dict[tuple[str, str, str], tuple[dict[str, None], set[int]]] = {}
    for key, listening in sorted(on_ports({(protocol, port) for protocol, port, _ in by_port}).items()):
        for listener in sorted(listening):
            for of in _before(listener, by_port.get(key, ()), services):
                whose = listener.process, of.who, _connections(of, listener)
                places, versions = hidden.setdefault(whose, ({}, set()))
                places[f"{socket(listener.address, of.host_port)}/{of.protocol}"] = None
                versions.add(of.version)
    for (process, pod, connections), (places, versions) in hidden.items():
        over = " and ".join(f"IPv{version}" for version in sorted(versions))
        yield note(
            f"{process} listens on {' and '.join(places)}, where {pod} has a host port",
            f"New connections over {over}{connections} go to the pod. {process} keeps those that it has.",
            "If it is to get them: give it or the pod another port, or the mapping a hostIP that it does not need.",
        )


def _before(
    listener: Listener, mappings: Sequence[PortMapping], services: Collection[IPv4Address | IPv6Address]
) -> list[PortMapping]:
    """Return the mappings of a port that take connections which a listener would get."""
    address = listener.address
    if address.is_unspecified:
        return list(mappings)
    if address == IPV6_LOOPBACK or address in IPV6_LINK_LOCAL:
        return []
    given = [of for of in mappings if of.host_ip == address]
    anywhere = [of for of in mappings if of.host_ip.is_unspecified and address not in services]
    return [of for of in given or anywhere if of.rule is None or of.rule.takes(address)]


def _connections(of: PortMapping, listener: Listener) -> str:
    """Say which connections go to the pod instead of to a listener, where that is not all."""
    limits = of.rule.daddr if of.rule and listener.address.is_unspecified else ()
    to = " and ".join(" or ".join(map(_shortest, networks)) for networks in limits)
    conditions = " that meet the conditions of its network (conditionsV4, conditionsV6)" if of.conditional else ""
    return f"{to and f' to {to}'}{conditions}"


def _shortest(network: IPv4Network | IPv6Network) -> str:
    return str(network.network_address if network.prefixlen == network.max_prefixlen else network)
