"""The addresses that are local on the node, and host ports: those of Services, and those that a hostIP waits for."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from cni_hostport.kernel import ipvs, routes
from cni_hostport.kernel.namespaces import addresses
from cni_hostport.names import FAMILY, SERVICES, TABLE
from cni_hostport.operate.statements import note, problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

SHOWN = 10  # examples of what holds for all


def services(nft: Nft, mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Tell of the addresses of Services on an IPVS node, and which of them host ports take.

    Raises ``NFTError`` and ``OSError``.
    """
    present = ipvs.addresses()
    if not present:
        return
    yield note(
        f"{ipvs.INTERFACE} has {_number(present)} of Services: kube-proxy is in its IPVS mode",
        "They are local on this node, and no host port's but one whose hostIP names such an address.",
        'If host ports are to answer on some of the other addresses only: name these as "hostAddresses" in hostport\'s'
        " object of the network configuration.",
    )
    for version, name in SERVICES.items():
        if not any(of.version == version and of.host_ip.is_unspecified for of in mappings):
            continue
        lacking = sorted(of for of in present - _members(nft, name) if of.version == version)
        if lacking:
            more = [f"and {len(lacking) - SHOWN} more"] if len(lacking) > SHOWN else []
            yield problem(
                f"set {FAMILY} {TABLE} {name} lacks {_number(lacking)} of {ipvs.INTERFACE}",
                "A host port without hostIP takes the connections to the same port of these Services.",
                "systemctl enable --now hostport.service (or hostport serve), which keeps the set as the interface is;"
                " elsewhere, the next ADD of a container that has host ports puts it right.",
                (*map(str, lacking[:SHOWN]), *more),
            )


def _number(of: Collection[object]) -> str:
    return f"{len(of)} address{'es' * (len(of) != 1)}"


def _members(nft: Nft, name: str) -> set[IPv4Address | IPv6Address]:
    listed = (item["set"] for item in nft.listing(f"set {FAMILY} {TABLE} {name}") if "set" in item)
    return {ip_address(element) for of in listed for element in of.get("elem", ()) if isinstance(element, str)}


def host_ips(mappings: Sequence[PortMapping]) -> Iterator[Statement]:
    """Say which host addresses of mappings the node does not have; raises ``OSError`` if that cannot be told."""
    present = {of.ip.ip for of in addresses()}
    missing: dict[IPv4Address | IPv6Address, list[PortMapping]] = {}
    for of in mappings:
        if not of.host_ip.is_unspecified and of.host_ip not in present:
            missing.setdefault(of.host_ip, []).append(of)
    for address, waiting in missing.items():
        if not _is_local(address):
            yield note(
                f"{address} is not an address of this node, and a hostIP of"
                f" {', '.join(dict.fromkeys(of.who for of in waiting))}",
                "Its host ports there answer as soon as this node has the address, which may come later (keepalived).",
                "If it is not to come: correct hostIP.",
                tuple(f"{of.host} -> {of.target}" for of in waiting),
            )


def _is_local(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether the node takes an address for its own, as it does all of 127.0.0.0/8 and what has a local route."""
    try:
        return routes.route_to(address).type == routes.RTN_LOCAL
    except routes.NoRouteError:
        return False
