"""portmap's nftables back end: its tables ``cni_hostport``, in which the comment of a rule is the container's ID.

Source: containernetworking/plugins, plugins/meta/portmap/portmap_nftables.go.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.nft import Nft

TABLE = "cni_hostport"
CHAINS = ("hostports", "hostip_hostports", "masquerading")
FAMILIES = ("ip", "ip6")


@dataclass(frozen=True)
class Leftover:
    """What portmap has of one container, in one IP family, by one of its back ends.

    ``addresses`` are those that its rules lead to, ``mappings`` show them to a person, ``commands`` remove them:
    nft's, or lines for ``program``, one of the iptables-restore.
    """

    family: str
    container_id: str
    addresses: frozenset[IPv4Address | IPv6Address]
    mappings: tuple[str, ...]
    commands: tuple[str, ...]
    program: str = ""

    def __str__(self) -> str:
        """Say what it is in a line."""
        back_end = "iptables" if self.program else "nftables"
        return f"container {self.container_id} ({back_end}, {self.family}): {', '.join(self.mappings) or 'no mapping'}"


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
                    tuple(line for rule in of for line in _mapping(rule)),
                    tuple(f"delete rule {family} {TABLE} {rule['chain']} handle {rule['handle']}" for rule in of),
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


def _mapping(rule: dict[str, Any]) -> Iterator[str]:
    dnat = _dnat(rule)
    if dnat:
        ports = [f"{value}/{protocol}" for protocol, field, value in _matches(rule) if field == "dport"]
        hosts = [f" on {value}" for _, field, value in _matches(rule) if field == "daddr"]
        yield f"{''.join(ports + hosts)} -> {dnat['addr']} port {dnat.get('port', 'unchanged')}"
