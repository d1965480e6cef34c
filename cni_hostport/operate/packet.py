"""The first packet of a connection, made by hand so that it can be told from all others. Pure.

Layouts are those of RFC 791, RFC 8200, RFC 9293 and RFC 768.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

HOPS = 64
SYN = 0x02
WINDOW = 64240  # bytes, what Linux announces
PROTOCOLS = {"tcp": 6, "udp": 17}
ETHERTYPES = {4: 0x0800, 6: 0x86DD}
# where its mark is: the sequence number of TCP, the first bytes of what UDP carries; in bits of the transport header
MARKS = {"tcp": 32, "udp": 64}
# where an ICMP error holds the transport header of what it is about: behind its own header and the IP header, in bits
ICMP = {4: ("icmp", 8 * (8 + 20)), 6: ("ipv6-icmp", 8 * (8 + 40))}


@dataclass(frozen=True)
class Packet:
    """A TCP connection request or a UDP datagram; ``mark`` is any number of 32 bits."""

    protocol: str
    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    destination_port: int
    mark: int

    @property
    def match(self) -> str:
        """The nft match that only this packet meets, whatever was translated."""
        return f"meta l4proto {self.protocol} @th,{MARKS[self.protocol]},32 {self.mark}"

    @property
    def refusals(self) -> list[str]:
        """The nft matches that only those packets meet by which the node would refuse it."""
        icmp, offset = ICMP[self.source.version]
        error = f"meta l4proto {icmp} @th,{offset + MARKS[self.protocol]},32 {self.mark}"
        if self.protocol == "udp":
            return [error]
        return [error, f"tcp flags & rst == rst tcp ackseq {(self.mark + 1) % (1 << 32)}"]

    def __bytes__(self) -> bytes:
        """Return the packet from its IP header on."""
        ports = struct.pack(">HH", self.source_port, self.destination_port)
        if self.protocol == "tcp":
            segment = ports + struct.pack(">IIBBHHH", self.mark, 0, 5 << 4, SYN, WINDOW, 0, 0)
            position = 16
        else:
            segment = ports + struct.pack(">HHI", 12, 0, self.mark)
            position = 6
        number = PROTOCOLS[self.protocol]
        addresses = self.source.packed + self.destination.packed
        checksum = _checksum(addresses + struct.pack(">II", len(segment), number) + segment)
        checksum = checksum or 0xFFFF  # 0 means none in UDP, and in TCP it is the same
        segment = segment[:position] + struct.pack(">H", checksum) + segment[position + 2 :]
        if isinstance(self.source, IPv6Address):
            return struct.pack(">IHBB", 6 << 28, len(segment), number, HOPS) + addresses + segment
        header = struct.pack(">BBHHHBBH", 4 << 4 | 5, 0, 20 + len(segment), 0, 0, HOPS, number, 0)
        header = header[:10] + struct.pack(">H", _checksum(header + addresses))
        return header + addresses + segment

    def frame(self, mac: bytes) -> bytes:
        """Return the packet in an Ethernet frame to this address."""
        return mac + b"\x02" + bytes(5) + struct.pack(">H", ETHERTYPES[self.source.version]) + bytes(self)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
