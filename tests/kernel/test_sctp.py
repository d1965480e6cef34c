from __future__ import annotations

import socket
import struct

import pytest
from lab import CLIENT4, CLIENT6, NODE4, NODE6, Namespace, Node, mapping

INIT, INIT_ACK = 1, 2


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def packet(source: int, destination: int, chunk: int, to_tag: int, own_tag: int) -> bytes:
    header = struct.pack("!HHI", source, destination, to_tag)
    body = struct.pack("!BBHIIHHI", chunk, 0, 20, own_tag, 65536, 1, 1, 1)
    return header + struct.pack("<I", crc32c(header + bytes(4) + body)) + body


def raw(namespace: Namespace, address: str) -> socket.socket:
    # not an SCTP socket: a kernel without SCTP still tracks and translates its packets
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespace.inside():
        made = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    made.settimeout(3)
    return made


def received(receiving: socket.socket) -> tuple[str, bytes]:
    data, peer = receiving.recvfrom(4096)
    header = 0 if receiving.family == socket.AF_INET6 else (data[0] & 15) * 4
    return peer[0], data[header:]


@pytest.mark.parametrize(("address", "client"), [(NODE4, CLIENT4), (NODE6, CLIENT6)], ids=["IPv4", "IPv6"])
def test_an_sctp_association_is_opened_through_a_host_port(node: Node, address: str, client: str) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080, 80, "SCTP"), mapping(8080, 81))
    with raw(node.client, address) as outside, raw(pod, address) as inside:
        outside.sendto(packet(4000, 8080, INIT, 0, 7), (address, 0))
        assert received(inside) == (client, packet(4000, 80, INIT, 0, 7))
        inside.sendto(packet(80, 4000, INIT_ACK, 7, 9), (client, 0))
        assert received(outside) == (address, packet(8080, 4000, INIT_ACK, 7, 9))
