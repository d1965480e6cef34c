"""The packets of a probe: the first packet of a connection, and the answer to it. Pure.

Each has a number of its own, its mark, by which nft can tell it from all other packets whatever is translated. The
kernel builds no packets with such a number, so they are built here. Layouts are those of RFC 791, RFC 8200, RFC 9293
and RFC 768.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from cni_hostport.names import PROTOCOL_NUMBERS

IPAddress = IPv4Address | IPv6Address
Endpoint = tuple[IPAddress, int]  # address and port

HOP_LIMIT = 64
SYN, ACK = 0x02, 0x10
TCP_WINDOW = 64240  # bytes, what Linux announces
SOURCE_MAC = b"\x02" + bytes(5)  # locally administered, and no device's
ETHERTYPES = {4: 0x0800, 6: 0x86DD}  # by IP version
# where the mark is: the sequence number of TCP, the first bytes of what UDP carries; in bits of the transport header
MARK_OFFSETS = {"tcp": 32, "udp": 64}
PROBED_PROTOCOLS = MARK_OFFSETS.keys()
# where an ICMP error holds the transport header of the refused packet: behind its own header and the IP header, in bits
ICMP = {4: ("icmp", 8 * (8 + 20)), 6: ("ipv6-icmp", 8 * (8 + 40))}  # by IP version


@dataclass(frozen=True)
class Packet:
    """A TCP connection request or a UDP datagram, or the answer to one; ``mark`` is any number of 32 bits.

    ``answered_mark`` is the mark of the packet that this one answers, ``None`` for the first packet of a connection.
    """

    protocol: str
    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int
    mark: int
    answered_mark: int | None = None

    @property
    def client(self) -> Endpoint:
        """Address and port from which it comes."""
        return self.source, self.source_port

    @property
    def server(self) -> Endpoint:
        """Address and port to which it goes."""
        return self.destination, self.destination_port

    @property
    def match(self) -> str:
        """The nft match that only this packet meets, whatever was translated."""
        return f"meta l4proto {self.protocol} @th,{MARK_OFFSETS[self.protocol]},32 {self.mark}"

    @property
    def refusals(self) -> list[str]:
        """The nft matches for the packets with which the node would refuse this one; no other packets meet them."""
        icmp, offset = ICMP[self.source.version]
        error = f"meta l4proto {icmp} @th,{offset + MARK_OFFSETS[self.protocol]},32 {self.mark}"
        if self.protocol == "udp":
            return [error]
        if self.answered_mark is not None:  # a reset continues from what the packet acknowledges (RFC 9293, 3.5.2)
            return [error, f"tcp flags & rst == rst tcp sequence {_successor(self.answered_mark)}"]
        return [error, f"tcp flags & rst == rst tcp ackseq {_successor(self.mark)}"]

    def __bytes__(self) -> bytes:
        """Return the packet from its IP header on."""
        segment, checksum_position = self._segment()
        number = PROTOCOL_NUMBERS[self.protocol]
        addresses = self.source.packed + self.destination.packed
        checksum = _checksum(addresses + struct.pack(">II", len(segment), number) + segment)
        checksum = checksum or 0xFFFF  # 0 means none in UDP, and in TCP it is the same
        segment = segment[:checksum_position] + struct.pack(">H", checksum) + segment[checksum_position + 2 :]
        if isinstance(self.source, IPv6Address):
            return struct.pack(">IHBB", 6 << 28, len(segment), number, HOP_LIMIT) + addresses + segment
        header = struct.pack(">BBHHHBBH", 4 << 4 | 5, 0, 20 + len(segment), 0, 0, HOP_LIMIT, number, 0)
        header = header[:10] + struct.pack(">H", _checksum(header + addresses))
        return header + addresses + segment

    def _segment(self) -> tuple[bytes, int]:
        """Return the packet from its transport header on, with 0 for the checksum, and the position of that."""
        ports = struct.pack(">HH", self.source_port, self.destination_port)
        if self.protocol == "udp":
            return ports + struct.pack(">HHI", 12, 0, self.mark), 6
        acknowledgment = 0 if self.answered_mark is None else _successor(self.answered_mark)
        flags = SYN if self.answered_mark is None else SYN | ACK
        return ports + struct.pack(">IIBBHHH", self.mark, acknowledgment, 5 << 4, flags, TCP_WINDOW, 0, 0), 16

    def frame(self, destination_mac: bytes, source_mac: bytes = SOURCE_MAC) -> bytes:
        """Return the packet in an Ethernet frame."""
        return destination_mac + source_mac + struct.pack(">H", ETHERTYPES[self.source.version]) + bytes(self)


def _successor(mark: int) -> int:
    return (mark + 1) % (1 << 32)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
