"""The network namespaces that this process can see, and the addresses in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from errno import EINVAL, ENOENT, ENOTDIR, ENOTTY, ESRCH
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import files, interfaces, netns, presence
from cni_hostport.kernel.addresses import listed
from cni_hostport.netlink import NETLINK_ROUTE, Netlink

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.addresses import Address

OWN_NAMESPACE = "/proc/self/ns/net"  # of this process: the node's
VANISHED = {ENOENT, ENOTDIR, ENOTTY, ESRCH}


@dataclass(frozen=True)
class Namespace:
    """A network namespace: its inode number, a path to it, and all addresses in it."""

    inode: int
    path: str
    addresses: frozenset[IPv4Address | IPv6Address]


def visible() -> Iterator[Namespace]:
    """Yield every network namespace that is mounted somewhere, or that a process is in; some of them are yielded twice.

    Where this process may not enter a namespace, its inode number is given as 0. Raises ``OSError`` if one cannot be
    looked at.
    """
    seen = set()
    processes = [f"/proc/{process}" for process in os.listdir("/proc") if process.isdecimal()]
    places = [(path, "") for path in _mounted()] + [(f"{process}/ns/net", process) for process in processes]
    for path, process in places:
        try:
            inode = os.stat(path).st_ino
            if inode not in seen:
                with netns.inside(path):
                    netlink = Netlink(NETLINK_ROUTE)
                seen.add(inode)
                yield Namespace(inode, path, frozenset(address.ip.ip for address in listed(netlink)))
        except PermissionError:
            if not process:
                raise
            yield Namespace(0, path, frozenset(_addresses_of(Path(process, "net"))))
        except OSError as error:
            if error.errno not in VANISHED:
                raise


@dataclass(frozen=True)
class PodInterface:
    """What there is of a pod's interface: why it is gone, empty if it is there, its addresses, and its note."""

    name: str
    place: str
    why_gone: str
    addresses: Collection[Address] = ()
    alias: str = ""

    def why_lost(self, pods: Iterable[IPv4Address | IPv6Address]) -> str:
        """Return which of a pod's addresses it does not have any more: a sentence, empty if it has them.

        An interface without any global address counts as one that has them: gVisor moves the addresses of its pods from
        the interface into a network stack of its own (google/gvisor, runsc/sandbox/network.go), where nobody else sees
        them.
        """
        present = {address.ip.ip for address in self.addresses}
        lost = [str(ip) for ip in pods if ip not in present]
        if not lost or not any(address.is_global for address in self.addresses):
            return ""
        return f"{self.name} in {self.place} does not have {', '.join(lost)} any more"


def pod_interface(path: str, ifname: str) -> PodInterface:
    """Look at a pod's interface in a network namespace.

    Raises ``CNIError`` (``Code.HOST_SETTING``) if it cannot be told whether the pod is there.
    """
    place = f"its network namespace {path}"
    if not path:
        raise CNIError(Code.HOST_SETTING, "its runtime does not tell its network namespace")
    try:
        identity = netns.identity(path)
        if not identity:
            return PodInterface(ifname, place, _why_absent(place, path))
        if identity == netns.identity(OWN_NAMESPACE):
            return PodInterface(ifname, place, f"{place} is that of the node now")
        with netns.inside(path):
            index, alias = interfaces.index_and_alias(ifname)
            present = listed(Netlink(NETLINK_ROUTE), index) if index else []
    except (OSError, ValueError) as error:
        raise CNIError(Code.HOST_SETTING, f"{place} cannot be looked at: {error}") from error
    return PodInterface(ifname, place, "" if index else f"{ifname} is gone from {place}", present, alias)


def _why_absent(place: str, path: str) -> str:
    """Return that there is no namespace, unless its runtime may have mounts that this process does not see."""
    if others_are_beside(path) or presence.sees_everything(path):
        return f"{place} is gone"
    raise CNIError(
        Code.HOST_SETTING,
        f"{place} is not seen, nor any other in the same place: run this where its runtime runs, with"
        " nsenter --mount --target PID-OF-THE-RUNTIME",
    )


def others_are_beside(path: str) -> bool:
    """Tell whether there are network namespaces in the directory in which one is, or was; raises ``OSError``."""
    directory = os.path.dirname(path)
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return False
    for name in names:
        try:
            if netns.identity(os.path.join(directory, name)):
                return True
        except OSError as error:
            if error.errno in presence.EXHAUSTED:
                raise
    return False


def addresses() -> list[Address]:
    """Return the addresses in this thread's network namespace; raises ``OSError``."""
    return listed(Netlink(NETLINK_ROUTE))


def _mounted() -> Iterator[str]:
    for line in files.text(Path("/proc/thread-self/mountinfo")).splitlines():
        fields = line.split(" ")  # proc_pid_mountinfo(5): the root of the mount is the fourth, its place the fifth
        if fields[3].startswith("net:["):
            yield presence.unescaped(fields[4])


def _addresses_of(directory: Path) -> Iterator[IPv4Address | IPv6Address]:
    """Yield the addresses that a process's ``/proc/PID/net`` shows, to those too who must not enter its namespace."""
    leaf = ""
    for line in _lines(directory / "fib_trie"):
        if line.lstrip().startswith("|-- "):
            leaf = line.split()[-1]
        elif line.endswith("/32 host LOCAL"):
            yield ip_address(leaf)
    for line in _lines(directory / "if_inet6"):
        yield ip_address(bytes.fromhex(line.partition(" ")[0]))


def _lines(path: Path) -> list[str]:
    try:
        return files.text(path).splitlines()  # a pod can give its interfaces names that are not UTF-8
    except OSError as error:
        if error.errno not in VANISHED | {EINVAL}:
            raise
        return []  # the process has ended, or there is no IPv6
