"""What an attachment wants of the ruleset: port mappings times pod addresses.

Pure, and the one truth for ADD and CHECK. A plan depends on what the container asks for, and on the host ports that are
assigned to its dynamic requests. ADD picks these, CHECK reads them from the ruleset: nothing else differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
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

from cni_hostport.dynamic_ports.request import AssignedPort, named
from cni_hostport.errors import CNIError, Code

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cni_hostport.config import NetworkConfig
    from cni_hostport.dynamic_ports.request import Block, DynamicPort
    from cni_hostport.runtime_keys import PortMapping


@dataclass(frozen=True, slots=True)
class Forward:
    """New connections to a host port of one family go to one port of the pod.

    ``host_ip`` is ``None`` for every local address of the pod address's family. ``request`` is the text of the one that
    the host port was assigned to, empty for a port that was asked for by its number.
    """

    protocol: str
    host_ip: IPv4Address | IPv6Address | None
    host_port: int
    pod_ip: IPv4Address | IPv6Address
    container_port: int
    request: str = ""

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
    """How the node reaches a pod's address: the index of the interface, and whether that leads to this pod alone."""

    interface: int
    is_own: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one attachment's rules do.

    ``masquerade`` has, by the pod's addresses, the source networks whose connections to it have to be masqueraded.
    ``conditions`` has, by IP version, the nft match that a connection has to meet to be forwarded. ``host_addresses``
    has, by IP version, the networks in which the node's address has to be if the mapping gives no address; empty for
    any. ``interface`` is the index of the interface towards the pod's IPv4 address, 0 if there is none. ``assigned``
    has the host ports of all dynamic requests, those too that another attachment of the container has.
    """

    forwards: tuple[Forward, ...]
    masquerade: dict[IPv4Address | IPv6Address, tuple[IPv4Network | IPv6Network, ...]]
    conditions: dict[int, tuple[str, ...]] = field(default_factory=lambda: {4: (), 6: ()})
    host_addresses: dict[int, tuple[IPv4Network | IPv6Network, ...]] = field(default_factory=lambda: {4: (), 6: ()})
    interface: int = 0
    assigned: Mapping[str, int] = field(default_factory=dict)

    def without(self, forwards: Mapping[Forward, object]) -> Plan:
        """Return the plan without forwards that other attachments do."""
        return replace(self, forwards=tuple(forward for forward in self.forwards if forward not in forwards))

    def limited_to(self, protocol: str) -> Plan:
        """Return the plan with the forwards of one protocol."""
        return replace(self, forwards=tuple(forward for forward in self.forwards if forward.protocol == protocol))

    @property
    def local_route_to(self) -> IPv4Address | None:
        """The pod's IPv4 address, if connections from 127.0.0.0/8 go there, for which ``route_localnet`` is needed."""
        return next((ip for ip, sources in self.masquerade.items() if isinstance(ip, IPv4Address) and sources), None)


@dataclass(frozen=True)
class Request:
    """What a container asks for, and what else its plan depends on; but not the dynamic host ports that it is given.

    ``addresses`` are those of its interface; connections go to the first one of each IP version. ``routes`` has how the
    node reaches each of these, if it does.
    """

    config: NetworkConfig
    addresses: Sequence[IPv4Interface | IPv6Interface]
    routes: Mapping[IPv4Address | IPv6Address, PodRoute] = field(default_factory=dict)

    @cached_property
    def pods(self) -> Mapping[int, Sequence[IPv4Interface | IPv6Interface]]:
        """The addresses by IP version."""
        found: dict[int, list[IPv4Interface | IPv6Interface]] = {}
        for address in self.addresses:
            found.setdefault(address.version, []).append(address)
        return found

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """The container ports that can be given a host port: those to which there is an address to forward."""
        return [block for block in self.config.requests if not self._reason_unmapped(block[0])]

    @property
    def is_mapped(self) -> bool:
        """Whether some port leads to the container, or is to lead there."""
        return bool(self.blocks) or any(map(self.forwards, self.config.mappings))

    def forwards(self, mapping: PortMapping | AssignedPort) -> list[Forward]:
        """Return where a mapping's connections go, by the IP versions that the pod has: nowhere, if it has none."""
        host_ip = None if mapping.host_ip is None or mapping.host_ip.is_unspecified else mapping.host_ip
        port, request = mapping.container_port, str(mapping.request or "")
        return [
            Forward(mapping.protocol, host_ip, mapping.host_port, pod[0].ip, port, request)
            for version, pod in self.pods.items()
            if not self._reason(mapping, version)
        ]

    def plan(self, assigned: Mapping[str, int] | None = None) -> Plan:
        """Return the plan, given the host ports that are assigned to requests, which it has as text.

        Requests without a host port have no part in it. Raises ``CNIError`` with ``INVALID_CONFIG`` if a host port
        would lead to two container ports.
        """
        assigned = assigned or {}
        requests = [request for block in self.blocks for request in block if str(request) in assigned]
        mappings: list[PortMapping | AssignedPort] = [
            *self.config.mappings,
            *(AssignedPort(request, assigned[str(request)]) for request in requests),
        ]
        forwards: dict[tuple[object, ...], Forward] = {}
        for forward in (forward for mapping in mappings for forward in self.forwards(mapping)):
            key = (forward.version, forward.host_ip, forward.protocol, forward.host_port)
            other = forwards.setdefault(key, forward)
            if other != forward:
                raise CNIError(
                    Code.INVALID_CONFIG,
                    f"host port {forward} is mapped to two container ports,"
                    f" {other.container_port} and {forward.container_port}",
                )
        versions = {forward.version for forward in forwards.values()}
        masquerade = {
            pod[0].ip: _masquerade(self.config, pod, self.routes.get(pod[0].ip)) for pod in self.pods.values()
        }
        route = self.routes.get(self.pods[4][0].ip) if 4 in self.pods else None  # noqa: PLR2004 - IP version
        return Plan(
            forwards=tuple(forwards.values()),
            masquerade={pod_ip: sources for pod_ip, sources in masquerade.items() if pod_ip.version in versions},
            conditions=self.config.conditions,
            host_addresses={version: _networks(self.config, version) for version in (4, 6)},
            interface=route.interface if route else 0,
            assigned={str(request): assigned[str(request)] for request in requests},
        )

    @property
    def name(self) -> str:
        """The first of the ports that are asked for, as the beginning of a sentence."""
        mappings = (f"host port {mapping}" for mapping in self.config.mappings)
        return next(mappings, "") or f"container port {named(self.config.requests[0])}"

    def unmapped(self) -> list[str]:
        """Return, a sentence each, which of the ports that are asked for lead to no rule at all."""
        found = [
            (f"host port {mapping} is not mapped", self._reason_unmapped(mapping)) for mapping in self.config.mappings
        ]
        found += [
            (f"container port {named(block)} gets no host port", self._reason_unmapped(block[0]))
            for block in self.config.requests
        ]
        return [f"{what}: {reason}" for what, reason in found if reason]

    def _reason_unmapped(self, mapping: PortMapping | DynamicPort) -> str:
        """Return why a mapping or request is forwarded in no IP version, empty if it is in one."""
        reasons = [self._reason(mapping, version) for version in self.pods]
        return next(filter(None, reasons), NO_ADDRESS) if all(reasons) else ""

    def _reason(self, mapping: PortMapping | AssignedPort | DynamicPort, version: int) -> str:
        """Return why a mapping is not forwarded in an IP version, empty if it is."""
        host_ip = mapping.host_ip
        if host_ip is not None and host_ip.version != version:
            return NO_ADDRESS
        if host_ip is not None and not host_ip.is_unspecified:
            if host_ip == IPV6_LOOPBACK or host_ip in IPV6_LINK_LOCAL:
                return f"the kernel forwards nothing from {host_ip}"
            return ""
        if self.config.host_addresses and not any(net.version == version for net in self.config.host_addresses):
            return f"hostAddresses has no network of IPv{version}"
        port = version, mapping.protocol, getattr(mapping, "host_port", None)
        if host_ip is None and port in self._more_specific:
            return "another mapping has the same port and 0.0.0.0 or :: as its hostIP"
        return ""

    @cached_property
    def _more_specific(self) -> Collection[tuple[int, str, int | None]]:
        """The (IP version, protocol, host port) of the mappings for 0.0.0.0 or ``::``.

        Kubernetes' API admits the same port without a host address too, than which these are more specific.
        """
        return {
            (mapping.host_ip.version, mapping.protocol, mapping.host_port)
            for mapping in self.config.mappings
            if mapping.host_ip is not None and mapping.host_ip.is_unspecified
        }


NO_ADDRESS = "the container has no address to which it could be forwarded"


def _networks(config: NetworkConfig, version: int) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the networks of one IP version to which mappings are limited, none if they answer on every address."""
    networks = [network for network in config.host_addresses if network.version == version]
    return () if EVERYWHERE[version] in networks else tuple(collapse_addresses(networks))  # type: ignore[type-var]


def _masquerade(
    config: NetworkConfig, pod: Sequence[IPv4Interface | IPv6Interface], route: PodRoute | None
) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the sources that have to be masqueraded: without that they get no answer, or one from the pod's address.

    These are the node's 127.0.0.0/8; and the pod itself and its neighbours on the link, whom the pod answers without
    passing the node. A pod has no neighbours if an interface of the node leads to this pod alone, whatever its prefix.
    """
    version = pod[0].version
    if not config.snat:
        return ()
    if config.masq_all:
        return (EVERYWHERE[version],)
    sources = [ip_network(pod[0].ip)] if route and route.is_own else [address.network for address in pod]
    return tuple(dict.fromkeys((LOCALHOST, *sources) if version == 4 else sources))  # noqa: PLR2004 - IP versions
