"""The node outside of nftables: namespaces, routes, sysctls, connection tracking. The only importer of ``pyroute2``.

pyroute2 takes longer to import than most operations take to run, so that each function imports what it needs of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from contextlib import contextmanager
from errno import ENOENT, ENOTDIR, ENOTTY
from functools import cache
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from pathlib import Path
from socket import AF_INET, AF_INET6, IPPROTO_UDP
from sys import byteorder
from typing import TYPE_CHECKING, Any

from cni_hostport.errors import CNIError, Code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cni_hostport.plan import Forward

NS_GET_NSTYPE = 0xB703  # linux/nsfs.h: _IO(0xb7, 0x3)
CLONE_NEWNET = 0x40000000  # linux/sched.h
NETLINK_ROUTE, RTM_GETROUTE, RTA_DST, RTA_OIF = 0, 26, 1, 4  # linux/netlink.h, linux/rtnetlink.h
RTM_F_FIB_MATCH = 0x2000  # linux/rtnetlink.h: answer with the route that matches, and its prefix length
RTN_LOCAL = 2  # linux/rtnetlink.h
RT_SCOPE_UNIVERSE = 0  # linux/rtnetlink.h
FEW_PORTS = 16  # up to here one filtered dump for each port is cheaper than one of all UDP entries

Address = IPv4Address | IPv6Address
FAMILIES = {4: AF_INET, 6: AF_INET6}


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
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "cannot make a network namespace")
        try:
            yield
        finally:
            if libc.setns(own, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot return to the network namespace")
    finally:
        os.close(own)


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
    from pyroute2 import IPRoute
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
    from socket import if_indextoname

    from cni_hostport.netlink import Netlink, attribute, attributes

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


def forget_flows_elsewhere(forwards: Iterable[Forward], given: Callable[[], set[tuple[Address, int]]]) -> None:
    """Delete the UDP flows to these host ports on the node's own addresses that do not go to their pods.

    Such a flow was there before the mapping, and its translation, or the lack of it, would last as long as its client
    keeps sending. Flows to the same port number of other hosts are left alone, and so are those to the ports that
    ``given`` returns: (host address, port) that belong to mappings of that address, which beat those of any address.
    """
    by_port = {
        (forward.version, forward.host_ip, forward.host_port): forward
        for forward in forwards
        if forward.protocol == "udp"
    }
    given = cache(given)
    for version in {of for of, _, _ in by_port}:
        local = _LocalAddresses(version)

        def is_elsewhere(flow: _Flow, version: int = version, local: _LocalAddresses = local) -> bool:
            exact = by_port.get((version, flow.dst, flow.dport))
            forward = exact or by_port.get((version, None, flow.dport))
            if forward is None or flow.target == (forward.pod_ip, forward.container_port):
                return False
            return exact is not None or (flow.dst in local and (flow.dst, flow.dport) not in given())

        _forget(version, {port for of, _, port in by_port if of == version}, is_elsewhere)


def forget_flows_to(pod_ips: Iterable[Address | bytes], ports: Iterable[tuple[Address | bytes | None, int]]) -> None:
    """Delete the UDP flows that were translated from these host ports to these pods.

    ``ports`` are (host address or ``None`` for any, host port); an address can be packed.
    """
    pods = {ip_address(pod_ip) for pod_ip in pod_ips}
    mapped = {(None if address is None else ip_address(address), port) for address, port in ports}
    for version in {pod_ip.version for pod_ip in pods}:
        local = _LocalAddresses(version)

        def is_ours(flow: _Flow, local: _LocalAddresses = local) -> bool:
            if flow.target[0] not in pods or flow.dst in pods:
                return False
            return (flow.dst, flow.dport) in mapped or ((None, flow.dport) in mapped and flow.dst in local)

        _forget(version, {port for _, port in mapped}, is_ours)


class _Flow:
    """A conntrack entry: where the client sent to, and who answers."""

    def __init__(self, original: Any, reply: Any) -> None:
        self.original = original
        self.dst, self.dport = ip_address(original.daddr), original.dport
        self.target = (ip_address(reply.saddr), reply.sport)


class _LocalAddresses:
    """The addresses that packets are delivered to on this node, as ``fib daddr type local`` sees them."""

    def __init__(self, version: int) -> None:
        self._family = FAMILIES[version]
        self._known: dict[Address, bool] = {}

    def __contains__(self, address: Address) -> bool:
        if address not in self._known:
            from pyroute2 import IPRoute
            from pyroute2.netlink.exceptions import NetlinkError

            try:
                with IPRoute() as route:
                    found = next(iter(route.route("get", dst=str(address), family=self._family)))
                self._known[address] = found["type"] == RTN_LOCAL
            except NetlinkError:
                self._known[address] = False
        return self._known[address]


def _forget(version: int, ports: set[int], unwanted: Callable[[_Flow], bool]) -> None:
    """Delete the unwanted ones of the UDP flows whose clients send to one of these ports."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

    family = FAMILIES[version]
    # The kernel filters: a busy node has hundreds of thousands of entries. But only by port, since it compares IPv6
    # addresses the wrong way round (net/netfilter/nf_conntrack_netlink.c, ctnetlink_filter_match_tuple).
    selectors = [{"dport": port} for port in ports] if len(ports) <= FEW_PORTS else [{}]
    with NFCTSocket(nfgen_family=family) as conntrack:
        for selector in selectors:
            wanted = NFCTAttrTuple(family=family, proto=IPPROTO_UDP, **selector)
            flows = [
                _Flow(
                    NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_ORIG")),
                    NFCTAttrTuple.from_netlink(family, entry.get_attr("CTA_TUPLE_REPLY")),
                )
                for entry in conntrack.dump(tuple_orig=wanted)
                if entry.get_attr("CTA_ZONE") is None  # a tuple names an entry of the default zone only
            ]
            for flow in filter(unwanted, flows):
                try:
                    conntrack.entry("del", tuple_orig=flow.original)
                except NetlinkError as error:
                    if error.code != ENOENT:  # it ended by itself
                        raise
