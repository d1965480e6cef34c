"""Who lives on this node, as far as portmap's containers are concerned, of which no ruleset tells the namespace.

A container exists as long as that cannot be ruled out: a runtime's cache knows it and its network namespace is there,
or some namespace on this node has an address that its rules lead to, unless the cache says whose that is now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import namespaces, netns, presence
from cni_hostport.libcni import cache

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ipaddress import IPv4Address, IPv6Address
    from pathlib import Path

    Address = IPv4Address | IPv6Address


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
class Census:
    """Who lives on this node: what is known of interfaces, which files are not readable, and all namespaces."""

    interfaces: tuple[cache.Interface, ...]
    unreadable: tuple[Path, ...]
    namespaces: tuple[namespaces.Namespace, ...]

    @classmethod
    def take(cls, caches: Sequence[Path], newcomer: str = "") -> Census:
        """Look at the caches of runtimes and at all namespaces, but not at that of a ``newcomer``.

        That one has an address that may have been another's, and shows that the namespaces of containers are seen, so
        that no cache is needed. Raises ``CNIError`` or ``OSError`` if it cannot be told who lives.
        """
        if not newcomer and not any(map(cache.exists, caches)):
            raise CNIError(
                Code.NOT_AVAILABLE,
                f"there is no cache of a runtime in {', '.join(map(str, caches))}, and without one it cannot be told"
                " which of portmap's containers exist: name it with --cache-dir",
            )
        interfaces, unreadable = _known(caches)
        own = os.stat("/proc/thread-self/ns/net").st_ino
        left_out = os.stat(newcomer).st_ino if newcomer else own
        seen = tuple(namespaces.visible())
        if interfaces:
            sees = any(not _is_gone(of) or namespaces.others_are_beside(of.netns) for of in interfaces)
        else:
            sees = any(of.inode not in {0, own} for of in seen)
        if newcomer and left_out not in {of.inode for of in seen}:
            sees = False
        if not sees and not presence.sees_everything():
            raise CNIError(
                Code.NOT_AVAILABLE,
                "no container's network namespace is seen at all: this process may not see the runtime's mounts and"
                " processes, and cannot tell who lives",
            )
        return cls(interfaces, unreadable, tuple(of for of in seen if not newcomer or of.inode != left_out))

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


def _known(caches: Sequence[Path]) -> tuple[tuple[cache.Interface, ...], tuple[Path, ...]]:
    """Return the interfaces that caches tell of, and the files that cannot be read."""
    interfaces, unreadable = [], []
    for path in cache.entries(caches):
        try:
            interface = cache.interface(path)
        except ValueError:
            unreadable.append(path)
        else:
            interfaces += [interface] if interface else []
    return tuple(interfaces), tuple(unreadable)


def _is_gone(interface: cache.Interface) -> bool:
    """Tell whether there certainly is no network namespace at a path."""
    try:
        return bool(interface.netns) and not netns.identity(interface.netns)
    except (OSError, ValueError):
        return False


def _inode(interface: cache.Interface) -> int:
    """Return the inode of an interface's network namespace, 0 where that is not known."""
    try:
        return os.stat(interface.netns).st_ino
    except (OSError, ValueError):
        return 0
