from __future__ import annotations

from ipaddress import ip_address
from struct import pack

import pytest

from cni_hostport import nf_answers, nf_tables
from cni_hostport.kernel import snapshot
from cni_hostport.netlink import attribute, nested

INET = b"\1\0\0\0"
EDGE = b"\0\0\0\x0a"
IN_TABLE = attribute(1, b"hostport\0")
TCP, UDP, V4, V6 = b"\6", b"\x11", b"\2", b"\x0a"
EQUAL, UNEQUAL, GREATER_OR_EQUAL, LESS_OR_EQUAL = 0, 1, 5, 3


def packed(address: str) -> bytes:
    return ip_address(address).packed


def number(value: int) -> bytes:
    return pack(">L", value)


def expression(name: str, *parts: bytes) -> bytes:
    return nested(1, attribute(1, name.encode() + b"\0"), nested(2, *parts))


def rule(*expressions: bytes) -> bytes:
    return INET + IN_TABLE + attribute(2, b"dnat-N-A\0") + attribute(3, bytes(8)) + nested(4, *expressions)


def load(*of: int) -> bytes:
    name = "meta" if len(of) == 1 else "payload"
    kinds = [2] if name == "meta" else [2, 3, 4]
    return expression(
        name, attribute(1, number(1)), *(attribute(*part) for part in zip(kinds, map(number, of), strict=True))
    )


def compare(value: bytes, operator: int = EQUAL) -> bytes:
    return expression("cmp", attribute(1, number(1)), attribute(2, number(operator)), nested(3, attribute(1, value)))


def immediate(value: bytes) -> bytes:
    return expression("immediate", attribute(1, number(1)), nested(2, attribute(1, value)))


def match(*what: int, value: bytes, operator: int = EQUAL) -> bytes:
    return load(*what) + compare(value, operator)


def version(value: bytes) -> bytes:
    return match(15, value=value)


def port(protocol: bytes, value: int) -> bytes:
    return match(16, value=protocol) + match(2, 2, 2, value=pack(">H", value))


def translate(pod: str, to: int) -> bytes:
    counter = expression("counter", attribute(1, bytes(8)), attribute(2, bytes(8)))
    return counter + immediate(packed(pod)) + immediate(pack(">H", to)) + expression("nat", attribute(1, number(1)))


TO_POD = port(TCP, 8080) + translate("10.1.0.2", 80)
VERDICT = expression("immediate", attribute(1, number(0)), nested(2, nested(2, attribute(1, number(1)))))
PORT_OF_V4 = ("hostports", b"\2\0\0\0\6\0\0\0\x1f\x90\0\0")
POD = ("pods_ip4", b"\x0a\1\0\2")


def with_dynamic(expected: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Add the element of a dynamic port, whose key is that of a port of every address, which comes first."""
    return [expected[0], ("dynamic_ports", expected[0][1]), *expected[1:]] if expected else []


@pytest.mark.parametrize(
    ("expressions", "expected"),
    [
        (version(V4) + TO_POD, [PORT_OF_V4, POD]),
        (
            version(V6) + port(UDP, 53) + translate("fd00::2", 53),
            [("hostports", b"\x0a\0\0\0\x11\0\0\0\0\x35\0\0"), ("pods_ip6", packed("fd00::2"))],
        ),
        (
            version(V4) + match(1, 16, 4, value=packed("192.0.2.1")) + TO_POD,
            [PORT_OF_V4, POD, ("hostports_ip4", b"\xc0\0\2\1\6\0\0\0\x1f\x90\0\0")],
        ),
        (
            version(V6) + match(1, 24, 16, value=packed("2001:db8::1")) + port(TCP, 80) + translate("fd00::2", 8080),
            [
                ("hostports", b"\x0a\0\0\0\6\0\0\0\0\x50\0\0"),
                ("pods_ip6", packed("fd00::2")),
                ("hostports_ip6", packed("2001:db8::1") + b"\6\0\0\0\0\x50\0\0"),
            ],
        ),
    ],
    ids=["any IPv4 address", "any IPv6 address", "given IPv4 address", "given IPv6 address"],
)
def test_a_rule_tells_which_elements_may_lead_to_it(expressions: bytes, expected: list[tuple[str, bytes]]) -> None:
    assert nf_answers.expected_elements(rule(expressions)) == with_dynamic(expected)


@pytest.mark.parametrize(
    "condition",
    [
        match(1, 12, 4, value=packed("203.0.113.1")),
        match(1, 16, 3, value=packed("192.0.2.0")[:3]),
        match(1, 16, 4, value=packed("192.0.2.1"), operator=UNEQUAL),
        match(16, value=TCP) + match(2, 2, 2, value=b"\0\x09", operator=UNEQUAL),
        match(16, value=TCP) + match(2, 2, 2, value=b"\x1f\x90"),
        load(2, 2, 2) + compare(b"\0\1", GREATER_OR_EQUAL) + compare(b"\xff\xff", LESS_OR_EQUAL),
        load(1, 16, 4) + expression("bitwise", attribute(1, number(1))) + compare(packed("192.0.2.128")),
        load(6) + expression("lookup", attribute(1, b"__set0\0")),
        expression("ct", attribute(1, number(1))) + compare(number(2)),
        expression("limit", attribute(1, bytes(8))),
        immediate(number(1)) + expression("meta", attribute(2, number(3)), attribute(3, number(1))),
    ],
    ids=["source", "network", "other address", "other port", "same port", "ports", "mask", "set", "ct mark", "limit",
         "mark set"],
)  # fmt: skip
def test_conditions_before_the_port_do_not_hide_the_elements(condition: bytes) -> None:
    assert nf_answers.expected_elements(rule(version(V4), condition, TO_POD)) == with_dynamic([PORT_OF_V4, POD])


def test_an_address_in_a_condition_may_be_that_of_an_element() -> None:
    condition = match(1, 16, 4, value=packed("192.0.2.1"))
    expected = [PORT_OF_V4, POD, ("hostports_ip4", b"\xc0\0\2\1\6\0\0\0\x1f\x90\0\0")]
    assert nf_answers.expected_elements(rule(version(V4), condition, port(TCP, 9), TO_POD)) == with_dynamic(expected)


@pytest.mark.parametrize(
    "expressions",
    [
        b"",
        VERDICT,
        version(V4) + load(16) + load(2, 2, 2) + expression("lookup", attribute(1, b"__map0\0")),
        version(V4) + port(TCP, 8080) + load(16) + expression("lookup", attribute(1, b"__map0\0")),
        version(V4) + port(TCP, 8080) + VERDICT,
        version(V6) + port(TCP, 8080) + translate("10.1.0.2", 80),
        version(b"\7") + TO_POD,
        match(15, value=V4, operator=UNEQUAL) + TO_POD,
        version(V4) + translate("10.1.0.2", 80),
        version(V4) + match(16, value=TCP) + translate("10.1.0.2", 80),
        TO_POD,
    ],
    ids=["nothing", "verdict", "map", "map behind a port", "verdict behind a port", "address of the other version",
         "arp", "not IPv4", "no port", "no port number", "no version"],
)  # fmt: skip
def test_a_rule_of_another_form_tells_nothing(expressions: bytes) -> None:
    assert nf_answers.expected_elements(rule(expressions)) == []


@pytest.mark.parametrize(
    ("verdict", "target"),
    [
        (attribute(1, number(0xFFFFFFFC)) + attribute(2, b"dnat-N-A\0"), "dnat-N-A"),
        (attribute(1, number(0)), ""),
    ],
    ids=["goto", "drop"],
)
def test_an_element_tells_the_chain_it_leads_to(verdict: bytes, target: str) -> None:
    element = nested(1, nested(1, attribute(1, b"\x0a\1\0\2")), nested(2, nested(2, verdict)))
    answer = INET + attribute(2, b"pods_ip4\0") + IN_TABLE + nested(3, element)
    assert nf_answers.target(answer) == target


def test_the_handle_of_a_chain_is_kept_as_it_is() -> None:
    answer = INET + IN_TABLE + attribute(2, b"\0\0\0\0\0\0\0\x2a") + attribute(3, b"dnat-N-A\0")
    assert nf_answers.handle(answer) == b"\0\0\0\0\0\0\0\x2a"


def test_a_rules_effect_is_without_what_was_counted() -> None:
    counted = expression("counter", attribute(1, number(7)))
    assert list(snapshot.effect_of_rule(rule(load(15), counted, immediate(b"\0\x50"))) or ()) == [
        ("meta", attribute(1, number(1)) + attribute(2, number(15))),
        ("counter", b""),
        ("immediate", attribute(1, number(1)) + nested(2, attribute(1, b"\0\x50"))),
    ]


@pytest.mark.parametrize(("name", "comparable"), [("__map3", False), ("__set0", False), ("hostports", True)])
def test_a_rule_with_a_map_of_its_own_cannot_be_compared(name: str, *, comparable: bool) -> None:
    looked_up = expression("lookup", attribute(1, name.encode() + b"\0"), attribute(2, number(1)))
    assert (snapshot.effect_of_rule(rule(looked_up)) is not None) == comparable


@pytest.mark.parametrize(("kind", "compared"), [(0xA01, {2}), (0xA04, {4, 5, 6, 7, 10}), (0xA0A, {3, 4, 5, 6, 7, 11})])
def test_an_objects_effect_is_without_handles_names_and_counters(kind: int, compared: set[int]) -> None:
    parts = [(part, bytes([part])) for part in range(1, 14)]
    answer = INET + b"".join(attribute(*part) for part in parts)
    assert snapshot.effect(kind, answer) == [part for part in parts if part[0] in compared]


def test_single_objects_are_asked_for_by_name() -> None:
    key = nested(3, nested(1, nested(1, attribute(1, POD[1]))))
    assert nf_tables.get_table() == (0xA01, 0, INET + IN_TABLE)
    assert nf_tables.get_set("hostports") == (0xA0A, 0, INET + IN_TABLE + attribute(2, b"hostports\0"))
    assert nf_tables.get_chain("dnat-N-A") == (0xA04, 0, INET + IN_TABLE + attribute(3, b"dnat-N-A\0"))
    assert nf_tables.get_chain("x", "nat", "ip6") == (
        0xA04, 0, b"\x0a\0\0\0" + attribute(1, b"nat\0") + attribute(3, b"x\0")
    )  # fmt: skip
    assert nf_tables.get_rules("x") == (0xA07, 0x300, INET + IN_TABLE + attribute(2, b"x\0"))
    assert nf_tables.get_element(POD) == (0xA0D, 0, INET + IN_TABLE + attribute(2, b"pods_ip4\0") + key)


def elements(name: bytes, *keys: bytes) -> bytes:
    list_of = nested(3, *(nested(1, nested(1, attribute(1, key))) for key in keys))
    return INET + IN_TABLE + attribute(2, name + b"\0") + list_of


def test_a_transaction_is_what_it_does_between_two_edges() -> None:
    changes = [nf_tables.get_table(), nf_tables.get_set("hostports")]
    assert nf_tables.transaction(*changes) == [(0x10, 0, EDGE), *changes, (0x11, 0, EDGE)]


def test_a_deleted_attachment_is_asked_for_and_added_as_the_16_bytes_of_its_key() -> None:
    key, packed_key = (
        "664b16ffde93ac1d-02419fd924bed545",
        b"\x66\x4b\x16\xff\xde\x93\xac\x1d\2\x41\x9f\xd9\x24\xbe\xd5\x45",
    )
    assert nf_tables.get_deleted(key) == (0xA0D, 0, elements(b"deleted", packed_key))
    added = 0xA0C, 0x400, elements(b"deleted", packed_key)
    assert nf_tables.deletion_note(key) == [added, (0xA0E, 0, elements(b"deleted", packed_key)), added]


def test_a_deletion_is_of_elements_by_map_then_chains() -> None:
    other = ("hostports", b"\x0a\0\0\0\6\0\0\0\x1f\x90\0\0")
    assert nf_tables.delete([PORT_OF_V4, POD, other], ["masq-N-A"], b"\0\0\0\0\0\0\0\x2a") == [
        (0xA0E, 0, elements(b"hostports", PORT_OF_V4[1], other[1])),
        (0xA0E, 0, elements(b"pods_ip4", POD[1])),
        (0xA05, 0, INET + IN_TABLE + attribute(3, b"masq-N-A\0")),
        (0xA05, 0, INET + IN_TABLE + attribute(2, b"\0\0\0\0\0\0\0\x2a")),
    ]
