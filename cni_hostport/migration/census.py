"""Whether portmap's containers exist: no ruleset tells their network namespaces, as this plugin's does.

A container counts as gone only where both are certain. No runtime's cache knows it, or its network namespace is not
there. And no namespace on this node has an address that its rules lead to, or the cache says whose that is now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import namespaces, netns, presence
from cni_hostport.libcni import cache, directory

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
    """What is known of this node's containers: their interfaces, the files that are unreadable, and all namespaces."""

    interfaces: tuple[cache.Interface, ...]
    unreadable: tuple[Path, ...]
    namespaces: tuple[namespaces.Namespace, ...]

    @classmethod
    def take(cls, caches: Sequence[Path], newcomer: str = "") -> Census:
        """Look at the caches of runtimes and at all namespaces.

        ``newcomer`` is the path of the namespace of a container that is being added. It is left out, since it may have
        the former address of another. Where it is seen, those of other containers would be seen as well, and no cache
        is needed. Raises ``CNIError`` or ``OSError`` if it cannot be told who lives.
        """
        if not newcomer and not any(map(directory.exists, caches)):
            raise CNIError(
                Code.NOT_AVAILABLE,
                f"there is no cache of a runtime in {', '.join(map(str, caches))}, and without one it cannot be told"
                " which of portmap's containers exist: name it with --cache-dir",
            )
        interfaces, unreadable = _known(caches)
        nodes_inode = os.stat("/proc/thread-self/ns/net").st_ino
        newcomers_inode = os.stat(newcomer).st_ino if newcomer else None
        visible = tuple(namespaces.visible())
        inodes = {namespace.inode for namespace in visible}
        if interfaces:
            sees_containers = any(
                not _is_gone(interface) or namespaces.others_are_beside(interface.netns) for interface in interfaces
            )
        else:
            sees_containers = bool(inodes - {0, nodes_inode})
        if newcomer and newcomers_inode not in inodes:
            sees_containers = False
        if not sees_containers and not presence.sees_everything():
            raise CNIError(
                Code.NOT_AVAILABLE,
                "no container's network namespace is seen at all: this process may not see the runtime's mounts and"
                " processes, and cannot tell who lives",
            )
        others = tuple(namespace for namespace in visible if namespace.inode != newcomers_inode)
        return cls(interfaces, unreadable, others)

    def verdict(self, container_id: str, addresses: frozenset[Address]) -> Verdict:
        """Tell what became of a container whose rules lead to these addresses."""
        present = [interface for interface in self.interfaces if not _is_gone(interface)]
        for interface in present:
            if interface.container_id == container_id:
                place = interface.netns or "?"
                return Verdict(Fate.EXISTS, f"its runtime's cache has it, with network namespace {place}")
        for path in self.unreadable:
            if container_id in path.name:
                return Verdict(Fate.UNKNOWN, f"{path} cannot be read")
        if not addresses:
            return Verdict(Fate.UNKNOWN, "its rules lead to no address")
        heirs = []
        for address in sorted(addresses, key=str):
            others = {_inode(interface): interface for interface in present if address in interface.addresses}
            for namespace in self.namespaces:
                if address in namespace.addresses and namespace.inode not in others:
                    return Verdict(Fate.EXISTS, f"its address {address} is in network namespace {namespace.path}")
            heirs += [f"{address} is now that of container {interface.container_id}" for interface in others.values()]
        return Verdict(Fate.GONE, "no runtime's cache and no network namespace on this node has it", tuple(heirs))


def _known(caches: Sequence[Path]) -> tuple[tuple[cache.Interface, ...], tuple[Path, ...]]:
    """Return the interfaces that caches tell of, and the files that cannot be read."""
    interfaces, unreadable = [], []
    for path in directory.entries(caches):
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
