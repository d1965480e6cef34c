from __future__ import annotations

import struct
from errno import EBUSY, ENOENT, EPERM
from ipaddress import ip_address
from typing import TYPE_CHECKING, Self

import pytest

from cni_hostport.kernel import conntrack
from cni_hostport.kernel.nf_conntrack import DELETE, GET, GET_STATS, Flow, count, everything, of_protocol, with_port
from cni_hostport.netlink import attribute, attributes, nested

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.netlink import Message

CLIENT, NODE, POD = (ip_address(text).packed for text in ("192.0.2.2", "192.0.2.1", "10.88.0.2"))
UDP, TCP, ICMP = 17, 6, 1


def ends(protocol: int, source: tuple[bytes, int], destination: tuple[bytes, int], *more: bytes) -> bytes:
    addresses = attribute(1, source[0]) + attribute(2, destination[0])
    ports = [attribute(kind, end[1].to_bytes(2)) for kind, end in ((2, source), (3, destination))]
    proto = [attribute(1, bytes([protocol])), *(ports if protocol != ICMP else [attribute(4, b"\0\x01")])]
    return nested(1, addresses) + nested(2, *proto) + b"".join(more)


def entry(client_port: int, pod: bytes = POD, protocol: int = UDP, zone: bytes = b"", state: bytes = b"") -> bytes:
    """Return the kernel's answer for a client's flow to port 5353 of the node."""
    original = ends(protocol, (CLIENT, client_port), (NODE, 5353), zone)
    reply = ends(protocol, (pod, 53), (CLIENT, client_port))
    identity = attribute(12, client_port.to_bytes(4))
    return bytes([2, 0, 0, 0]) + nested(1, original) + nested(2, reply) + identity + state


class Kernel:
    """Connection tracking that holds these entries, and refuses to delete some of them."""

    def __init__(self, *held: bytes, number: int = 0, refuses: dict[int, int] | None = None) -> None:
        self.held = held
        self.number = number or len(held)
        self.refuses = refuses or {}
        self.asked: list[Message] = []
        self.deleted: list[int] = []

    def __call__(self, _protocol: int) -> Kernel:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, messages: Sequence[Message]) -> list[tuple[int, list[bytes]]]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> tuple[int, list[bytes]]:
        kind, _, body = message
        if kind == GET_STATS:
            return 0, [bytes(4) + attribute(1, self.number.to_bytes(4))]
        if kind == GET:
            self.asked.append(message)
            return 0, list(self.held)
        assert kind == DELETE
        identity = int.from_bytes(dict(attributes(body[4:]))[12])
        if identity in self.refuses:
            return self.refuses[identity], []
        self.deleted.append(identity)
        return 0, []


def forgotten(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, *ports: int) -> list[str]:
    """Forget the flows to the pod, and return what is logged."""
    monkeypatch.setattr(conntrack, "Netlink", kernel)
    monkeypatch.setattr(conntrack, "shared", kernel)
    lines: list[str] = []
    conntrack.forget_to([POD], [("udp", NODE, port) for port in ports or (5353,)], lines.append)
    return lines


def test_flows_to_the_pod_are_deleted_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(entry(1), entry(2, NODE), entry(3, protocol=TCP), entry(4), entry(5, protocol=ICMP))
    assert forgotten(monkeypatch, kernel) == []
    assert kernel.deleted == [1, 4]


def test_flows_in_a_zone_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(entry(1, zone=attribute(3, b"\0\x07")), entry(2, state=attribute(18, b"\0\x07")), entry(3))
    assert forgotten(monkeypatch, kernel) == []
    assert kernel.deleted == [3]


def test_what_cannot_be_deleted_is_logged_once_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(*map(entry, range(1, 200)), refuses={5: EBUSY, 130: ENOENT})
    [line] = forgotten(monkeypatch, kernel)
    assert line == "warning: connection tracking entries were not deleted: OSError: [Errno 16] Device or resource busy"
    assert kernel.deleted == sorted(set(range(1, 200)) - {5, 130})


def test_an_entry_that_ended_by_itself_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forgotten(monkeypatch, Kernel(entry(1), refuses={1: ENOENT})) == []


def test_a_kernel_that_does_not_answer_is_logged_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(kernel, "ask", lambda messages: [(EPERM, []) for _ in messages])
    [line] = forgotten(monkeypatch, kernel)
    assert (
        line
        == "warning: connection tracking entries were not deleted: PermissionError: [Errno 1] Operation not permitted"
    )


def test_an_empty_table_is_not_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    assert forgotten(monkeypatch, kernel) == []
    assert kernel.asked == []


@pytest.mark.parametrize(
    ("number", "ports", "filtered"),
    [(2500, 1, False), (2501, 1, True), (7500, 2, False), (7501, 2, True), (100_000, 21, False)],
)
def test_the_kernel_filters_where_that_is_faster_than_reading_everything(
    monkeypatch: pytest.MonkeyPatch, number: int, ports: int, filtered: bool
) -> None:
    kernel = Kernel(entry(1), number=number)
    assert forgotten(monkeypatch, kernel, *range(5353, 5353 + ports)) == []
    assert kernel.asked == (
        [with_port(4, "udp", direction, port) for port in range(5353, 5353 + ports) for direction in (1, 2)]
        if filtered
        else [everything()]
    )


def test_a_question_for_a_port_says_what_the_kernel_is_to_compare() -> None:
    kind, flags, body = with_port(16, "udp", 2, 5353)
    proto = attribute(1, b"\x11") + attribute(3, b"\x14\xe9")
    compared = attribute(2, struct.pack("=L", 0b101000))
    assert (kind, flags, body) == (0x101, 0x300, b"\x0a\0\0\0" + nested(2, nested(2, proto)) + nested(25, compared))


def test_a_question_for_beginnings_leaves_out_what_is_assured() -> None:
    _, _, body = of_protocol(4, "tcp", beginning=True)
    assert body.endswith(attribute(3, bytes(4)) + attribute(26, b"\0\0\0\x04"))
    assert of_protocol(4, "tcp")[2] + attribute(3, bytes(4)) + attribute(26, b"\0\0\0\x04") == body


def test_the_number_of_entries_is_asked_for_in_one_message() -> None:
    assert count() == (0x105, 0, bytes(4))


@pytest.mark.parametrize(("protocol", "kind", "state"), [(TCP, 1, 3), (132, 3, 2), (UDP, 1, 0)])
def test_an_entry_says_its_ends_and_its_state(protocol: int, kind: int, state: int) -> None:
    flow = Flow(entry(7, protocol=protocol, state=nested(4, nested(kind, attribute(1, bytes([state or 9]))))))
    assert (flow.source, flow.destination) == ((CLIENT, 7), (NODE, 5353))
    assert (flow.reply_source, flow.reply_destination) == ((POD, 53), (CLIENT, 7))
    assert (flow.state, flow.is_redirected, flow.is_masqueraded) == (state, True, False)
