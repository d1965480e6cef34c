from __future__ import annotations

import struct

import pytest

from cni_hostport.netlink import attribute, nested
from cni_hostport.operate.explain.trace import Hop, parse

INET, IPV4 = 1, 2
NO_VERDICT = b""


def message(
    family: int, kind: int, verdict: bytes = NO_VERDICT, handle: int = 0, policy: int | None = None, **more: bytes
) -> bytes:
    parts = [
        attribute(3, struct.pack(">Q", handle)) if handle else b"",
        attribute(2, b"chain\0"),
        attribute(1, b"table\0"),
        attribute(4, struct.pack(">I", kind)),
        attribute(6, struct.pack(">I", 0xCAFE)),
        verdict,
        attribute(16, struct.pack(">I", policy)) if policy is not None else b"",
        *(attribute(int(name.removeprefix("a")), value) for name, value in more.items()),
    ]
    return struct.pack(">BBH", family, 0, 0) + b"".join(parts)


def verdict(code: int, chain: str = "") -> bytes:
    parts = [attribute(1, struct.pack(">I", code % (1 << 32)))]
    return nested(5, *parts, *([attribute(2, chain.encode() + b"\0")] if chain else []))


@pytest.mark.parametrize(
    ("code", "chain", "expected"),
    [
        (0, "", "drop"),
        (1, "", "accept"),
        (3, "", "queue"),
        (3 | 7 << 16, "", "queue"),
        (3 | 1 << 16 | 0x8000, "", "queue"),
        (-1, "", "continue"),
        (-3, "other", "jump other"),
        (-4, "other", "goto other"),
        (99, "", "99"),
        (-99, "", "-99"),
    ],
)
def test_the_verdict_of_a_rule(code: int, chain: str, expected: str) -> None:
    hop = parse(message(INET, 3, verdict(code, chain), handle=12))
    assert hop == Hop("inet", "table", "chain", 12, expected, 0xCAFE)


@pytest.mark.parametrize(("policy", "expected"), [(0, "drop"), (1, "accept")])
def test_the_policy_of_a_chain_has_no_handle(policy: int, expected: str) -> None:
    hop = parse(message(IPV4, 1, policy=policy))
    assert (hop.family, hop.handle, hop.verdict) == ("ip", 0, expected)


@pytest.mark.parametrize("handle", [0, 9])
def test_a_return_at_the_end_of_a_chain_and_one_by_a_rule(handle: int) -> None:
    hop = parse(message(INET, 2, verdict(-1 if not handle else -5), handle=handle))
    assert (hop.handle, hop.verdict) == (handle, "return")


def test_headers_and_the_interface_on_which_it_leaves() -> None:
    hop = parse(message(INET, 3, verdict(1), handle=1, a8=b"E" * 20, a9=b"ports", a12=struct.pack(">I", 3)))
    assert (hop.network_header, hop.transport_header, hop.oif) == (b"E" * 20, b"ports", 3)


def test_a_family_that_is_not_known_is_a_number() -> None:
    assert parse(message(77, 3, verdict(1), handle=1)).family == "77"


def test_a_message_without_anything_is_a_hop_without_anything() -> None:
    assert parse(bytes(4)) == Hop("0", "", "", 0, "", 0)
