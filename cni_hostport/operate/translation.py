"""The rules that translate connections to host ports, read from a listing: whose connections, and where they lead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from cni_hostport.names import PROTOCOLS
from cni_hostport.ruleset.plan import EVERYWHERE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Address = IPv4Address | IPv6Address
    Networks = tuple[IPv4Network | IPv6Network, ...]
    Expressions = Iterable[Mapping[str, Any]]
    Targets = Mapping[str, Iterable[Any]]

ANY: dict[int, IPv4Address | IPv6Address] = {
    network.version: network.network_address for network in EVERYWHERE.values()
}


@dataclass(frozen=True, slots=True)
class Translation:
    """What a rule of an attachment translates.

    ``host_ip`` is ``None`` where it does not compare the host address with a single one. The host address has to be in
    each of ``daddr``; ``conditional`` is whether it compares more: the conditions of the network.
    """

    protocol: str
    host_ip: Address | None
    host_port: int
    pod_ip: Address
    pod_port: int
    daddr: tuple[Networks, ...]
    conditional: bool

    def takes(self, address: Address) -> bool:
        """Tell whether connections to a host address can meet the rule."""
        return all(any(address in network for network in networks) for networks in self.daddr)


def first(translations: Sequence[Translation], host_ip: Address, protocol: str, port: int) -> Translation | None:
    """Return the first rule that a connection meets, ``None`` if it meets none."""
    met = [
        rule
        for rule in translations
        if (rule.pod_ip.version, rule.protocol, rule.host_port) == (host_ip.version, protocol, port)
    ]
    anywhere = host_ip in ANY.values()
    for rule in met:
        if rule.host_ip is None or (rule.host_ip == host_ip and not anywhere):
            return rule
    # an address that a condition compares looks like the mapping's own; the rules of any address come last
    return met[-1] if met and anywhere else None


def read(expressions: Expressions, targets: Targets) -> list[Translation]:
    """Return what a rule translates; nothing if it is not one of this plugin's.

    ``targets`` are the elements of attachments' own maps, by the names with which rules use them.
    """
    try:
        return list(_read(expressions, targets))
    except (KeyError, TypeError, ValueError):
        return []


def _read(expressions: Expressions, targets: Targets) -> Iterator[Translation]:
    compared: dict[str, Any] = {}
    daddr: tuple[Networks, ...] = ()
    conditional = False
    for expression in expressions:
        own = _compared(expression["match"]) if "match" in expression else {}
        networks = _networks(expression["match"]) if "match" in expression else ()
        daddr += (networks,) if networks else ()
        if len(networks) == 1 and networks[0].prefixlen == networks[0].max_prefixlen:
            own = {"daddr": networks[0].network_address}
        compared |= own  # conditions come first, the mapping's own comparisons last
        if "dnat" in expression:
            for rule in _translations(expression["dnat"], compared, targets):
                given = ((ip_network(rule.host_ip),),) if rule.host_ip and rule.host_ip != compared.get("daddr") else ()
                yield replace(rule, daddr=daddr + given, conditional=conditional)
        elif "counter" not in expression:
            conditional = conditional or not (own or networks)


def _translations(dnat: Mapping[str, Any], compared: Mapping[str, Any], targets: Targets) -> Iterator[Translation]:
    if isinstance(dnat["addr"], str):
        host_ip = compared.get("daddr")
        pod_ip, pod_port = ip_address(dnat["addr"]), int(dnat["port"])
        yield Translation(compared["l4proto"], host_ip, int(compared["dport"]), pod_ip, pod_port, (), conditional=False)
        return
    data = dnat["addr"]["map"]["data"]
    # an older version of this plugin had maps without a name
    for key, value in targets.get(data, ()) if isinstance(data, str) else data["set"]:
        *address, protocol, port = key["concat"]
        host_ip = ip_address(address[0]) if address else None
        pod_ip, pod_port = ip_address(value["concat"][0]), value["concat"][1]
        yield Translation(PROTOCOLS.get(protocol, protocol), host_ip, port, pod_ip, pod_port, (), conditional=False)


def _compared(match: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has to be equal to one value: ``nfproto``, ``l4proto`` and ``dport``."""
    right = match["right"]
    if match["op"] != "==" or not isinstance(right, str | int) or not isinstance(match["left"], dict):
        return {}
    if match["left"].get("meta", {}).get("key") == "nfproto":
        return {"nfproto": right}
    if match["left"].get("meta", {}).get("key") == "l4proto":
        return {"l4proto": PROTOCOLS.get(right, right) if isinstance(right, int) else right}
    payload = match["left"].get("payload", {})
    if payload.get("field") == "dport":
        return {"dport": right} | ({} if payload["protocol"] == "th" else {"l4proto": payload["protocol"]})
    return {}


def _networks(match: Mapping[str, Any]) -> Networks:
    """Return the networks in which the destination has to be for a match; none if it is about something else."""
    left, right = match["left"], match["right"]
    payload = left.get("payload", {}) if isinstance(left, dict) else {}
    if match["op"] != "==" or payload.get("field") != "daddr" or payload["protocol"] not in {"ip", "ip6"}:
        return ()  # ether has a daddr too
    members = right["set"] if isinstance(right, dict) and "set" in right else [right]
    try:
        return tuple(map(_network, members))
    except (KeyError, TypeError, ValueError):
        return ()  # such as a range


def _network(member: Any) -> IPv4Network | IPv6Network:
    return ip_network(member if isinstance(member, str) else (member["prefix"]["addr"], member["prefix"]["len"]))
