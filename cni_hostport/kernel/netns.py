"""The node outside of nftables: namespaces, addresses, routes, sysctls."""

from __future__ import annotations

import ctypes
import fcntl
import os
from _socket import AF_INET, AF_INET6, AF_UNIX, SOCK_DGRAM, SOL_SOCKET, socket
from contextlib import contextmanager, suppress
from errno import EACCES, EHOSTUNREACH, EINVAL, ENETUNREACH, ENOENT, ENOPROTOOPT, ENOTDIR, ENOTTY, EPERM
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from struct import Struct
from sys import byteorder
from typing import NamedTuple

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import interfaces
from cni_hostport.netlink import NETLINK_ROUTE, SOCK_CLOEXEC, Netlink, attribute, attributes
from cni_hostport.ruleset.plan import Way

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from ipaddress import IPv4Address, IPv6Address

NS_GET_NSTYPE = 0xB703  # linux/nsfs.h: _IO(0xb7, 0x3)
CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
RTM_GETROUTE, RTA_DST, RTA_OIF = 26, 1, 4  # linux/rtnetlink.h
RTM_F_FIB_MATCH = 0x2000  # linux/rtnetlink.h: answer with the route that matches, and its prefix length
RTN_LOCAL = 2  # linux/rtnetlink.h
KINDS_OF_ONE_POD = (
    "veth",
    "netkit",
    "tun",
)  # with a host route; others, such as a macvlan, have neighbours on the link
# struct rtmsg (linux/rtnetlink.h): family, destination's and source's prefix length, tos, table, protocol, scope, type,
# flags
RTMSG = Struct("=BBBBBBBBL")
FAMILIES = {4: AF_INET, 6: AF_INET6}
RT_SCOPE_UNIVERSE = 0  # linux/rtnetlink.h
# no route, and what routes of the types unreachable, prohibit and blackhole say (net/ipv4/fib_semantics.c, fib_props)
UNROUTED = {ENETUNREACH, EHOSTUNREACH, EACCES, EINVAL}
GONE = {ENOENT, ENOTDIR, ENOTTY}  # what says that there is no namespace at a path


@contextmanager
def namespace(path: str, directory: int | None = None) -> Iterator[int]:
    """Open a network namespace; a relative path begins at an open ``directory``.

    Raises ``OSError``, with one of the numbers ``GONE`` if there is none at ``path``.
    """
    # O_NONBLOCK: whatever the path has become, a FIFO included, opening it does not wait
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    try:
        if fcntl.ioctl(descriptor, NS_GET_NSTYPE) != CLONE_NEWNET:
            raise OSError(ENOTTY, "not a network namespace", path)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def scratch_namespace() -> Iterator[None]:
    """Run the block in a network namespace of its own, which lasts as long as what was opened in it.

    Raises ``OSError`` if the kernel refuses one.
    """
    with _in(_unshare):
        yield


def _unshare() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Run the block in the network namespace at ``path``; raises ``OSError`` if there is none, or no way in."""
    with namespace(path) as descriptor, _in(lambda: enter_namespace(descriptor)):
        yield


@contextmanager
def _in(enter: Callable[[], None]) -> Iterator[None]:
    """Run the block in the network namespace that a function enters.

    Raises ``OSError`` if this thread's own cannot be noted or left, and ``CNIError`` if it cannot come back to that.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter()
        try:
            yield
        finally:
            try:
                enter_namespace(own)
            except OSError as error:  # nothing may be done in the other one
                reason = f"cannot come back to this network namespace: {error}"
                raise CNIError(Code.HOST_SETTING, reason) from error
    finally:
        os.close(own)


def enter_namespace(descriptor: int) -> None:
    """Move this thread to a network namespace; raises ``OSError``."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def identity(path: str) -> str:
    """Return what tells the network namespace at ``path`` from others, ``<device>:<inode>``; empty if there is none.

    Raises ``OSError`` where it cannot be told.
    """
    try:
        with namespace(path) as descriptor:
            return file_identity(descriptor)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return ""


def cookie(namespace: int) -> str:
    """Return the number that an open network namespace alone has, until the node is started again.

    It is empty on kernels that do not tell it (before 5.14), and where this process may not enter the namespace. Raises
    ``OSError`` where there is another reason.
    """
    try:
        with _in(lambda: enter_namespace(namespace)):
            asking = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
            try:
                return str(int.from_bytes(asking.getsockopt(SOL_SOCKET, SO_NETNS_COOKIE, 8), byteorder))
            finally:
                asking.close()
    except OSError as error:
        if error.errno not in {ENOPROTOOPT, EPERM}:
            raise
        return ""


def file_identity(descriptor: int) -> str:
    """Return device and inode of an open file."""
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"


def pod_addresses(netns: str, ifname: str) -> list[IPv4Interface | IPv6Interface]:
    """Return the global addresses of a pod's interface, in the kernel's order; none if it has none.

    Raises ``CNIError`` with code 102 if the namespace cannot be entered.
    """
    from pyroute2 import IPRoute  # takes longer to import than an operation takes to run
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        # given the namespace, IPRoute would fork, and the child would answer the call as well where it fails
        with inside(netns), IPRoute() as route:
            index = route.link_lookup(ifname=ifname)
            found = [
                message
                for message in (route.get_addr(index=index[0]) if index else ())
                if message["scope"] == RT_SCOPE_UNIVERSE
            ]
    except (OSError, ValueError, NetlinkError) as error:
        raise CNIError(
            Code.HOST_SETTING, f"cannot read the addresses of {ifname} in CNI_NETNS {netns!r}: {error}"
        ) from error
    # of a point-to-point link, "address" is the peer's
    return [
        ip_interface(f"{message.get('local') or message.get('address')}/{message['prefixlen']}") for message in found
    ]


class Route(NamedTuple):
    """How the kernel routes an address: the index of the interface, the prefix length of the route, and its type."""

    interface: int
    prefix_length: int
    type: int


class NoRouteError(OSError):
    """The kernel has no route to an address."""


def route_to(address: IPv4Address | IPv6Address) -> Route:
    """Return the route to an address from this thread's network namespace.

    Raises ``NoRouteError`` where there is none, another ``OSError`` where the kernel cannot be asked. This is asked on
    every ADD, in less time than pyroute2 takes to import.
    """
    question = RTMSG.pack(FAMILIES[address.version], address.max_prefixlen, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)
    with Netlink(NETLINK_ROUTE) as netlink:
        [(error, answers)] = netlink.ask([(RTM_GETROUTE, 0, question + attribute(RTA_DST, address.packed))])
    if error in UNROUTED:
        raise NoRouteError(error, os.strerror(error))
    if error:
        raise OSError(error, os.strerror(error))
    _, prefix_length, _, _, _, _, _, kind, _ = RTMSG.unpack_from(answers[0])
    index = dict(attributes(answers[0][RTMSG.size :])).get(RTA_OIF, b"")
    return Route(int.from_bytes(index, byteorder), prefix_length, kind)


def is_local(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether the node takes an address for its own, as it does all of 127.0.0.0/8 and what has a local route.

    Raises ``OSError`` if the kernel cannot be asked.
    """
    try:
        return route_to(address).type == RTN_LOCAL
    except NoRouteError:
        return False


def ways_to(addresses: Sequence[IPv4Interface | IPv6Interface]) -> dict[IPv4Address | IPv6Address, Way]:
    """Return how the node reaches the first address of each family, if by another route than the default one.

    Raises ``OSError`` if the kernel cannot be asked.
    """
    ways = {}
    for address in {address.version: address.ip for address in reversed(addresses)}.values():
        with suppress(NoRouteError):
            route = route_to(address)
            if route.prefix_length and route.type != RTN_LOCAL:
                is_host_route = route.prefix_length == address.max_prefixlen
                ways[address] = Way(
                    route.interface, is_host_route and interfaces.kind(route.interface) in KINDS_OF_ONE_POD
                )
    return ways
