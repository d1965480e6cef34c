"""The node outside of nftables: namespaces, addresses, routes, sysctls."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from contextlib import contextmanager
from errno import ENOENT, ENOTDIR, ENOTTY
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from socket import AF_INET, if_indextoname
from sys import byteorder

from cni_hostport.errors import CNIError, Code
from cni_hostport.netlink import Netlink, attribute, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from ipaddress import IPv4Address

NS_GET_NSTYPE = 0xB703  # linux/nsfs.h: _IO(0xb7, 0x3)
CLONE_NEWNET = 0x40000000  # linux/sched.h
NETLINK_ROUTE, RTM_GETROUTE, RTA_DST, RTA_OIF = 0, 26, 1, 4  # linux/netlink.h, linux/rtnetlink.h
RTM_F_FIB_MATCH = 0x2000  # linux/rtnetlink.h: answer with the route that matches, and its prefix length
RT_SCOPE_UNIVERSE = 0  # linux/rtnetlink.h


@contextmanager
def _namespace(path: str) -> Iterator[int]:
    """Open a network namespace; raises ``OSError`` if there is none at ``path``."""
    # O_NONBLOCK: whatever the path has become, a FIFO included, opening it does not wait
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
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
    with _return():
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot make a network namespace")
        yield


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Run the block in the network namespace at ``path``; raises ``OSError`` if there is none, or no way in."""
    with _namespace(path) as descriptor, _return():
        enter_namespace(descriptor)
        yield


@contextmanager
def _return() -> Iterator[None]:
    """Come back to this thread's network namespace at the end of the block."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        try:
            enter_namespace(own)
        finally:
            os.close(own)


def enter_namespace(descriptor: int) -> None:
    """Move this thread to a network namespace; raises ``OSError``."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def is_namespace(path: str) -> bool:
    """Tell whether there is a network namespace at ``path`` now."""
    try:
        with _namespace(path):
            return True
    except (OSError, ValueError):
        return False


def is_gone(path: str) -> bool:
    """Tell whether there is certainly no network namespace at ``path``, as opposed to one that cannot be looked at."""
    try:
        with _namespace(path):
            return False
    except OSError as error:
        return error.errno in {ENOENT, ENOTDIR, ENOTTY}


def pod_addresses(netns: str, ifname: str) -> list[IPv4Interface | IPv6Interface]:
    """Return the global addresses of a pod's interface, in the kernel's order; none if it has none.

    Raises ``CNIError`` with code 102 if the namespace cannot be entered.
    """
    from pyroute2 import IPRoute  # takes longer to import than an operation takes to run
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with _namespace(netns) as descriptor, IPRoute(netns=descriptor) as route:
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


def route_localnet(pod_ip: IPv4Address, log: Callable[[str], None]) -> None:
    """Let connections from the node's 127.0.0.0/8 leave on the interface towards the pod.

    Without a route of its own to the pod there is no such interface, which is only logged: the plugin that adds it may
    come later. Raises ``CNIError`` with code 102 if the sysctl, not yet set, cannot be written.
    """
    interface, reason = "", "only the default route leads there"
    try:
        interface = _interface_towards(pod_ip)
    except OSError as error:
        reason = error.strerror or str(error)
    if not interface:
        log(f"host ports on 127.0.0.1 may not work: there is no route to the pod's address {pod_ip}: {reason}")
        return
    setting = Path("/proc/sys/net/ipv4/conf", interface, "route_localnet")
    try:
        if setting.read_text().strip() != "1":
            setting.write_text("1")
    except OSError as error:
        raise CNIError(
            Code.HOST_SETTING,
            f"cannot set {setting} to 1, which host ports on 127.0.0.1 need"
            f' (with "snat": false they are not offered): {error.strerror}',
        ) from error


def _interface_towards(address: IPv4Address) -> str:
    """Return the interface to which the kernel routes an address, empty if that is by the default route.

    Raises ``OSError`` where there is no route. This is asked on every ADD, in less time than pyroute2 takes to import.
    """
    # struct rtmsg (linux/rtnetlink.h): family, destination's and source's prefix length, tos, table, protocol, scope,
    # type, flags
    rtmsg = struct.Struct("=BBBBBBBBL")
    question = rtmsg.pack(AF_INET, address.max_prefixlen, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH)
    [(error, answers)] = Netlink(NETLINK_ROUTE).ask([(RTM_GETROUTE, 0, question + attribute(RTA_DST, address.packed))])
    if error:
        raise OSError(error, os.strerror(error))
    prefix_length = rtmsg.unpack_from(answers[0])[1]
    index = dict(attributes(answers[0][rtmsg.size :])).get(RTA_OIF)
    return if_indextoname(int.from_bytes(index, byteorder)) if prefix_length and index else ""
