"""The first packet of a connection, and the answer to it, made by hand so that it can be told from all others. Pure.

Layouts are those of RFC 791, RFC 8200, RFC 9293 and RFC 768.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

HOPS = 64
SYN, ACK = 0x02, 0x10
WINDOW = 64240  # bytes, what Linux announces
NOBODY = b"\x02" + bytes(5)
PROTOCOLS = {"tcp": 6, "udp": 17}
ETHERTYPES = {4: 0x0800, 6: 0x86DD}
# where its mark is: the sequence number of TCP, the first bytes of what UDP carries; in bits of the transport header
MARKS = {"tcp": 32, "udp": 64}
# where an ICMP error holds the transport header of what it is about: behind its own header and the IP header, in bits
ICMP = {4: ("icmp", 8 * (8 + 20)), 6: ("ipv6-icmp", 8 * (8 + 40))}


@dataclass(frozen=True)
class Packet:
    """A TCP connection request or a UDP datagram; ``mark`` is any number of 32 bits.

    ``answers`` is the mark of the packet that this one answers.
    """

    protocol: str
    source: IPv4Address | IPv6Address
    source_port: int
    destination: IPv4Address | IPv6Address
    destination_port: int
    mark: int
    answers: int | None = None

    @property
    def client(self) -> tuple[IPv4Address | IPv6Address, int]:
        """Address and port from which it comes."""
        return self.source, self.source_port

    @property
    def server(self) -> tuple[IPv4Address | IPv6Address, int]:
        """Address and port to which it goes."""
        return self.destination, self.destination_port

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
        if self.answers is not None:  # a reset of what acknowledges continues from there (RFC 9293, 3.5.2)
            return [error, f"tcp flags & rst == rst tcp sequence {_next(self.answers)}"]
        return [error, f"tcp flags & rst == rst tcp ackseq {_next(self.mark)}"]

    def __bytes__(self) -> bytes:
        """Return the packet from its IP header on."""
        ports = struct.pack(">HH", self.source_port, self.destination_port)
        if self.protocol == "tcp":
            acknowledged = 0 if self.answers is None else _next(self.answers)
            flags = SYN if self.answers is None else SYN | ACK
            segment = ports + struct.pack(">IIBBHHH", self.mark, acknowledged, 5 << 4, flags, WINDOW, 0, 0)
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

    def frame(self, mac: bytes, source: bytes = NOBODY) -> bytes:
        """Return the packet in an Ethernet frame to this address."""
        return mac + source + struct.pack(">H", ETHERTYPES[self.source.version]) + bytes(self)


def _next(mark: int) -> int:
    return (mark + 1) % (1 << 32)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
