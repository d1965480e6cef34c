"""A probe: one packet, as a client would send it, that is traced through the node and dropped before it leaves it.

It comes in on the interface on which the client's would, or the pod's for an answer: a tap device of its own takes the
packet, and a traffic control filter redirects it to that interface. A client on the node itself needs no more than a
raw socket. Table and device are gone when their descriptors are closed, however this process ends; their names are such
that several can probe at once.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EINVAL, ENODEV
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.errors import NFTError
from cni_hostport.kernel import interfaces
from cni_hostport.kernel.nft import Nft
from cni_hostport.operate.explain.packet import Packet
from cni_hostport.operate.explain.trace import Hop, Tracer

if TYPE_CHECKING:
    from collections.abc import Iterator

    End = tuple[IPv4Address | IPv6Address, int]

TABLE = "hostport-probe"  # begins the names of these tables
DEVICE = b"hostport%d"  # the kernel counts
TUN = "/dev/net/tun"
UNWRITABLE = {'"', "*"}  # in a device's name: between quotes, nft takes one for their end, the other for a wildcard
# Hooks and priorities: before all that others do, and after it but before connection tracking remembers the connection.
# What a bridge passes to the node is another packet to the kernel's trace when it comes to forward or input.
CHAINS = {
    "prerouting": ("prerouting", -2000),
    "output": ("output", -2000),
    "forward": ("forward", -2000),
    "delivery": ("input", -2000),
    "input": ("input", 2000),
    "postrouting": ("postrouting", 2000),
}
ENDS = {"input", "postrouting"}
TRACKED, CONNECTION = "tracked", "ct mark . ct zone"
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000  # linux/if_tun.h
INGRESS, CLASS, EVERYTHING, ETH_P_ALL = 0xFFFF0000, 0x10000, "0x0/0x0+0", 0x0003
FIRST_EPHEMERAL, EPHEMERAL = 32768, 28232  # net.ipv4.ip_local_port_range, as the kernel has it by default


@dataclass(frozen=True)
class Way:
    """The way of a probe: the hops it was traced at, and where it ended.

    ``end`` is the last chain of the probe's at which it was seen: ``postrouting`` if it would have left the node, to
    ``destination`` on ``interface``, as from ``source``; ``input`` if a process of the node would have got it; another
    one if it did not come to either; and empty if it was not seen at all. ``tracked`` are mark and zone of the
    connection, ``None`` if connection tracking does not have it.
    """

    hops: tuple[Hop, ...]
    end: str
    destination: End | None
    interface: str
    source: End | None = None
    tracked: tuple[int, int] | None = None


def send(packet: Packet, interface: str, macs: tuple[bytes, bytes] | None = None) -> Way:
    """Send a packet, which comes in on an interface or, if that is empty, from the node itself; and follow it.

    ``macs`` are the addresses that its frame goes to and comes from, where that matters: on a port of a bridge.
    Raises ``OSError`` if there can be no such packet, and ``NFTError`` if it cannot be traced.
    """
    if interface and interface not in (name for _, name in socket.if_nameindex()):
        raise OSError(ENODEV, f"there is no interface {interface}")
    if not interface.isprintable() or UNWRITABLE & set(interface):
        raise OSError(EINVAL, f"the name of interface {interface} cannot be written in a command of nft's")
    nft, table = Nft(), f"{TABLE}-{secrets.token_hex(4)}"
    try:
        nft.run(list(_commands(table, packet, interface, CONNECTION)))
    except NFTError:  # a kernel without marks or zones of connections, if it is not something else
        nft.run(list(_commands(table, packet, interface)))
    try:
        hops = _come_in(packet, interface, macs, table) if interface else _go_out(packet, table)
        tracked = _tracked(nft, table)
    finally:
        nft.run([f"delete table inet {table}"])
    own = [hop for hop in hops if hop.table == table and hop.handle]
    others = tuple(hop for hop in hops if not hop.table.startswith(TABLE))
    if not own:
        return Way(others, "", None, "")
    last = own[-1]
    return Way(others, last.chain, _destination(last), _name(last.oif), _source(last), tracked)


def _commands(table: str, packet: Packet, interface: str, connection: str = "") -> Iterator[str]:
    yield f"add table inet {table} {{ flags owner; }}"
    if connection:
        yield f"add set inet {table} {TRACKED} {{ typeof {connection}; flags dynamic; }}"
    hooks = {name: f"{hook} priority {priority}" for name, (hook, priority) in CHAINS.items()}
    if interface:
        hooks["ingress"] = f'ingress device "{interface}" priority -2000'
    for name, hook in hooks.items():
        yield f"add chain inet {table} {name} {{ type filter hook {hook}; }}"
        actions = ["drop" if name in ENDS else "meta nftrace set 1"]
        if connection and name in ENDS:  # a rule that is not met where connection tracking does not have it
            actions.insert(0, f"add @{TRACKED} {{ {connection} }}")
        for action in actions:
            yield f"add rule inet {table} {name} {packet.match} {action}"
    # a rule that rejects it must not be heard by anybody
    for refusal in packet.refusals:
        yield f"add rule inet {table} output {refusal} drop"


def make(protocol: str, source: IPv4Address | IPv6Address, destination: IPv4Address | IPv6Address, port: int) -> Packet:
    """Return a packet like the first of a connection, that no other is mistaken for."""
    source_port = FIRST_EPHEMERAL + secrets.randbelow(EPHEMERAL)
    return Packet(protocol, source, source_port, destination, port, secrets.randbits(32))


def answer(packet: Packet, source: End, destination: End) -> Packet:
    """Return a packet like the first answer to one, from a pod to whom it takes for its client."""
    mark = secrets.randbits(32)
    return Packet(packet.protocol, *source, *destination, mark, packet.mark)


def _tracked(nft: Nft, table: str) -> tuple[int, int] | None:
    for item in nft.listing(f"set inet {table} {TRACKED}"):
        for element in item.get("set", {}).get("elem", ()):
            mark, zone = element["concat"]
            return int(mark), int(zone)
    return None


def _come_in(packet: Packet, interface: str, macs: tuple[bytes, bytes] | None, table: str) -> list[Hop]:
    with _tap(interface) as (tap, mac), Tracer() as tracer:
        os.write(tap, packet.frame(*macs or (mac,)))
        return tracer.follow(table, ENDS)


def _go_out(packet: Packet, table: str) -> list[Hop]:
    family = socket.AF_INET if packet.source.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP version
    failure = None
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw, Tracer() as tracer:
        try:
            raw.sendto(bytes(packet), (str(packet.destination), 0))
        except OSError as error:  # most often because it was dropped
            failure = error
        hops = tracer.follow(table, ENDS)
    if failure and not hops:
        raise failure
    return hops


@contextmanager
def _tap(interface: str) -> Iterator[tuple[int, bytes]]:
    """Have a device on which what is written comes in on an interface; gives its descriptor and its MAC address."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    tap = None
    try:
        tap = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        answer = fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TAP | IFF_NO_PI))
    except OSError as error:
        if tap is not None:
            os.close(tap)
        raise OSError(error.errno, f"{TUN} cannot be used: {error.strerror}") from error
    try:
        name = answer[:16].rstrip(b"\0").decode()
        with suppress(OSError):  # what it says for itself is no harm
            Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1")
        with IPRoute() as route:
            index = socket.if_nametoindex(name)
            towards = socket.if_nametoindex(interface)
            redirect = {"kind": "mirred", "direction": "ingress", "action": "redirect", "ifindex": towards}
            try:
                route.link("set", index=index, state="up")
                route.tc("add", "ingress", index)
                route.tc(
                    "add-filter",
                    "u32",
                    index,
                    parent=INGRESS,
                    protocol=ETH_P_ALL,
                    target=CLASS,
                    keys=[EVERYTHING],
                    action=redirect,
                )
                mac = next(iter(route.link("get", index=index))).get_attr("IFLA_ADDRESS")
            except NetlinkError as error:
                reason = f"tc cannot redirect a packet to {interface}: {os.strerror(error.code)}"
                raise OSError(error.code, reason) from error
        yield tap, bytes.fromhex(mac.replace(":", ""))
    finally:
        os.close(tap)


def _destination(hop: Hop) -> End | None:
    return _end(hop, slice(16, 20), slice(24, 40), slice(2, 4))


def _source(hop: Hop) -> End | None:
    return _end(hop, slice(12, 16), slice(8, 24), slice(2))


def _end(hop: Hop, in_ipv4: slice, in_ipv6: slice, port: slice) -> End | None:
    if not hop.header or not hop.transport:
        return None
    address = hop.header[in_ipv4 if hop.header[0] >> 4 == 4 else in_ipv6]  # noqa: PLR2004 - IP version
    return ip_address(address), int.from_bytes(hop.transport[port])


def _name(index: int) -> str:
    return interfaces.name(index) if index else ""
