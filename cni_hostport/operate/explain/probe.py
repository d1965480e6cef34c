"""A probe: one packet, built as a client or a pod would send it, whose path through the node is traced.

A probe from outside comes in on the interface on which the real packet would, by a tap device. A probe from the node
itself is sent by a raw socket. A table of the probe's own has chains at the hooks: the first chains switch on the
kernel's trace for the packet, and the last ones drop it before it leaves the node or comes to a process. The kernel
deletes the table when this process ends, however that happens. Several probes can run at once: each has another name
for its table, and another mark in its packet.
"""

from __future__ import annotations

import os
import secrets
import socket
from errno import EINVAL, ENODEV
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cni_hostport.errors import NFTError
from cni_hostport.kernel import interfaces
from cni_hostport.kernel.nft import Nft
from cni_hostport.netlink import ADDRESS_FAMILIES
from cni_hostport.operate.explain.packet import Packet
from cni_hostport.operate.explain.tap_device import tap_device
from cni_hostport.operate.explain.trace import Trace, Tracer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.explain.packet import Endpoint, IPAddress
    from cni_hostport.operate.explain.trace import Hop

TABLE_PREFIX = "hostport-probe"  # of the names of probes' tables
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
LAST_CHAINS = {"input", "postrouting"}
CONNTRACK_SET, CONNTRACK_KEY = "tracked", "ct mark . ct zone"
FIRST_EPHEMERAL_PORT, EPHEMERAL_PORTS = 32768, 28232  # net.ipv4.ip_local_port_range, as the kernel has it by default


def first_packet(protocol: str, source: IPAddress, destination: IPAddress, port: int) -> Packet:
    """Return a packet like the first one of a connection, with a mark that no other packet has."""
    source_port = FIRST_EPHEMERAL_PORT + secrets.randbelow(EPHEMERAL_PORTS)
    return Packet(protocol, source, source_port, destination, port, secrets.randbits(32))


def answer_packet(packet: Packet, source: Endpoint, destination: Endpoint) -> Packet:
    """Return the packet with which a pod would answer ``packet``.

    ``source`` is the pod's side. ``destination`` is the side that the pod takes for its client.
    """
    mark = secrets.randbits(32)
    return Packet(packet.protocol, *source, *destination, mark, packet.mark)


def send(packet: Packet, interface: str, macs: tuple[bytes, bytes] | None = None) -> Trace:
    """Send a packet into the node and return its trace.

    It comes in on ``interface``; if that is empty, the node itself sends it. ``macs`` are the destination and the
    source of its Ethernet frame; they matter on a port of a bridge. Raises ``OSError`` if there can be no such packet,
    and ``NFTError`` if it cannot be traced.
    """
    if interface and interface not in (name for _, name in socket.if_nameindex()):
        raise OSError(ENODEV, f"there is no interface {interface}")
    if not interface.isprintable() or UNWRITABLE & set(interface):
        raise OSError(EINVAL, f"the name of interface {interface} cannot be written in a command of nft's")
    nft, table = Nft(), f"{TABLE_PREFIX}-{secrets.token_hex(4)}"
    try:
        nft.run(list(_table_commands(table, packet, interface, CONNTRACK_KEY)))
    except NFTError:  # a kernel without marks or zones of connections, if it is not something else
        nft.run(list(_table_commands(table, packet, interface)))
    try:
        hops = _send_from_outside(packet, interface, macs, table) if interface else _send_from_node(packet, table)
        mark_and_zone = _mark_and_zone(nft, table)
    finally:
        nft.run([f"delete table inet {table}"])
    probe_hops = [hop for hop in hops if hop.table == table and hop.handle]
    node_hops = tuple(hop for hop in hops if not hop.table.startswith(TABLE_PREFIX))
    if not probe_hops:
        return Trace(node_hops, "", None, "")
    last = probe_hops[-1]
    interface_out = interfaces.name(last.oif) if last.oif else ""
    return Trace(node_hops, last.chain, _destination(last), interface_out, _source(last), mark_and_zone)


def _table_commands(table: str, packet: Packet, interface: str, conntrack_key: str = "") -> Iterator[str]:
    """Yield the commands for the probe's table; with ``conntrack_key``, its set holds that key of the connection."""
    yield f"add table inet {table} {{ flags owner; }}"
    if conntrack_key:
        yield f"add set inet {table} {CONNTRACK_SET} {{ typeof {conntrack_key}; flags dynamic; }}"
    hooks = {name: f"{hook} priority {priority}" for name, (hook, priority) in CHAINS.items()}
    if interface:
        hooks["ingress"] = f'ingress device "{interface}" priority -2000'
    for name, hook in hooks.items():
        yield f"add chain inet {table} {name} {{ type filter hook {hook}; }}"
        actions = ["drop" if name in LAST_CHAINS else "meta nftrace set 1"]
        if conntrack_key and name in LAST_CHAINS:  # a rule that is not met where connection tracking does not have it
            actions.insert(0, f"add @{CONNTRACK_SET} {{ {conntrack_key} }}")
        for action in actions:
            yield f"add rule inet {table} {name} {packet.match} {action}"
    # where a rule rejects the probe, nobody must hear of that
    for refusal in packet.refusals:
        yield f"add rule inet {table} output {refusal} drop"


def _mark_and_zone(nft: Nft, table: str) -> tuple[int, int] | None:
    for item in nft.listing(f"set inet {table} {CONNTRACK_SET}"):
        for element in item.get("set", {}).get("elem", ()):
            mark, zone = element["concat"]
            return int(mark), int(zone)
    return None


def _send_from_outside(packet: Packet, interface: str, macs: tuple[bytes, bytes] | None, table: str) -> list[Hop]:
    with tap_device(interface) as (descriptor, mac), Tracer() as tracer:
        os.write(descriptor, packet.frame(*macs or (mac,)))
        return tracer.follow(table, LAST_CHAINS)


def _send_from_node(packet: Packet, table: str) -> list[Hop]:
    family = ADDRESS_FAMILIES[packet.source.version]
    failure = None
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw, Tracer() as tracer:
        try:
            raw.sendto(bytes(packet), (str(packet.destination), 0))
        except OSError as error:  # most often because it was dropped
            failure = error
        hops = tracer.follow(table, LAST_CHAINS)
    if failure and not hops:
        raise failure
    return hops


def _destination(hop: Hop) -> Endpoint | None:
    return _endpoint(hop, slice(16, 20), slice(24, 40), slice(2, 4))


def _source(hop: Hop) -> Endpoint | None:
    return _endpoint(hop, slice(12, 16), slice(8, 24), slice(2))


def _endpoint(hop: Hop, in_ipv4: slice, in_ipv6: slice, port: slice) -> Endpoint | None:
    """Read an address and a port at these places of the packet's headers, ``None`` if the trace does not have them."""
    if not hop.network_header or not hop.transport_header:
        return None
    is_ipv4 = hop.network_header[0] >> 4 == 4  # noqa: PLR2004 - IP version
    address = hop.network_header[in_ipv4 if is_ipv4 else in_ipv6]
    return ip_address(address), int.from_bytes(hop.transport_header[port])
