from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from cni_hostport.names import PROTOCOL_NUMBERS
from cni_hostport.operate.explain.packet import Packet

V4 = (IPv4Address("192.0.2.2"), IPv4Address("192.0.2.1"))
V6 = (IPv6Address("2001:db8::2"), IPv6Address("2001:db8::1"))
VERSIONS = pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
TRANSPORTS = pytest.mark.parametrize("protocol", ["tcp", "udp"])


def first_packet(
    protocol: str, addresses: tuple[IPv4Address | IPv6Address, ...], mark: int, port: int = 8080
) -> Packet:
    return Packet(protocol, addresses[0], 40001, addresses[1], port, mark)


def segment(packet: Packet) -> bytes:
    return bytes(packet)[20 if packet.source.version == 4 else 40 :]


def has_right_sum(data: bytes) -> bool:
    # RFC 1071: with its checksum in it, the sum is all ones, which is 0 modulo 0xffff
    return int.from_bytes(data) % 0xFFFF == 0


def pseudo_header(packet: Packet) -> bytes:
    if packet.source.version == 4:
        tail = struct.pack(">BBH", 0, PROTOCOL_NUMBERS[packet.protocol], len(segment(packet)))
    else:
        tail = struct.pack(">I3xB", len(segment(packet)), PROTOCOL_NUMBERS[packet.protocol])
    return packet.source.packed + packet.destination.packed + tail


@VERSIONS
@TRANSPORTS
@pytest.mark.parametrize("mark", [0, 1, 0xFFFF, 0xFFFFFFFF, 0x80000000, 0x12345678, 0xDEADBEEF])
def test_checksums_are_right(addresses: tuple[IPv4Address, ...], protocol: str, mark: int) -> None:
    packet = first_packet(protocol, addresses, mark)
    assert has_right_sum(pseudo_header(packet) + segment(packet))
    assert packet.source.version == 6 or has_right_sum(bytes(packet)[:20])


@VERSIONS
def test_a_udp_checksum_of_0_is_sent_as_all_ones_since_0_means_none(addresses: tuple[IPv4Address, ...]) -> None:
    [checksum] = struct.unpack_from(">H", segment(first_packet("udp", addresses, 0)), 6)
    packet = first_packet("udp", addresses, checksum)
    assert segment(packet)[6:8] == b"\xff\xff"
    assert has_right_sum(pseudo_header(packet) + segment(packet))


def test_the_bytes_of_a_tcp_packet() -> None:
    assert bytes(first_packet("tcp", V4, 0x01020304)).hex(" ", 4) == (
        "45000028 00000000 4006f6cc c0000202 c0000201 9c411f90 01020304 00000000 5002faf0 71160000"
    )


def test_the_bytes_of_a_udp_packet_of_ipv6() -> None:
    data = bytes(first_packet("udp", V6, 0x01020304))
    assert data[:8].hex() == "60000000000c1140"
    assert [str(ip_address(data[start : start + 16])) for start in (8, 24)] == ["2001:db8::2", "2001:db8::1"]
    assert data[40:46].hex() == "9c411f90000c"
    assert data[48:].hex() == "01020304"


@pytest.mark.parametrize(("addresses", "kind"), [(V4, "0800"), (V6, "86dd")], ids=["IPv4", "IPv6"])
def test_a_frame_goes_to_the_address_given(addresses: tuple[IPv4Address, ...], kind: str) -> None:
    packet = first_packet("tcp", addresses, 5)
    frame = packet.frame(bytes.fromhex("020000000001"))
    assert frame[:14].hex() == f"020000000001020000000000{kind}"
    assert frame[14:] == bytes(packet)


def test_the_refusal_of_the_last_sequence_number_is_of_the_first() -> None:
    assert first_packet("tcp", V4, 0xFFFFFFFF).refusals == [
        "meta l4proto icmp @th,256,32 4294967295",
        "tcp flags & rst == rst tcp ackseq 0",
    ]


def test_udp_is_refused_by_icmp_alone() -> None:
    assert first_packet("udp", V6, 7).refusals == ["meta l4proto ipv6-icmp @th,448,32 7"]


def answer(protocol: str, mark: int, answered_mark: int) -> Packet:
    return Packet(protocol, V4[1], 80, V4[0], 40001, mark, answered_mark)


def test_an_answer_acknowledges_what_it_answers() -> None:
    packet = answer("tcp", 0x01020304, 0xFFFFFFFF)
    assert segment(packet)[:14].hex(" ", -4) == "00509c41 01020304 00000000 5012"
    assert has_right_sum(pseudo_header(packet) + segment(packet))


def test_the_refusal_of_an_answer_continues_with_what_it_acknowledges() -> None:
    assert answer("tcp", 5, 7).refusals == ["meta l4proto icmp @th,256,32 5", "tcp flags & rst == rst tcp sequence 8"]


def test_an_answer_of_udp_is_a_datagram() -> None:
    assert bytes(answer("udp", 5, 7)) == bytes(Packet("udp", V4[1], 80, V4[0], 40001, 5))


def test_a_frame_comes_from_the_address_given() -> None:
    assert first_packet("tcp", V4, 5).frame(b"abcdef", b"ghijkl")[:12] == b"abcdefghijkl"
