from __future__ import annotations

import struct

import pytest

from cni_hostport.netlink import Netlink, attribute, attributes, nested

REQUEST, MULTI, ACK, DUMP, INTERRUPTED = 0x1, 0x2, 0x4, 0x300, 0x10
ERROR, DONE, OBJECT = 2, 3, 0xA03
EIO, EINTR, ENOENT = 5, 4, 2


def header(length: int, kind: int) -> bytes:
    return struct.pack("=HH", length, kind)


def message(number: int, kind: int, body: bytes, flags: int = 0) -> bytes:
    whole = struct.pack("=LHHLL", 16 + len(body), kind, flags, number, 4711) + body
    return whole + b"\0" * (-len(whole) % 4)


def acknowledgement(number: int, error: int = 0, flags: int = 0) -> bytes:
    return message(number, ERROR, struct.pack("=i", -error) + b"what was asked", flags)


class Kernel:
    """A socket whose answers are known."""

    def __init__(self, *datagrams: bytes) -> None:
        self.datagrams = list(datagrams)
        self.sent: list[bytes] = []
        self.protocol = -1

    def __call__(self, _family: int, _kind: int, protocol: int) -> Kernel:
        self.protocol = protocol
        return self

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def recv(self, _size: int, _flags: int) -> bytes:
        if not self.datagrams:
            raise BlockingIOError
        return self.datagrams.pop(0)


def connected(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> Netlink:
    monkeypatch.setattr("cni_hostport.netlink.socket", kernel)
    return Netlink(12)


@pytest.mark.parametrize(
    ("value", "length", "padded"),
    [
        (b"", 4, b""),
        (b"a", 5, b"a\0\0\0"),
        (b"abc", 7, b"abc\0"),
        (b"abc\0", 8, b"abc\0"),
        (b"abcde", 9, b"abcde\0\0\0"),
    ],
)
def test_an_attribute_is_padded_to_four_bytes_which_its_length_does_not_count(
    value: bytes, length: int, padded: bytes
) -> None:
    assert attribute(3, value) == header(length, 3) + padded


def test_attributes_within_an_attribute_are_marked_as_such() -> None:
    inside = header(5, 1) + b"a\0\0\0" + header(6, 2) + b"bc\0\0"
    assert nested(7, attribute(1, b"a"), attribute(2, b"bc")) == header(20, 0x8007) + inside
    assert nested(7) == header(4, 0x8007)


@pytest.mark.parametrize("flags", [0, 0x8000, 0x4000], ids=["plain", "nested", "network byte order"])
def test_the_type_of_an_attribute_is_read_without_its_flags(flags: int) -> None:
    assert list(attributes(header(8, flags | 5) + b"abcd")) == [(5, b"abcd")]


def test_the_padding_of_the_last_attribute_may_be_missing() -> None:
    assert list(attributes(header(5, 1) + b"a\0\0\0" + header(5, 2) + b"b")) == [(1, b"a"), (2, b"b")]


def test_what_was_written_is_read_back() -> None:
    values = [(kind, b"x" * length) for kind, length in enumerate(range(12), start=1)]
    written = b"".join(attribute(*value) for value in values)
    assert list(attributes(written)) == values
    assert [list(attributes(value)) for _, value in attributes(nested(9, written))] == [values]


def test_messages_are_sent_at_once_numbered_and_ask_for_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    connected(monkeypatch, kernel).ask([(10, 0, b"abcd"), (11, DUMP, b"")])
    first = struct.pack("=LHHLL", 20, 10, REQUEST | ACK, 0, 0) + b"abcd"
    second = struct.pack("=LHHLL", 16, 11, REQUEST | ACK | DUMP, 1, 0)
    assert (kernel.protocol, kernel.sent) == (12, [first + second])


def test_a_question_is_answered_by_its_object_and_nothing_more_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(message(1, OBJECT, b"one"), acknowledgement(0, ENOENT), message(2, OBJECT, b"of another"))
    netlink = connected(monkeypatch, kernel)
    assert netlink.ask([(10, 0, b""), (11, 0, b"")], are_changes=False) == [(ENOENT, []), (0, [b"one"])]
    assert kernel.sent == [struct.pack("=LHHLLLHHLL", 16, 10, REQUEST, 0, 0, 16, 11, REQUEST, 1, 0)]
    assert len(kernel.datagrams) == 1


def test_a_dump_is_answered_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [message(0, OBJECT, part, MULTI) for part in (b"one", b"two")]
    kernel = Kernel(*parts, message(0, DONE, struct.pack("=i", 0), MULTI))
    assert connected(monkeypatch, kernel).ask([(10, DUMP, b"")], are_changes=False) == [(0, [b"one", b"two"])]


def test_nothing_is_sent_where_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    assert connected(monkeypatch, kernel).ask([]) == []
    assert kernel.sent == []


def test_every_message_gets_its_own_answers_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(
        message(1, OBJECT, b"one") + message(1, OBJECT, b"more"),
        acknowledgement(0, ENOENT) + acknowledgement(1),
        message(2, OBJECT, b"first part") + message(2, OBJECT, b"second part"),
        message(2, DONE, struct.pack("=i", 0)),
    )
    assert connected(monkeypatch, kernel).ask([(10, 0, b"")] * 3) == [
        (ENOENT, []),
        (0, [b"one", b"more"]),
        (0, [b"first part", b"second part"]),
    ]


def test_a_message_without_acknowledgement_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(acknowledgement(0, 1))
    assert connected(monkeypatch, kernel).ask([(10, 0, b"")] * 2) == [(1, []), (EIO, [])]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_dump_during_which_something_changed_is_known(monkeypatch: pytest.MonkeyPatch, where: int) -> None:
    flags = [INTERRUPTED if part == where else 0 for part in range(3)]
    kernel = Kernel(
        message(0, OBJECT, b"one", flags[0]) + message(0, OBJECT, b"two", flags[1]),
        message(0, DONE, struct.pack("=i", 0), flags[2]),
        message(1, DONE, struct.pack("=i", 0)),
    )
    assert connected(monkeypatch, kernel).ask([(10, DUMP, b"")] * 2) == [(EINTR, [b"one", b"two"]), (0, [])]


def test_what_is_left_of_the_answers_to_an_earlier_question_answers_no_later_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(b"cut off")
    netlink = connected(monkeypatch, kernel)
    with pytest.raises(struct.error):
        netlink.ask([(10, DUMP, b"")] * 2)
    kernel.datagrams = [message(0, OBJECT, b"earlier"), acknowledgement(1, ENOENT), acknowledgement(2)]
    assert netlink.ask([(10, 0, b"")]) == [(0, [])]
