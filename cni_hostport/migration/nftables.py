"""portmap's nftables back end: its tables, in which the comment of a rule is the container's ID.

Source: containernetworking/plugins, plugins/meta/portmap/portmap_nftables.go.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from cni_hostport.portmap import CHAINS, FAMILIES, TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.ruleset.plan import Forward

VERSIONS = {"ip": 4, "ip6": 6}


@dataclass(frozen=True)
class Translation:
    """A host port that a rule of portmap's translates, in the words of the rule; ``host`` is empty for any address."""

    port: str
    protocol: str
    host: str
    target: str

    def __str__(self) -> str:
        """Say what it is in a line."""
        return f"{self.port}/{self.protocol}{self.host and f' on {self.host}'} -> {self.target}"

    def takes(self, forward: Forward) -> bool:
        """Tell whether connections for a forward of the same IP version come to this instead.

        What is for one address is more specific than a forward for all, and no matter for that.
        """
        same_port = (self.port, self.protocol) == (str(forward.host_port), forward.protocol)
        return same_port and (not self.host or ip_address(self.host) == forward.host_ip)


@dataclass(frozen=True)
class Leftover:
    """What portmap has of one container, in one IP family, by one of its back ends.

    ``addresses`` are those that its rules lead to. What iptables has is of one ``network``, and of no known one
    otherwise.
    """

    family: str
    container_id: str
    addresses: frozenset[IPv4Address | IPv6Address]
    translations: tuple[Translation, ...]
    back_end: str = "nftables"
    network: str = ""

    def __str__(self) -> str:
        """Say what it is in a line."""
        shown = ", ".join(map(str, self.translations)) or "no mapping"
        return f"container {self.container_id} ({self.back_end}, {self.family}): {shown}"

    def takes(self, forward: Forward) -> bool:
        """Tell whether connections for a forward come to these rules instead."""
        return VERSIONS[self.family] == forward.version and any(one.takes(forward) for one in self.translations)


def find(nft: Nft) -> list[Leftover]:
    """Return what the ruleset holds of each container; raises ``NFTError``."""
    found = []
    for family in FAMILIES:
        rules: dict[str, list[dict[str, Any]]] = {}
        for chain in CHAINS:
            for item in nft.listing(f"chain {family} {TABLE} {chain}"):
                if item.get("rule", {}).get("comment"):
                    rules.setdefault(item["rule"]["comment"], []).append(item["rule"])
        for container_id, of in rules.items():
            found.append(
                Leftover(
                    family,
                    container_id,
                    frozenset(address for rule in of for address in _addresses(rule)),
                    tuple(one for rule in of for one in _translation(rule)),
                )
            )
    return found


def _matches(rule: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Return protocol, field and value of each match."""
    for expression in rule["expr"]:
        payload = expression.get("match", {}).get("left", {}).get("payload", {})
        if "field" in payload:
            yield payload["protocol"], payload["field"], expression["match"]["right"]


def _dnat(rule: dict[str, Any]) -> dict[str, Any] | None:
    return next((expression["dnat"] for expression in rule["expr"] if expression.get("dnat")), None)


def _addresses(rule: dict[str, Any]) -> Iterator[IPv4Address | IPv6Address]:
    dnat = _dnat(rule)
    # the rules that masquerade match the container's address as the destination
    texts = [dnat["addr"]] if dnat else [value for _, field, value in _matches(rule) if field == "daddr"]
    for text in texts:
        with suppress(ValueError):
            yield ip_address(text)


def _translation(rule: dict[str, Any]) -> Iterator[Translation]:
    dnat = _dnat(rule)
    if dnat:
        matches = list(_matches(rule))
        ports = [(str(value), protocol) for protocol, field, value in matches if field == "dport"]
        hosts = [str(value) for _, field, value in matches if field == "daddr"]
        for port, protocol in ports:
            target = f"{dnat['addr']} port {dnat.get('port', 'unchanged')}"
            yield Translation(port, protocol, "".join(hosts), target)
