from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest
from conntrack_entries import crowd, identities
from lab import CLIENT4, CLIENT6, NODE4, NODE6, QUIET, Namespace, Node, Pod, config, ip, mapping
from resident import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

INIT, INIT_ACK = 1, 2
FAMILY = pytest.mark.parametrize(("address", "client"), [(NODE4, CLIENT4), (NODE6, CLIENT6)], ids=["IPv4", "IPv6"])


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


@FAMILY
def test_an_sctp_association_is_opened_through_a_host_port(node: Node, address: str, client: str) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080, 80, "SCTP"), mapping(8080, 81))
    with raw(node.client, address) as outside, raw(pod, address) as inside:
        outside.sendto(packet(4000, 8080, INIT, 0, 7), (address, 0))
        assert received(inside) == (client, packet(4000, 80, INIT, 0, 7))
        inside.sendto(packet(80, 4000, INIT_ACK, 7, 9), (client, 0))
        assert received(outside) == (address, packet(8080, 4000, INIT_ACK, 7, 9))


def collect(node: Node, pod: Pod) -> None:
    collected = node.cni("GC", None, config(pod) | {"cni.dev/valid-attachments": []})
    assert not collected.status, collected


def die(_: Node, pod: Pod) -> None:
    """Go, but for what the test's sockets keep, so that only the next ADD finds out."""
    ip(f"netns del {pod.name}")


def reaches(outside: socket.socket, address: str, inside: socket.socket, timeout: float = 3) -> bool:
    """Begin an association from the one source port, and tell whether that arrives."""
    outside.sendto(packet(4000, 8080, INIT, 0, 7), (address, 0))
    inside.settimeout(timeout)
    try:
        return received(inside)[1][12] == INIT
    except TimeoutError:
        return False


@FAMILY
@pytest.mark.parametrize("entries", [0, 12_000], ids=["few-entries", "many-entries"])
@pytest.mark.parametrize("end", [Node.delete, collect, die], ids=["DEL", "GC", "take-over"])
def test_a_client_that_goes_on_opening_an_association_follows_the_port_to_the_next_pod(
    node: Node, address: str, client: str, entries: int, end: Callable[[Node, Pod], object]
) -> None:
    assert client
    crowd(node, entries)
    old, new = node.pod(), node.pod()
    node.add(old, mapping(8080, 80, "SCTP"))
    with raw(node.client, address) as outside, raw(old, address) as first, raw(new, address) as second:
        assert reaches(outside, address, first)
        end(node, old)
        node.add(new, mapping(8080, 80, "SCTP"))
        assert reaches(outside, address, second)
        assert not reaches(outside, address, first, QUIET)


@FAMILY
def test_an_open_association_ends_with_its_mapping(node: Node, address: str, client: str) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080, 80, "SCTP"))
    with raw(node.client, address) as outside, raw(pod, address) as inside:
        assert reaches(outside, address, inside)
        inside.sendto(packet(80, 4000, INIT_ACK, 7, 9), (client, 0))
        received(outside)
        node.delete(pod)
        assert eventually(lambda: not identities(node, "sctp", "dport=8080"))
        assert not reaches(outside, address, inside, QUIET)


@FAMILY
def test_a_client_that_was_sent_elsewhere_reaches_the_pod_that_gets_the_port(
    node: Node, address: str, client: str
) -> None:
    assert client
    node.nft_file("table inet foreign { chain c { type filter hook prerouting priority 0; ct state new counter; }; }")
    pod = node.pod()
    with raw(node.client, address) as outside, raw(pod, address) as inside:
        outside.sendto(packet(4000, 8080, INIT, 0, 7), (address, 0))
        assert len(identities(node, "sctp", "dport=8080")) == 1
        node.add(pod, mapping(8080, 80, "SCTP"))
        assert eventually(lambda: reaches(outside, address, inside, 0.1))
