"""A host port without a mapping: who asked for it, what is like it, and who gets the connections instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport import plugin
from cni_hostport.errors import CNIError
from cni_hostport.libcni import cache
from cni_hostport.lookup import Lookup
from cni_hostport.operate.explain.packet import PROTOCOLS
from cni_hostport.operate.explain.path import RESTORE
from cni_hostport.operate.sockets import listeners
from cni_hostport.operate.statements import note, problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

    from cni_hostport.operate.mappings import PortMapping
    from cni_hostport.operate.statements import Statement

    Address = IPv4Address | IPv6Address


def lost(port: int, protocol: str, versions: Collection[int], caches: Sequence[Path]) -> Iterator[Statement]:
    """Yield whose mappings of a host port are missing, of IP versions of which there are none; and what is not known.

    Raises ``OSError`` if a cache cannot be looked at.
    """
    for path in cache.entries(caches) if versions else ():
        try:
            whose, asked_for = _asked_for(path, port, protocol)
        except (ValueError, CNIError) as error:
            yield note(f"what {path} says cannot be told: {error}", "Its container may have asked for this port.")
            continue
        of = sorted(asked_for & set(versions))
        if of:
            family = f" of IPv{of[0]}" if len(of) == 1 else ""
            yield problem(
                f"no mapping of host port {port}/{protocol}{family} is installed, and {whose} asked for it",
                "Its mapping was taken away, by a firewall's reload or 'nft flush ruleset'.",
                RESTORE,
            )


def nothing(
    port: int, protocol: str, versions: Collection[int], to: Address | None, mappings: Iterable[PortMapping]
) -> Iterator[Statement]:
    """Yield that there is no mapping of a host port, at an address if it is given; ``mappings`` are all of the node."""
    family = f" for {to}" if to else f" of IPv{next(iter(versions))}" if len(versions) == 1 else ""
    alike = tuple(f"but {of.host} leads to {of.target}, {of.who}" for of in mappings if of.host_port == port)
    yield problem(
        f"no mapping of host port {port}/{protocol}{family} is installed",
        "No running pod asked for it, or its runtime does not keep libcni's cache where this was looked for.",
        "hostport doctor checks the network configurations; 'hostPort' has to be set in the pod's specification",
        alike,
    )


def instead(port: int, protocol: str, versions: Collection[int], to: Address | None) -> Iterator[Statement]:
    """Yield which processes of the node get the connections to a port that is not mapped, at an address if given."""
    for version in versions if protocol in PROTOCOLS else ():
        for listener in listeners(protocol, port, version):
            if to and not listener.serves(to):
                continue
            yield note(f"{listener.process} on this node listens on it, at {listener.address}: it gets the connections")


def _asked_for(path: Path, port: int, protocol: str) -> tuple[str, set[int]]:
    """Return whose an entry of a cache is, and of which IP versions that pod, if it lives, asked for a host port.

    Raises ``ValueError`` or ``CNIError`` if that cannot be told.
    """
    call = cache.read(path)
    plan = cache.plan(call)[0] if call else None
    if call is None or plan is None or Lookup(shared=True).is_deleted(plugin.attachment_of(call).key):
        return "", set()
    return cache.whose(call), {of.version for of in plan.forwards if (of.host_port, of.protocol) == (port, protocol)}
