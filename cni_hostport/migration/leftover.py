"""What portmap's back ends have of a container, whichever of them it is."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from cni_hostport.portmap import IP_VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni_hostport.ruleset.plan import Forward


@dataclass(frozen=True)
class TranslatedPort:
    """A host port that a rule of portmap's translates, in the words of the rule; ``host`` is empty for any address."""

    port: str
    protocol: str
    host: str
    target: str

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.port}/{self.protocol}{self.host and f' on {self.host}'} -> {self.target}"

    def takes(self, forward: Forward) -> bool:
        """Tell whether connections for a forward of the same IP version come to this instead.

        The forward's host address does not matter where the rule is for any. The rule's does, even if it is more
        specific: it then takes only some connections, and counts only for a forward of the same address. A dynamic port
        is to be nobody else's at any address.
        """
        same_port = (self.port, self.protocol) == (str(forward.host_port), forward.protocol)
        return same_port and (not self.host or bool(forward.request) or ip_address(self.host) == forward.host_ip)


@dataclass(frozen=True)
class Leftover:
    """What portmap has of one container, in one IP family, by one of its back ends.

    ``addresses`` are those that its rules lead to. ``network`` is known of what iptables has only, and empty otherwise.
    """

    family: str
    container_id: str
    addresses: frozenset[IPv4Address | IPv6Address]
    ports: tuple[TranslatedPort, ...]
    back_end: str = "nftables"
    network: str = ""

    def __str__(self) -> str:
        """Return it as a line."""
        shown = ", ".join(map(str, self.ports)) or "no mapping"
        return f"container {self.container_id} ({self.back_end}, {self.family}): {shown}"

    def takes(self, forward: Forward) -> bool:
        """Tell whether connections for a forward come to these rules instead."""
        return IP_VERSIONS[self.family] == forward.version and any(port.takes(forward) for port in self.ports)


def by_container(leftovers: Iterable[Leftover]) -> dict[str, list[Leftover]]:
    """Return leftovers by the IDs of their containers."""
    found: dict[str, list[Leftover]] = {}
    for leftover in leftovers:
        found.setdefault(leftover.container_id, []).append(leftover)
    return found


def addresses(leftovers: Iterable[Leftover]) -> frozenset[IPv4Address | IPv6Address]:
    """Return the addresses that the rules of leftovers lead to."""
    return frozenset(address for leftover in leftovers for address in leftover.addresses)
