"""The kernel's nf_tables messages: requests for single objects, and what the answers say. Pure.

Numbers and layouts are those of linux/netfilter/nf_tables.h, names those of its enums without the prefix.
"""

from __future__ import annotations

import struct

from cni_hostport.netlink import NLM_F_CREATE, NLM_F_DUMP, attribute, attributes, nested
from cni_hostport.table import DELETED, FAMILY, TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cni_hostport.netlink import Message

NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
GETTABLE, GETCHAIN, DELCHAIN, GETRULE, DELRULE, GETSET, NEWSETELEM, GETSETELEM, DELSETELEM = (
    NFNL_SUBSYS_NFTABLES << 8 | number for number in (1, 4, 5, 7, 8, 10, 12, 13, 14)
)
FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}

IN_TABLE = 1  # the name of the table, in messages about whatever is in one
TABLE_NAME, TABLE_FLAGS = 1, 2
CHAIN_HANDLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_USE, CHAIN_TYPE, CHAIN_FLAGS = 2, 3, 4, 5, 6, 7, 10
RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS, RULE_USERDATA = 2, 3, 4, 7
UDATA_RULE_COMMENT = 0  # libnftnl's udata.h, as are its layout: type and length, a byte each, and the value
SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_TIMEOUT = 2, 3, 4, 5, 6, 7, 11
SET_ELEM_LIST_SET, SET_ELEM_LIST_ELEMENTS = 2, 3
SET_ELEM_KEY, SET_ELEM_DATA = 1, 2
LIST_ELEM, EXPR_NAME, EXPR_DATA = 1, 1, 2
DATA_VALUE, DATA_VERDICT, VERDICT_CHAIN = 1, 2, 2
META_KEY, PAYLOAD_BASE, PAYLOAD_OFFSET, PAYLOAD_LEN, CMP_OP, CMP_DATA, IMMEDIATE_DATA, LOOKUP_SET = (
    2,
    2,
    3,
    4,
    2,
    3,
    2,
    1,
)
CMP_EQ = 0
MATCH_NAME, MATCH_INFO = 1, 3
MULTIPORT = struct.Struct("=xB15H")  # linux/netfilter/xt_multiport.h: how many ports there are, and those

# what an expression loads, to be compared by the next one: a key of meta; or base, offset and length of a payload
NFPROTO, L4PROTO, DPORT = (15,), (16,), (2, 2, 2)
DADDR = {FAMILIES["ip"]: (1, 16, 4), FAMILIES["ip6"]: (1, 24, 16)}

# what of an object its effect depends on
COMPARED = {
    GETTABLE: (TABLE_FLAGS,),
    GETSET: (SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_TIMEOUT),
    GETCHAIN: (
        CHAIN_HOOK,
        CHAIN_POLICY,
        CHAIN_USE,
        CHAIN_TYPE,
        CHAIN_FLAGS,
    ),  # in use: by rules, and by what leads there
}

Chain = tuple[str, str, str]  # family, table, name
Element = tuple[str, bytes]  # the map, and the key as the kernel has it: every part padded to four bytes


def get_table() -> Message:
    """Ask for the table."""
    return GETTABLE, 0, _body(attribute(TABLE_NAME, _text(TABLE)))


def get_set(name: str) -> Message:
    """Ask for a set or map, without its elements."""
    return GETSET, 0, _body(_in_table(), attribute(SET_NAME, _text(name)))


def get_chain(name: str, table: str = TABLE, family: str = FAMILY) -> Message:
    """Ask for a chain, without its rules."""
    return GETCHAIN, 0, _body(_in_table(table), attribute(CHAIN_NAME, _text(name)), family=family)


def get_rules(chain: str, table: str = TABLE, family: str = FAMILY) -> Message:
    """Ask for the rules of a chain."""
    return GETRULE, NLM_F_DUMP, _body(_in_table(table), attribute(RULE_CHAIN, _text(chain)), family=family)


def get_element(element: Element) -> Message:
    """Ask for one element of a map."""
    return GETSETELEM, 0, _elements([element])


def transaction(*messages: Message) -> list[Message]:
    """Return the messages as a transaction."""
    edge = struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES)
    return [(NFNL_MSG_BATCH_BEGIN, 0, edge), *messages, (NFNL_MSG_BATCH_END, 0, edge)]


def delete(elements: Sequence[Element], chains: Iterable[str], handle: bytes) -> list[Message]:
    """Delete elements, chains by their names, and one by its handle."""
    maps = dict.fromkeys(name for name, _ in elements)
    return [
        *((DELSETELEM, 0, _elements([element for element in elements if element[0] == name])) for name in maps),
        *((DELCHAIN, 0, _body(_in_table(), attribute(CHAIN_NAME, _text(name)))) for name in chains),
        (DELCHAIN, 0, _body(_in_table(), attribute(CHAIN_HANDLE, handle))),
    ]


def delete_rule(rule: bytes, chain: Chain) -> Message:
    """Delete a rule of a chain by its handle, from the answer for it."""
    family, table, name = chain
    number = attribute(RULE_HANDLE, dict(attributes(rule[4:]))[RULE_HANDLE])
    return DELRULE, 0, _body(_in_table(table), attribute(RULE_CHAIN, _text(name)), number, family=family)


def delete_chain(chain: Chain) -> list[Message]:
    """Delete a chain with its rules."""
    family, table, name = chain
    return [
        (DELRULE, 0, _body(_in_table(table), attribute(RULE_CHAIN, _text(name)), family=family)),
        (DELCHAIN, 0, _body(_in_table(table), attribute(CHAIN_NAME, _text(name)), family=family)),
    ]


def get_deleted(key: str) -> Message:
    """Ask for an attachment among the deleted ones."""
    return get_element((DELETED, _packed(key)))


def note_deleted(key: str) -> list[Message]:
    """Put an attachment among the deleted ones, for as long as if it had not been there."""
    element = _elements([(DELETED, _packed(key))])
    add = NEWSETELEM, NLM_F_CREATE, element
    return [add, (DELSETELEM, 0, element), add]


def handle(chain: bytes) -> bytes:
    """Return the handle of a chain from the answer for it."""
    return dict(attributes(chain[4:]))[CHAIN_HANDLE]


def verdict(element: bytes) -> bytes:
    """Return the verdict of a map element from the answer for it."""
    return _inside(element[4:], SET_ELEM_LIST_ELEMENTS, LIST_ELEM, SET_ELEM_DATA, DATA_VERDICT)


def target(element: bytes) -> str:
    """Return the chain that a map element leads to from the answer for it."""
    return _inside(verdict(element), VERDICT_CHAIN).rstrip(b"\0").decode()


def expected_elements(rule: bytes) -> list[Element]:
    """Return, from the answer for a rule of an attachment, the elements that may lead to it: its port's, its pod's.

    Such a rule compares the IP version, perhaps the host's address, the protocol and the port, in this order and after
    all conditions, and loads the pod's address before its port.
    """
    loaded: tuple[int, ...] = ()
    compared: dict[tuple[int, ...], bytes] = {}
    immediates: list[bytes] = []
    for name, data in _expressions(rule):
        values = dict(attributes(data))
        if name == "meta":
            loaded = (int.from_bytes(values[META_KEY]),)
        elif name == "payload":
            loaded = _payload(values)
        elif name == "cmp" and int.from_bytes(values[CMP_OP]) == CMP_EQ:
            compared[loaded] = _inside(values[CMP_DATA], DATA_VALUE)
        else:
            loaded = ()
        if name == "immediate":
            immediates.append(_inside(values[IMMEDIATE_DATA], DATA_VALUE))
    version, pod = compared.get(NFPROTO, b"\0"), b"".join(immediates[-2:-1])
    daddr = DADDR.get(version[0])
    if daddr is None or len(pod) != daddr[2] or L4PROTO not in compared or DPORT not in compared:
        return []
    port = b"".join(part.ljust(4, b"\0") for part in (compared[L4PROTO], compared[DPORT]))
    number = 4 if version[0] == FAMILIES["ip"] else 6
    expected = [("hostports", version.ljust(4, b"\0") + port), (f"pods_ip{number}", pod)]
    if daddr in compared:
        expected.append((f"hostports_ip{number}", compared[daddr] + port))
    return expected


def jump_target(rule: bytes) -> str:
    """Return the chain that a rule jumps or goes to, empty if to none, from the answer for it."""
    immediates = (
        _inside(data, IMMEDIATE_DATA, DATA_VERDICT) for name, data in _expressions(rule) if name == "immediate"
    )
    return next((_inside(verdict, VERDICT_CHAIN).rstrip(b"\0").decode() for verdict in immediates if verdict), "")


def comment(rule: bytes) -> str:
    """Return the comment that nft gave a rule, empty if it has none, from the answer for it."""
    left = _inside(rule[4:], RULE_USERDATA)
    while left:
        kind, length = left[:2]
        if kind == UDATA_RULE_COMMENT:
            return left[2 : 2 + length].rstrip(b"\0").decode(errors="replace")
        left = left[2 + length :]
    return ""


def destination_ports(rule: bytes) -> set[int]:
    """Return the destination ports that a rule, also one of iptables, compares with, from the answer for it.

    They are none as well where it does so in another way than these two: one after another, or iptables' multiport.
    """
    ports, is_loaded = set[int](), False
    for name, data in _expressions(rule):
        values = dict(attributes(data))
        if name == "match" and values[MATCH_NAME].rstrip(b"\0") == b"multiport":
            count, *numbers = MULTIPORT.unpack_from(values[MATCH_INFO])
            ports.update(numbers[:count])
        elif name == "cmp" and is_loaded:
            ports.add(int.from_bytes(_inside(values[CMP_DATA], DATA_VALUE)))
        is_loaded = name == "payload" and _payload(values) == DPORT
    return ports


def effect(kind: int, answer: bytes) -> list[tuple[int, bytes]]:
    """Return what of a table, set or chain its effect depends on, from the answer for it."""
    return [(number, value) for number, value in attributes(answer[4:]) if number in COMPARED[kind]]


def effect_of_rule(rule: bytes) -> list[tuple[str, bytes]] | None:
    """Return a rule's expressions, without what its counter has counted; ``None`` if one uses a map of the rule's own.

    Such a map has another name in every table.
    """
    expressions = [(name, b"" if name == "counter" else data) for name, data in _expressions(rule)]
    own = any(name == "lookup" and _inside(data, LOOKUP_SET).startswith(b"__") for name, data in expressions)
    return None if own else expressions


def _body(*parts: bytes, family: str = FAMILY) -> bytes:
    return struct.pack(">BBH", FAMILIES[family], 0, 0) + b"".join(parts)


def _in_table(table: str = TABLE) -> bytes:
    return attribute(IN_TABLE, _text(table))


def _packed(key: str) -> bytes:
    return bytes.fromhex(key.replace("-", ""))


def _text(text: str) -> bytes:
    return text.encode() + b"\0"


def _elements(elements: Sequence[Element]) -> bytes:
    """Name elements of one map."""
    keys = (nested(LIST_ELEM, nested(SET_ELEM_KEY, attribute(DATA_VALUE, key))) for _, key in elements)
    in_map = attribute(SET_ELEM_LIST_SET, _text(elements[0][0]))
    return _body(_in_table(), in_map, nested(SET_ELEM_LIST_ELEMENTS, *keys))


def _inside(data: bytes, *path: int) -> bytes:
    """Return the value of an attribute within attributes, empty if it is not there."""
    for kind in path:
        data = dict(attributes(data)).get(kind, b"")
    return data


def _payload(values: Mapping[int, bytes]) -> tuple[int, ...]:
    return tuple(int.from_bytes(values[kind]) for kind in (PAYLOAD_BASE, PAYLOAD_OFFSET, PAYLOAD_LEN))


def _expressions(rule: bytes) -> Iterator[tuple[str, bytes]]:
    for _, expression in attributes(_inside(rule[4:], RULE_EXPRESSIONS)):
        parts = dict(attributes(expression))
        yield parts[EXPR_NAME].rstrip(b"\0").decode(), parts.get(EXPR_DATA, b"")
