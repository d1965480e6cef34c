"""What an attachment wants of the ruleset: port mappings times pod addresses.

Pure, and the one truth for ADD and CHECK.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code

if TYPE_CHECKING:
    from collections.abc import Iterable

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


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one attachment installs.

    ``masquerade`` holds, for each pod address with forwards, the source networks whose forwarded connections are
    masqueraded; ``conditions`` the nft tokens that each rule of an IP version has to match besides; ``unmapped`` the
    mappings that lead to no forward, most often because the pod has no address of their family.
    """

    forwards: tuple[Forward, ...]
    masquerade: dict[IPv4Address | IPv6Address, tuple[IPv4Network | IPv6Network, ...]]
    conditions: dict[int, tuple[str, ...]] = field(default_factory=lambda: {4: (), 6: ()})
    unmapped: tuple[PortMapping, ...] = ()

    def without(self, forwards: set[Forward]) -> Plan:
        """Return the plan that is left if these forwards are not to be installed."""
        left = tuple(forward for forward in self.forwards if forward not in forwards)
        pods = {forward.pod_ip for forward in left}
        masquerade = {pod_ip: sources for pod_ip, sources in self.masquerade.items() if pod_ip in pods}
        return replace(self, forwards=left, masquerade=masquerade)

    @property
    def local_route_to(self) -> IPv4Address | None:
        """The pod's IPv4 address, if connections from 127.0.0.0/8 go there, for which ``route_localnet`` is needed."""
        return next((ip for ip, sources in self.masquerade.items() if isinstance(ip, IPv4Address) and sources), None)


IPV6_LOOPBACK = IPv6Address("::1")
LOCALHOST = IPv4Network("127.0.0.0/8")
EVERYWHERE: dict[int, IPv4Network | IPv6Network] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}


def make(config: NetworkConfig, addresses: Iterable[IPv4Interface | IPv6Interface]) -> Plan:
    """Combine a configuration's mappings with the pod's addresses, of which the first of each family counts.

    Raises ``CNIError`` with code 7 if a host port would lead to two container ports.
    """
    pods: dict[int, IPv4Interface | IPv6Interface] = {}
    for address in addresses:
        pods.setdefault(address.version, address)
    forwards: dict[tuple[object, ...], Forward] = {}
    unmapped = []
    for mapping in config.mappings:
        mapped = [_forward(mapping, pod) for pod in pods.values() if _takes(mapping, pod)]
        if not mapped:
            unmapped.append(mapping)
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
    return Plan(
        forwards=tuple(forwards.values()),
        masquerade={pod.ip: _masquerade(config, pod) for pod in pods.values() if pod.version in versions},
        conditions=config.conditions,
        unmapped=tuple(unmapped),
    )


def _takes(mapping: PortMapping, pod: IPv4Interface | IPv6Interface) -> bool:
    if mapping.host_ip == IPV6_LOOPBACK:  # the kernel forwards nothing from it
        return False
    return mapping.host_ip is None or mapping.host_ip.version == pod.version


def _forward(mapping: PortMapping, pod: IPv4Interface | IPv6Interface) -> Forward:
    host_ip = None if mapping.host_ip is None or mapping.host_ip.is_unspecified else mapping.host_ip
    return Forward(mapping.protocol, host_ip, mapping.host_port, pod.ip, mapping.container_port)


def _masquerade(config: NetworkConfig, pod: IPv4Interface | IPv6Interface) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the sources that would not get an answer, or not from the host's address, were they left as they are.

    These are the pod itself and its neighbours on the link, which it answers without passing the node, and the node's
    own 127.0.0.0/8.
    """
    if not config.snat:
        return ()
    if config.masq_all:
        return (EVERYWHERE[pod.version],)
    return (LOCALHOST, pod.network) if pod.version == 4 else (pod.network,)  # noqa: PLR2004 - IP versions
