"""The addresses that are local on the node, and host ports: those of Services, and those that a hostIP waits for."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from cni_hostport.kernel import ipvs, namespaces, routes
from cni_hostport.names import FAMILY, SERVICES, TABLE
from cni_hostport.operate.statements import note, problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.mappings import InstalledMapping
    from cni_hostport.operate.statements import Statement

MAX_EXAMPLES = 10  # of what a statement says


def services(nft: Nft, mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Tell of the addresses of Services on an IPVS node, and which of them host ports take.

    Raises ``NFTError`` and ``OSError``.
    """
    present = ipvs.addresses()
    if not present:
        return
    yield note(
        f"{ipvs.INTERFACE} has {_count(present)} of Services: kube-proxy is in its IPVS mode",
        "They are local on this node, and no host port's but one whose hostIP names such an address.",
        'If host ports are to answer on some of the other addresses only: name these as "hostAddresses" in hostport\'s'
        " object of the network configuration.",
    )
    for version, name in SERVICES.items():
        if not any(mapping.version == version and mapping.host_ip.is_unspecified for mapping in mappings):
            continue
        lacking = sorted(address for address in present - _members(nft, name) if address.version == version)
        if lacking:
            rest = [f"and {len(lacking) - MAX_EXAMPLES} more"] if len(lacking) > MAX_EXAMPLES else []
            yield problem(
                f"set {FAMILY} {TABLE} {name} lacks {_count(lacking)} of {ipvs.INTERFACE}",
                "A host port without hostIP takes the connections to the same port of these Services.",
                "systemctl enable --now hostport.service (or hostport serve), which keeps the set as the interface is;"
                " elsewhere, the next ADD of a container that has host ports puts it right.",
                (*map(str, lacking[:MAX_EXAMPLES]), *rest),
            )


def _count(addresses: Collection[object]) -> str:
    return f"{len(addresses)} address{'es' * (len(addresses) != 1)}"


def _members(nft: Nft, name: str) -> set[IPv4Address | IPv6Address]:
    listed = (item["set"] for item in nft.listing(f"set {FAMILY} {TABLE} {name}") if "set" in item)
    return {
        ip_address(element) for members in listed for element in members.get("elem", ()) if isinstance(element, str)
    }


def host_ips(mappings: Sequence[InstalledMapping]) -> Iterator[Statement]:
    """Say which host addresses of mappings the node does not have; raises ``OSError`` if that cannot be told."""
    present = {address.ip.ip for address in namespaces.addresses()}
    missing: dict[IPv4Address | IPv6Address, list[InstalledMapping]] = {}
    for mapping in mappings:
        if not mapping.host_ip.is_unspecified and mapping.host_ip not in present:
            missing.setdefault(mapping.host_ip, []).append(mapping)
    for address, waiting in missing.items():
        if not routes.is_local(address):
            yield note(
                f"{address} is not an address of this node, and a hostIP of"
                f" {', '.join(dict.fromkeys(mapping.container for mapping in waiting))}",
                "Its host ports there answer as soon as this node has the address, which may come later (keepalived).",
                "If it is not to come: correct hostIP.",
                tuple(f"{mapping.host} -> {mapping.target}" for mapping in waiting),
            )
