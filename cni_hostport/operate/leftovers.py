"""What portmap left behind of containers that no longer exist: found, told, and removed.

A container exists as long as that cannot be ruled out: a runtime's cache knows it and its network namespace is there,
or some namespace on this node has an address that its rules lead to, unless the cache says whose that is now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cni_hostport import host
from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.nft import Nft
from cni_hostport.operate import cache, leftovers_iptables, leftovers_nftables, namespaces
from cni_hostport.operate.statements import note, ok, problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

    from cni_hostport.operate.leftovers_nftables import Leftover
    from cni_hostport.operate.statements import Statement

    Find = Callable[[Nft], list[Leftover]]
    Address = IPv4Address | IPv6Address

BACKENDS: dict[str, Find] = {"nftables": leftovers_nftables.find, "iptables": leftovers_iptables.find}


class Fate(StrEnum):
    """What became of a container."""

    EXISTS = "exists"
    UNKNOWN = "unknown"
    GONE = "gone"


@dataclass(frozen=True)
class Verdict:
    """What became of a container, why that is said, and who has its addresses now."""

    fate: Fate
    reason: str
    heirs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Census:
    """Who lives on this node: what is known of interfaces, which files are not readable, and all namespaces."""

    interfaces: tuple[cache.Interface, ...]
    unreadable: tuple[Path, ...]
    namespaces: tuple[namespaces.Namespace, ...]

    def verdict(self, container_id: str, addresses: frozenset[Address]) -> Verdict:
        """Tell what became of a container whose rules lead to these addresses."""
        own = [of for of in self.interfaces if of.container_id == container_id and not _is_gone(of)]
        if own:
            return Verdict(Fate.EXISTS, f"its runtime's cache has it, with network namespace {own[0].netns or '?'}")
        for path in self.unreadable:
            if container_id in path.name:
                return Verdict(Fate.UNKNOWN, f"{path} cannot be read")
        if not addresses:
            return Verdict(Fate.UNKNOWN, "its rules lead to no address")
        heirs = []
        for address in sorted(addresses, key=str):
            others = {_inode(of): of for of in self.interfaces if address in of.addresses and not _is_gone(of)}
            for namespace in self.namespaces:
                if address in namespace.addresses and namespace.inode not in others:
                    return Verdict(Fate.EXISTS, f"its address {address} is in network namespace {namespace.path}")
            heirs += [f"{address} is now that of container {of.container_id}" for of in others.values()]
        return Verdict(Fate.GONE, "no runtime's cache and no network namespace on this node has it", tuple(heirs))


def statements(nft: Nft, caches: Sequence[Path], find: Find) -> Iterator[Statement]:
    """Say what one of portmap's back ends left of which containers.

    Raises ``CNIError`` or ``OSError`` if it cannot be told which of them exist, and ``NFTError``.
    """
    found = find(nft)
    if not found:
        return
    existing = []
    for container_id, (verdict, of) in _verdicts(found, caches).items():
        lines = tuple(line for leftover in of for line in leftover.mappings)
        if verdict.fate is Fate.EXISTS:
            existing.append(f"{container_id}: {verdict.reason}")
        elif verdict.fate is Fate.UNKNOWN:
            yield note(
                f"whether portmap's container {container_id} exists cannot be told: {verdict.reason}", "", "", lines
            )
        else:
            say = problem if verdict.heirs else note
            yield say(
                f"portmap's rules of container {container_id} are there, and the container is not",
                f"These ports lead into another pod: {'; '.join(verdict.heirs)}."
                if verdict.heirs
                else "They lead these ports to whichever pod gets the address next.",
                "hostport doctor --remove-portmap-leftovers removes them, and no others.",
                lines,
            )
    if existing:
        yield ok(f"containers that portmap mapped exist, and their rules stay: {len(existing)}", *existing)


def remove(caches: Sequence[Path]) -> list[str]:
    """Remove portmap's rules of containers that no longer exist, and return what was removed, a line each.

    Raises ``CNIError`` or ``OSError``, with nothing changed, if it cannot be told which of them exist, and ``CNIError``
    or ``NFTError`` if rules cannot be read or removed.
    """
    nft = Nft()
    found = {backend: find(nft) for backend, find in BACKENDS.items()}
    verdicts = _verdicts([leftover for of in found.values() for leftover in of], caches)
    removed = []
    for backend, find in BACKENDS.items():
        before = {of for of in found[backend] if verdicts[of.container_id][0].fate is Fate.GONE}
        if not before:
            continue
        dead = [of for of in find(nft) if of in before]  # finding out who lives takes time, in which others act
        for program in sorted({of.program for of in dead}):
            mine = [of for of in dead if of.program == program]
            commands = [command for of in mine for command in of.commands]
            if program:
                leftovers_iptables.restore(program, commands)
            else:
                nft.run(commands)
            removed += [str(of) for of in mine]
    return removed


def removal(caches: Sequence[Path]) -> Iterator[Statement]:
    """Remove what ``remove`` does, and say what that was, or why it was nothing."""
    try:
        removed = remove(caches)
    except (CNIError, NFTError, OSError) as error:
        yield problem(f"portmap's leftovers were not removed: {error}")
    else:
        yield from map(ok, removed or ["portmap left nothing that can be removed"])


def _verdicts(found: Sequence[Leftover], caches: Sequence[Path]) -> dict[str, tuple[Verdict, list[Leftover]]]:
    of_container: dict[str, list[Leftover]] = {}
    for leftover in found:
        of_container.setdefault(leftover.container_id, []).append(leftover)
    census = _census(caches) if found else _Census((), (), ())
    return {
        container_id: (census.verdict(container_id, frozenset(ip for one in of for ip in one.addresses)), of)
        for container_id, of in of_container.items()
    }


def _census(caches: Sequence[Path]) -> _Census:
    if not any(map(cache.exists, caches)):
        raise CNIError(
            Code.NOT_AVAILABLE,
            f"there is no cache of a runtime in {', '.join(map(str, caches))}, and without one it cannot be told which"
            " of portmap's containers exist: name it with --cache-dir",
        )
    interfaces, unreadable = [], []
    own = os.stat("/proc/thread-self/ns/net").st_ino
    for path in cache.entries(caches):
        try:
            interface = cache.interface(path)
        except ValueError:
            unreadable.append(path)
        else:
            interfaces += [interface] if interface else []
    census = _Census(tuple(interfaces), tuple(unreadable), tuple(namespaces.visible()))
    if interfaces:
        sees = any(not _is_gone(of) or _is_beside_others(of) for of in interfaces)
    else:
        sees = any(of.inode not in {0, own} for of in census.namespaces)
    if not sees and not namespaces.is_everything_visible():
        raise CNIError(
            Code.NOT_AVAILABLE,
            "no container's network namespace is seen at all: this process may not see the runtime's mounts and"
            " processes, and cannot tell who lives",
        )
    return census


def _is_gone(interface: cache.Interface) -> bool:
    return bool(interface.netns) and host.is_gone(interface.netns)


def _is_beside_others(interface: cache.Interface) -> bool:
    """Tell whether a namespace is, or was, where this process does see others."""
    directory = os.path.dirname(interface.netns)
    try:
        return any(host.is_namespace(os.path.join(directory, name)) for name in os.listdir(directory))
    except OSError:
        return False


def _inode(interface: cache.Interface) -> int:
    try:
        return os.stat(interface.netns).st_ino
    except OSError:
        return 0
