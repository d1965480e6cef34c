"""The answers of the kernel's nf_tables for tables, sets, elements, chains and rules, taken apart. Pure.

Numbers are those that only answers have; the others, and where they come from, are in ``nf_tables``.
"""

from __future__ import annotations

from sys import byteorder

from cni_hostport.names import ANY_ADDRESS, DYNAMIC, ONE_ADDRESS, PODS
from cni_hostport.netlink import attribute, attributes
from cni_hostport.nf_tables import (
    CHAIN_HANDLE,
    DATA_VALUE,
    FAMILIES,
    LIST_ELEM,
    OBJECT_TABLE,
    SET_ELEM_KEY,
    SET_ELEM_LIST_ELEMENTS,
    SET_NAME,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cni_hostport.nf_tables import ElementKey

TABLE_FLAGS, TABLE_OWNER = 2, 7
TABLE_F_DORMANT, TABLE_F_OWNER = 0x1, 0x2
CHAIN_HOOK, CHAIN_POLICY, CHAIN_USE, CHAIN_TYPE, CHAIN_FLAGS = 4, 5, 6, 7, 10
RULE_EXPRESSIONS, RULE_USERDATA = 4, 7
SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_TIMEOUT = 3, 4, 5, 6, 7, 11
SET_USERDATA, SET_MAP = 13, 0x8
SET_ELEM_DATA, SET_ELEM_USERDATA = 2, 6
UDATA_COMMENT = 0  # of libnftnl, in what the kernel keeps for nft with an element or a rule
EXPR_NAME, EXPR_DATA = 1, 2
DATA_VERDICT, VERDICT_CHAIN = 2, 2
META_KEY, PAYLOAD_BASE, PAYLOAD_OFFSET, PAYLOAD_LEN = 2, 2, 3, 4
CMP_OP, CMP_DATA, IMMEDIATE_DATA, LOOKUP_SET = 2, 3, 2, 1
CMP_EQ = 0

# what an expression loads, to be compared by the next one: a key of meta; or base, offset and length of a payload
NFPROTO, L4PROTO, DPORT = (15,), (16,), (2, 2, 2)
DADDR = {FAMILIES["ip"]: (1, 16, 4), FAMILIES["ip6"]: (1, 24, 16)}


def is_dormant(table: bytes) -> bool:
    """Tell whether the rules of a table are switched off, from the answer for it."""
    return bool(int.from_bytes(dict(attributes(table[4:]))[TABLE_FLAGS]) & TABLE_F_DORMANT)


def owner(table: bytes) -> int | None:
    """Return the netlink port of the program that alone may change a table, 0 if it has ended, from the answer for it.

    ``None`` if everybody may. The port is most often the number of the program's process.
    """
    values = dict(attributes(table[4:]))
    owned = int.from_bytes(values[TABLE_FLAGS]) & TABLE_F_OWNER
    return int.from_bytes(values.get(TABLE_OWNER, b"")) if owned else None


def notes_at_set(answer: bytes) -> tuple[str, bytes]:
    """Return a set's kind and name, as in ``map inet filter marks``, and what nft noted there, from its answer."""
    values = dict(attributes(answer[4:]))
    kind = "map" if int.from_bytes(values.get(SET_FLAGS, b"")) & SET_MAP else "set"
    family = next((name for name, number in FAMILIES.items() if number == answer[0]), str(answer[0]))
    table, name = (values[number].rstrip(b"\0").decode(errors="replace") for number in (OBJECT_TABLE, SET_NAME))
    return f"{kind} {family} {table} {name}", values.get(SET_USERDATA, b"")


def handle(chain: bytes) -> bytes:
    """Return the handle of a chain from the answer for it."""
    return dict(attributes(chain[4:]))[CHAIN_HANDLE]


def uses(chain: bytes) -> int:
    """Return how many rules and elements lead to a chain, or are in it, from the answer for it."""
    return int.from_bytes(dict(attributes(chain[4:]))[CHAIN_USE])


def members(elements: bytes) -> Iterator[bytes]:
    """Return the keys of a set from an answer for its elements."""
    return (element[8 : int.from_bytes(element[:2], byteorder)] for element in _listed(elements))


def dynamic_port_keys(elements: bytes) -> set[bytes]:
    """Return the keys of dynamic host ports from an answer for their elements, in a fifth of the time of ``members``.

    No other bytes of an element are like those before its key: neither the key, of which most are zero, nor a name.
    """
    return {part[:_PORT_KEY_BYTES] for part in elements.split(_BEFORE_PORT_KEY)[1:]}


_PORT_KEY_BYTES = 12
_BEFORE_PORT_KEY = attribute(SET_ELEM_KEY, attribute(DATA_VALUE, bytes(_PORT_KEY_BYTES)))[:-_PORT_KEY_BYTES]


def members_with_verdicts(elements: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Return the keys of a map with their verdicts from an answer for its elements; those of a set have empty ones."""
    for element in _listed(elements):
        end = int.from_bytes(element[:2], byteorder)
        yield element[8:end], nested_value(element[end:], SET_ELEM_DATA, DATA_VERDICT)


def _listed(elements: bytes) -> Iterator[bytes]:
    """Return the elements in an answer for those of a set.

    The key comes first, an attribute in an attribute (nf_tables_fill_setelem of net/netfilter/nf_tables_api.c).
    """
    return (element for _, element in attributes(nested_value(elements[4:], SET_ELEM_LIST_ELEMENTS)))


def members_with_comments(elements: bytes, wanted: bytes = b"") -> Iterator[tuple[bytes, str]]:
    """Return the keys of a map with their comments from an answer for its elements; where there is none it is empty.

    Only elements that have the ``wanted`` bytes in them are taken apart.
    """
    for element in _listed(elements):
        if wanted not in element:
            continue
        values = dict(attributes(element))
        yield nested_value(values[SET_ELEM_KEY], DATA_VALUE), _comment(values.get(SET_ELEM_USERDATA, b""))


def rule_comment(rule: bytes) -> str:
    """Return the comment of a rule from the answer for it, empty if there is none."""
    return _comment(nested_value(rule[4:], RULE_USERDATA))


def _comment(data: bytes) -> str:
    notes = dict[int, bytes]()
    while len(data) > 1:  # type, length and value of each note (libnftnl, include/libnftnl/udata.h)
        notes[data[0]], data = data[2 : 2 + data[1]], data[2 + data[1] :]
    return notes.get(UDATA_COMMENT, b"").rstrip(b"\0").decode(errors="replace")


def has_comment(element: bytes) -> bool:
    """Tell whether an element has a comment from the answer for it."""
    return bool(nested_value(element[4:], SET_ELEM_LIST_ELEMENTS, LIST_ELEM, SET_ELEM_USERDATA))


def verdict(element: bytes) -> bytes:
    """Return the verdict of a map element from the answer for it."""
    return nested_value(element[4:], SET_ELEM_LIST_ELEMENTS, LIST_ELEM, SET_ELEM_DATA, DATA_VERDICT)


def target(element: bytes) -> str:
    """Return the chain that a map element leads to from the answer for it."""
    return chain(verdict(element))


def chain(verdict: bytes) -> str:
    """Return the chain to which a verdict leads."""
    return nested_value(verdict, VERDICT_CHAIN).rstrip(b"\0").decode()


def expected_elements(rule: bytes) -> list[ElementKey]:
    """Return, from the answer for a rule of an attachment, the elements that may lead to it: its port's, its pod's.

    Such a rule compares the IP version, perhaps the host's address, the protocol and the port, in this order and after
    all conditions, and loads the pod's address before its port.
    """
    loaded: tuple[int, ...] = ()
    compared: dict[tuple[int, ...], bytes] = {}
    immediates: list[bytes] = []
    for name, data in expressions(rule):
        values = dict(attributes(data))
        if name == "meta":
            loaded = (int.from_bytes(values[META_KEY]),)
        elif name == "payload":
            loaded = payload(values)
        elif name == "cmp" and int.from_bytes(values[CMP_OP]) == CMP_EQ:
            compared[loaded] = nested_value(values[CMP_DATA], DATA_VALUE)
        else:
            loaded = ()
        if name == "immediate":
            immediates.append(nested_value(values[IMMEDIATE_DATA], DATA_VALUE))
    version, pod = compared.get(NFPROTO, b"\0"), b"".join(immediates[-2:-1])
    daddr = DADDR.get(version[0])
    if daddr is None or len(pod) != daddr[2] or L4PROTO not in compared or DPORT not in compared:
        return []
    port = b"".join(part.ljust(4, b"\0") for part in (compared[L4PROTO], compared[DPORT]))
    number = 4 if version[0] == FAMILIES["ip"] else 6
    any_address = version.ljust(4, b"\0") + port
    expected = [(ANY_ADDRESS, any_address), (DYNAMIC, any_address), (PODS[number], pod)]
    if daddr in compared:
        expected.append((ONE_ADDRESS[number], compared[daddr] + port))
    return expected


def nested_value(data: bytes, *path: int) -> bytes:
    """Return the value of an attribute within attributes, empty if it is not there."""
    for kind in path:
        data = dict(attributes(data)).get(kind, b"")
    return data


def payload(values: Mapping[int, bytes]) -> tuple[int, ...]:
    """Return what of a packet a payload expression loads, as in ``DPORT``."""
    return tuple(int.from_bytes(values[kind]) for kind in (PAYLOAD_BASE, PAYLOAD_OFFSET, PAYLOAD_LEN))


def expressions(rule: bytes) -> Iterator[tuple[str, bytes]]:
    """Return name and attributes of each expression from the answer for a rule."""
    return unpacked_expressions(packed_expressions(rule))


def packed_expressions(rule: bytes) -> bytes:
    """Return the expressions from the answer for a rule, as the kernel has them."""
    return nested_value(rule[4:], RULE_EXPRESSIONS)


def unpacked_expressions(packed: bytes) -> Iterator[tuple[str, bytes]]:
    """Return name and attributes of each expression."""
    for _, expression in attributes(packed):
        parts = dict(attributes(expression))
        yield parts[EXPR_NAME].rstrip(b"\0").decode(), parts.get(EXPR_DATA, b"")
