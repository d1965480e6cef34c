"""What an attachment wants of the ruleset: port mappings times pod addresses.

Pure, and the one truth for ADD and CHECK.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    collapse_addresses,
    ip_network,
)
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cni_hostport.config import NetworkConfig, PortMapping


@dataclass(frozen=True, slots=True)
class Forward:
    """New connections to a host port of one family go to one port of the pod.

    ``host_ip`` is ``None`` for every local address of the pod address's family.
    """

    protocol: str
    host_ip: IPv4Address | IPv6Address | None
    host_port: int
    pod_ip: IPv4Address | IPv6Address
    container_port: int

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.pod_ip.version

    def __str__(self) -> str:
        """Name the host's side as a person would: ``8080/tcp``, ``8080/tcp on 192.0.2.1``."""
        return f"{self.host_port}/{self.protocol}" + (f" on {self.host_ip}" if self.host_ip else "")


IPV6_LOOPBACK = IPv6Address("::1")
IPV6_LINK_LOCAL = IPv6Network("fe80::/10")
LOCALHOST = IPv4Network("127.0.0.0/8")
EVERYWHERE: dict[int, IPv4Network | IPv6Network] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}


@dataclass(frozen=True, slots=True)
class PodRoute:
    """How the node reaches a pod's address: the interface, by its index, and whether that leads to this pod alone."""

    interface: int
    is_own: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one attachment's rules do.

    ``masquerade`` maps each forwarded pod address to the source networks that have to be masqueraded on the way there.
    ``conditions`` are nft matches, by IP version, which a connection has to meet to be forwarded; ``host_addresses``
    the networks in which the node's address has to be, where the mapping does not give one, empty for any.
    ``interface`` is the index of the one towards the pod's IPv4 address, 0 where there is none. ``unmapped`` are
    mappings that lead to no rule at all, each with the reason.
    """

    forwards: tuple[Forward, ...]
    masquerade: dict[IPv4Address | IPv6Address, tuple[IPv4Network | IPv6Network, ...]]
    conditions: dict[int, tuple[str, ...]] = field(default_factory=lambda: {4: (), 6: ()})
    host_addresses: dict[int, tuple[IPv4Network | IPv6Network, ...]] = field(default_factory=lambda: {4: (), 6: ()})
    interface: int = 0
    unmapped: tuple[tuple[PortMapping, str], ...] = ()

    def without(self, forwards: Mapping[Forward, object]) -> Plan:
        """Return the plan without forwards that somebody else does."""
        return replace(self, forwards=tuple(forward for forward in self.forwards if forward not in forwards))

    def limited_to(self, protocol: str) -> Plan:
        """Return the plan with the forwards of one protocol."""
        return replace(self, forwards=tuple(forward for forward in self.forwards if forward.protocol == protocol))

    @property
    def local_route_to(self) -> IPv4Address | None:
        """The pod's IPv4 address, if connections from 127.0.0.0/8 go there, for which ``route_localnet`` is needed."""
        return next((ip for ip, sources in self.masquerade.items() if isinstance(ip, IPv4Address) and sources), None)


def make(
    config: NetworkConfig,
    addresses: Iterable[IPv4Interface | IPv6Interface],
    routes: Mapping[IPv4Address | IPv6Address, PodRoute] | None = None,
) -> Plan:
    """Combine a configuration's mappings with the pod's addresses, of which the first of each family is forwarded to.

    ``routes`` tell how the node reaches these, where it does. Raises ``CNIError`` with code 7 if a host port would lead
    to two container ports.
    """
    routes = routes or {}
    pods: dict[int, list[IPv4Interface | IPv6Interface]] = {}
    for address in addresses:
        pods.setdefault(address.version, []).append(address)
    beaten = {
        (mapping.host_ip.version, mapping.protocol, mapping.host_port)
        for mapping in config.mappings
        if mapping.host_ip is not None and mapping.host_ip.is_unspecified
    }
    forwards: dict[tuple[object, ...], Forward] = {}
    unmapped = []
    for mapping in config.mappings:
        lacks = {version: _lacks(config, mapping, version, beaten) for version in pods}
        mapped = [_forward(mapping, pods[version][0]) for version, reason in lacks.items() if not reason]
        if not mapped:
            unmapped.append((mapping, next(filter(None, lacks.values()), NO_ADDRESS)))
        for forward in mapped:
            key = (forward.version, forward.host_ip, forward.protocol, forward.host_port)
            other = forwards.setdefault(key, forward)
            if other != forward:
                raise CNIError(
                    Code.INVALID_CONFIG,
                    f"host port {forward} is mapped to two container ports,"
                    f" {other.container_port} and {forward.container_port}",
                )
    versions = {forward.version for forward in forwards.values()}
    masquerade = {of[0].ip: _masquerade(config, of, routes.get(of[0].ip)) for of in pods.values()}
    towards = next((routes[of.ip].interface for of in (pods.get(4) or ())[:1] if of.ip in routes), 0)
    return Plan(
        forwards=tuple(forwards.values()),
        masquerade={pod_ip: sources for pod_ip, sources in masquerade.items() if pod_ip.version in versions},
        conditions=config.conditions,
        host_addresses={version: _networks(config, version) for version in (4, 6)},
        interface=towards,
        unmapped=tuple(unmapped),
    )


NO_ADDRESS = "the container has no address to which it could be forwarded"


def _lacks(config: NetworkConfig, mapping: PortMapping, version: int, beaten: Collection[tuple[int, str, int]]) -> str:
    """Return why a mapping is not forwarded in an IP version, empty if it is.

    Kubernetes' API admits the same port without a host address and with 0.0.0.0 or ``::``, which are the more specific.
    """
    host_ip = mapping.host_ip
    if host_ip is not None and host_ip.version != version:
        return NO_ADDRESS
    if host_ip is not None and not host_ip.is_unspecified:
        if host_ip == IPV6_LOOPBACK or host_ip in IPV6_LINK_LOCAL:
            return f"the kernel forwards nothing from {host_ip}"
        return ""
    if config.host_addresses and not any(network.version == version for network in config.host_addresses):
        return f"hostAddresses has no network of IPv{version}"
    if host_ip is None and (version, mapping.protocol, mapping.host_port) in beaten:
        return "another mapping has the same port and 0.0.0.0 or :: as its hostIP"
    return ""


def _networks(config: NetworkConfig, version: int) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks of one IP version that limit where mappings answer, none if there is no limit."""
    networks = [network for network in config.host_addresses if network.version == version]
    return () if EVERYWHERE[version] in networks else tuple(collapse_addresses(networks))  # type: ignore[type-var]


def _forward(mapping: PortMapping, pod: IPv4Interface | IPv6Interface) -> Forward:
    host_ip = None if mapping.host_ip is None or mapping.host_ip.is_unspecified else mapping.host_ip
    return Forward(mapping.protocol, host_ip, mapping.host_port, pod.ip, mapping.container_port)


def _masquerade(
    config: NetworkConfig, pod: list[IPv4Interface | IPv6Interface], route: PodRoute | None
) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the sources that would not get an answer, or not from the host's address, were they left as they are.

    These are the pod itself and its neighbours on the link, which it answers without passing the node, and the node's
    own 127.0.0.0/8. A pod has no neighbours where an interface of the node leads to it alone, whatever its prefix.
    """
    version = pod[0].version
    if not config.snat:
        return ()
    if config.masq_all:
        return (EVERYWHERE[version],)
    sources = [ip_network(pod[0].ip)] if route and route.is_own else [address.network for address in pod]
    return tuple(dict.fromkeys((LOCALHOST, *sources) if version == 4 else sources))  # noqa: PLR2004 - IP versions
