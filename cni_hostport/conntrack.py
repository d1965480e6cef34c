"""Connection tracking of UDP: an established flow keeps its translation, whatever becomes of the rules.

Nobody else's flows are touched: those to the same port number of another host, or of another mapping. All this is a
courtesy to clients that are already talking: what goes wrong is logged, and fails no operation.
"""

from __future__ import annotations

from errno import ENOENT
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import AF_INET, AF_INET6, IPPROTO_UDP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from cni_hostport.plan import Forward

RTN_LOCAL = 2  # linux/rtnetlink.h
FEW_PORTS = 16  # up to here one filtered dump for each port is cheaper than one of all UDP entries

Address = IPv4Address | IPv6Address
FAMILIES = {4: AF_INET, 6: AF_INET6}


def forget_elsewhere(
    forwards: Iterable[Forward], given: Callable[[], set[tuple[Address, int]]], log: Callable[[str], None]
) -> None:
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

        _forget(version, {port for of, _, port in by_port if of == version}, is_elsewhere, log)


def forget_to(
    pod_ips: Iterable[Address | bytes], ports: Iterable[tuple[Address | bytes | None, int]], log: Callable[[str], None]
) -> None:
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

        _forget(version, {port for _, port in mapped}, is_ours, log)


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


def _forget(version: int, ports: set[int], unwanted: Callable[[_Flow], bool], log: Callable[[str], None]) -> None:
    """Delete the unwanted ones of the UDP flows whose clients send to one of these ports."""
    try:
        _delete_flows(version, ports, unwanted)
    except Exception as error:  # noqa: BLE001 - whatever it is, the ports are installed or gone as they should be
        log(f"warning: UDP connection tracking entries were not deleted: {type(error).__name__}: {error}")


def _delete_flows(version: int, ports: set[int], unwanted: Callable[[_Flow], bool]) -> None:
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
