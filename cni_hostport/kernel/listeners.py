"""Programs of the node that listen on a host port which now leads to a container.

A kernel socket is no obstacle to a translation: the program keeps its connections and gets no new ones. Sockets are
asked of the kernel by protocol and family, not one by one. Numbers and layouts are those of linux/sock_diag.h,
linux/inet_diag.h and include/net/tcp_states.h.
"""

from __future__ import annotations

import struct
from _socket import AF_INET, AF_INET6
from ipaddress import IPv4Address, IPv6Address

from cni_hostport.netlink import NLM_F_DUMP, Netlink, attribute, attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.attachment import Attachment
    from cni_hostport.log import Log
    from cni_hostport.ruleset.plan import Forward, Plan

    Address = IPv4Address | IPv6Address

NETLINK_SOCK_DIAG = 4  # linux/netlink.h
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_SKV6ONLY = 11
TCP_CLOSE, TCP_LISTEN = 7, 10
# protocol number, and the state of a socket that takes whoever comes; to ask for SCTP would load a module of the kernel
STATES = {"tcp": (6, TCP_LISTEN), "udp": (17, TCP_CLOSE)}
# by IP version, the families of the sockets that can take its connections
SOCKET_FAMILIES: dict[int, tuple[int, ...]] = {4: (AF_INET, AF_INET6), 6: (AF_INET6,)}
_REQUEST = struct.Struct("=BBBxL48x")  # struct inet_diag_req_v2: family, protocol, extensions, states
INET_DIAG_REQ_BYTECODE, JUMP, OWN_PORT_IS = 1, 1, 11
# struct inet_diag_bc_op: code; how many bytes to go on by if the condition holds, and how many if not
_OPERATION = struct.Struct("=BBH")
MAX_PORTS_ASKED = 64  # ports in a question; the kernel's check of it grows with the square
_ATTRIBUTES_AT = 72  # the size of struct inet_diag_msg
_OWN_PORT, _PEERS_PORT, _OWN_ADDRESS = slice(4, 6), slice(6, 8), slice(8, 24)


def tell(attachment: Attachment, plan: Plan, log: Log) -> None:
    """Say of each host port of an installed plan that a program of this node listens on it, if one does.

    Where the kernel does not tell, nothing is said.
    """
    hidden: dict[str, dict[str, None]] = {}
    try:
        for forward, address in shadowed(plan):
            hidden.setdefault(str(forward), {})[str(address)] = None
    except OSError:
        return
    for port, addresses in hidden.items():
        from cni_hostport.log import announce

        announce(
            log,
            f"host port {port}: a program of this node listens on it at {', '.join(addresses)};"
            f" its new connections go to container {attachment.container_id} ({attachment.ifname})",
        )


def shadowed(plan: Plan) -> Iterator[tuple[Forward, Address]]:
    """Return each forward that takes connections of a program in this network namespace, and where that listens.

    Raises ``OSError`` where the kernel does not tell.
    """
    wanted: dict[tuple[str, int], list[Forward]] = {}
    for forward in plan.forwards:
        if forward.protocol in STATES:
            for family in SOCKET_FAMILIES[forward.version]:
                wanted.setdefault((forward.protocol, family), []).append(forward)
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        for (protocol, family), forwards in wanted.items():
            by_port: dict[bytes, list[Forward]] = {}
            for forward in forwards:
                by_port.setdefault(forward.host_port.to_bytes(2), []).append(forward)
            for port, address, is_for_both in _listening(netlink, protocol, family, set(by_port)):
                for forward in by_port[port]:
                    if (address.is_unspecified and is_for_both) or _covers(plan, forward, address):
                        yield forward, address


def busy(protocol: str, ports: set[int]) -> set[int]:
    """Return those of some ports on which a program in this network namespace listens, at whichever address.

    Raises ``OSError`` where the kernel does not tell.
    """
    wanted = {port.to_bytes(2) for port in ports}
    if protocol not in STATES or not wanted:
        return set()
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        found = (port for family in SOCKET_FAMILIES[4] for port, _, _ in _listening(netlink, protocol, family, wanted))
        return {int.from_bytes(port) for port in found}


def _listening(
    netlink: Netlink, protocol: str, family: int, ports: set[bytes]
) -> Iterator[tuple[bytes, Address, bool]]:
    """Return port, address and whether it is for IPv4 as well of each socket of a family that listens on a port."""
    number, state = STATES[protocol]
    request = _REQUEST.pack(family, number, 0, 1 << state)
    if len(ports) <= MAX_PORTS_ASKED:
        request += attribute(INET_DIAG_REQ_BYTECODE, _one_of(ports))
    [(error, answers)] = netlink.ask([(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request)])
    if error:
        raise OSError(error, "the kernel does not tell its sockets")
    for answer in answers:
        if answer[_OWN_PORT] in ports and answer[_PEERS_PORT] == bytes(2):
            address = answer[_OWN_ADDRESS]
            if family == AF_INET:
                yield answer[_OWN_PORT], IPv4Address(address[:4]), False
            else:
                only6 = dict(attributes(answer[_ATTRIBUTES_AT:])).get(INET_DIAG_SKV6ONLY) == b"\1"
                yield answer[_OWN_PORT], IPv6Address(address).ipv4_mapped or IPv6Address(address), not only6


def _one_of(ports: set[bytes]) -> bytes:
    """Return the program that lets the kernel answer with the sockets of these ports only.

    A socket is answered with if the program ends at its very end, and is not where it would go on behind that.
    """
    program = b""
    for remaining, port in zip(range(len(ports), 0, -1), ports, strict=True):
        compare, end = 2 * _OPERATION.size, remaining * 3 * _OPERATION.size
        following = compare + _OPERATION.size if remaining > 1 else end + _OPERATION.size
        program += _OPERATION.pack(OWN_PORT_IS, compare, following)
        program += _OPERATION.pack(0, 0, int.from_bytes(port))
        program += _OPERATION.pack(JUMP, _OPERATION.size, end - compare)
    return program


def _covers(plan: Plan, forward: Forward, address: Address) -> bool:
    """Tell whether a plan's forward takes connections to an address on which a socket listens."""
    if address.version != forward.version:
        return False
    if address.is_unspecified:
        return True
    if forward.host_ip is not None:
        return address == forward.host_ip
    networks = plan.host_addresses[forward.version]
    if networks and not any(address in network for network in networks):
        return False
    return address.version == 4 or not (address.is_loopback or address.is_link_local)  # noqa: PLR2004 - IP version
