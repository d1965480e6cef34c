"""portmap's nftables back end: its tables, in which the comment of a rule is the container's ID.

Source: containernetworking/plugins, plugins/meta/portmap/portmap_nftables.go.
"""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from cni_hostport.migration.leftover import Leftover, TranslatedPort
from cni_hostport.portmap import CHAINS, IP_VERSIONS, TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.nft import Nft


def find(nft: Nft) -> list[Leftover]:
    """Return what the ruleset holds of each container; raises ``NFTError``."""
    found = []
    for family in IP_VERSIONS:
        by_container: dict[str, list[dict[str, Any]]] = {}
        for chain in CHAINS:
            for item in nft.listing(f"chain {family} {TABLE} {chain}"):
                if item.get("rule", {}).get("comment"):
                    by_container.setdefault(item["rule"]["comment"], []).append(item["rule"])
        for container_id, rules in by_container.items():
            found.append(
                Leftover(
                    family,
                    container_id,
                    frozenset(address for rule in rules for address in _addresses(rule)),
                    tuple(port for rule in rules for port in _translated_ports(rule)),
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


def _translated_ports(rule: dict[str, Any]) -> Iterator[TranslatedPort]:
    dnat = _dnat(rule)
    if dnat:
        matches = list(_matches(rule))
        ports = [(str(value), protocol) for protocol, field, value in matches if field == "dport"]
        hosts = [str(value) for _, field, value in matches if field == "daddr"]
        for port, protocol in ports:
            target = f"{dnat['addr']} port {dnat.get('port', 'unchanged')}"
            yield TranslatedPort(port, protocol, "".join(hosts), target)
