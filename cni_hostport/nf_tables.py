"""The kernel's nf_tables messages: requests for single objects, and what the answers say. Pure.

Numbers and layouts are those of linux/netfilter/nf_tables.h, names those of its enums without the prefix.
"""

from __future__ import annotations

import struct
from _socket import AF_INET, AF_INET6, inet_pton
from sys import byteorder

from cni_hostport.names import (
    ANY_ADDRESS,
    DELETED,
    DYNAMIC,
    FAMILY,
    LOCALNET,
    LOCALNET_NEEDS,
    ONE_ADDRESS,
    PODS,
    PROTOCOL_NUMBERS,
    TABLE,
    localnet_chain,
    packed,
    waiting_map,
)
from cni_hostport.netlink import NLM_F_CREATE, NLM_F_DUMP, attribute, attributes, nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from cni_hostport.netlink import Message

NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
GETTABLE, DELTABLE, GETCHAIN, DELCHAIN, GETRULE, GETSET, NEWSETELEM, GETSETELEM, DELSETELEM = (
    NFNL_SUBSYS_NFTABLES << 8 | number for number in (1, 2, 4, 5, 7, 10, 12, 13, 14)
)
FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}

OBJECT_TABLE = 1  # the name of its table, in messages about a set, chain, rule or element
TABLE_NAME, TABLE_FLAGS, TABLE_OWNER = 1, 2, 7
TABLE_F_DORMANT, TABLE_F_OWNER = 0x1, 0x2
CHAIN_HANDLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_USE, CHAIN_TYPE, CHAIN_FLAGS = 2, 3, 4, 5, 6, 7, 10
RULE_CHAIN, RULE_EXPRESSIONS, RULE_USERDATA = 2, 4, 7
SET_NAME, SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_TIMEOUT = 2, 3, 4, 5, 6, 7, 11
SET_USERDATA, SET_MAP = 13, 0x8
SET_ELEM_LIST_SET, SET_ELEM_LIST_ELEMENTS = 2, 3
SET_ELEM_KEY, SET_ELEM_DATA, SET_ELEM_USERDATA = 1, 2, 6
UDATA_COMMENT = 0  # of libnftnl, in what the kernel keeps for nft with an element or a rule
LIST_ELEM, EXPR_NAME, EXPR_DATA = 1, 1, 2
DATA_VALUE, DATA_VERDICT, VERDICT_CHAIN = 1, 2, 2
META_KEY, PAYLOAD_BASE, PAYLOAD_OFFSET, PAYLOAD_LEN = 2, 2, 3, 4
CMP_OP, CMP_DATA, IMMEDIATE_DATA, LOOKUP_SET = 2, 3, 2, 1
CMP_EQ = 0

# what an expression loads, to be compared by the next one: a key of meta; or base, offset and length of a payload
NFPROTO, L4PROTO, DPORT = (15,), (16,), (2, 2, 2)
DADDR = {FAMILIES["ip"]: (1, 16, 4), FAMILIES["ip6"]: (1, 24, 16)}

ElementKey = tuple[str, bytes]  # the map, and the key as the kernel has it: every part padded to four bytes


def get_table(name: str = TABLE, family: str = FAMILY) -> Message:
    """Ask for a table."""
    return GETTABLE, 0, body(attribute(TABLE_NAME, c_string(name)), family=family)


def delete_table() -> Message:
    """Delete the table with all that is in it."""
    return DELTABLE, 0, body(attribute(TABLE_NAME, c_string(TABLE)))


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


def get_set(name: str) -> Message:
    """Ask for a set or map, without its elements."""
    return GETSET, 0, body(table_attribute(), attribute(SET_NAME, c_string(name)))


def get_sets() -> Message:
    """Ask for all sets and maps of all tables, without their elements."""
    return GETSET, NLM_F_DUMP, struct.pack(">BBH", 0, 0, 0)


def notes_at_set(answer: bytes) -> tuple[str, bytes]:
    """Return a set's kind and name, as in ``map inet filter marks``, and what nft noted there, from its answer."""
    values = dict(attributes(answer[4:]))
    kind = "map" if int.from_bytes(values.get(SET_FLAGS, b"")) & SET_MAP else "set"
    family = next((name for name, number in FAMILIES.items() if number == answer[0]), str(answer[0]))
    table, name = (values[number].rstrip(b"\0").decode(errors="replace") for number in (OBJECT_TABLE, SET_NAME))
    return f"{kind} {family} {table} {name}", values.get(SET_USERDATA, b"")


def get_chain(name: str, table: str = TABLE, family: str = FAMILY) -> Message:
    """Ask for a chain, without its rules."""
    return GETCHAIN, 0, body(table_attribute(table), attribute(CHAIN_NAME, c_string(name)), family=family)


def get_all_chains() -> Message:
    """Ask for the chains of all tables of the family, without their rules."""
    return GETCHAIN, NLM_F_DUMP, body()


def get_all_rules() -> Message:
    """Ask for the rules of all chains of the table."""
    return GETRULE, NLM_F_DUMP, body(table_attribute())


def get_rules(chain: str, table: str = TABLE, family: str = FAMILY) -> Message:
    """Ask for the rules of a chain."""
    return GETRULE, NLM_F_DUMP, body(table_attribute(table), attribute(RULE_CHAIN, c_string(chain)), family=family)


def get_element(element: ElementKey) -> Message:
    """Ask for one element of a map."""
    return GETSETELEM, 0, _elements([element])


def get_elements(name: str) -> Message:
    """Ask for all elements of a set."""
    return GETSETELEM, NLM_F_DUMP, body(table_attribute(), attribute(SET_ELEM_LIST_SET, c_string(name)))


def packed_port(key: str) -> bytes:
    """Return the key of a host port as the kernel has it, from how nft prints it: ``ipv4 . tcp . 8080``."""
    address_or_version, protocol, port = key.split(" . ")
    if address_or_version in {"ipv4", "ipv6"}:
        address = bytes([FAMILIES[address_or_version.replace("v4", "").replace("v6", "6")]])
    else:
        address = inet_pton(AF_INET6 if ":" in address_or_version else AF_INET, address_or_version)
    parts = address, bytes([PROTOCOL_NUMBERS[protocol]]), int(port).to_bytes(2)
    return b"".join(part.ljust(4, b"\0") for part in parts)


def port(key: bytes) -> int:
    """Return the port of a key of a host port."""
    return int.from_bytes(key[-4:-2])


def transaction(*messages: Message) -> list[Message]:
    """Return the messages as a transaction."""
    edge = struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES)
    return [(NFNL_MSG_BATCH_BEGIN, 0, edge), *messages, (NFNL_MSG_BATCH_END, 0, edge)]


def delete(elements: Sequence[ElementKey], chains: Iterable[str], handle: bytes) -> list[Message]:
    """Delete elements, chains by their names, and one by its handle."""
    maps = dict.fromkeys(name for name, _ in elements)
    return [
        *((DELSETELEM, 0, _elements([element for element in elements if element[0] == name])) for name in maps),
        *((DELCHAIN, 0, body(table_attribute(), attribute(CHAIN_NAME, c_string(name)))) for name in chains),
        (DELCHAIN, 0, body(table_attribute(), attribute(CHAIN_HANDLE, handle))),
    ]


def waiter(key: str, element: ElementKey) -> ElementKey:
    """Return the element by which an attachment waits for the port of another element."""
    return waiting_map(element[0]), packed(key) + element[1]


def localnet_needs(key: str) -> ElementKey:
    """Return the element of an attachment that needs ``route_localnet``."""
    return LOCALNET_NEEDS, packed(key)


def localnet(interface: int) -> ElementKey:
    """Return the element of an interface that is guarded."""
    return LOCALNET, interface.to_bytes(4, byteorder)


def unguard(interface: int) -> list[Message]:
    """Take the guard off an interface; fails while an attachment needs it."""
    chain = body(table_attribute(), attribute(CHAIN_NAME, c_string(localnet_chain(interface))))
    return [(DELSETELEM, 0, _elements([localnet(interface)])), (DELCHAIN, 0, chain)]


def get_deleted(key: str) -> Message:
    """Ask for an attachment among the deleted ones."""
    return get_element((DELETED, packed(key)))


def deletion_note(key: str) -> list[Message]:
    """Put an attachment among the deleted ones, for as long as if it had not been there."""
    element = _elements([(DELETED, packed(key))])
    add = NEWSETELEM, NLM_F_CREATE, element
    return [add, (DELSETELEM, 0, element), add]


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
    return nested_value(verdict(element), VERDICT_CHAIN).rstrip(b"\0").decode()


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


def body(*parts: bytes, family: str = FAMILY) -> bytes:
    """Return the body of a message about something of a family."""
    return struct.pack(">BBH", FAMILIES[family], 0, 0) + b"".join(parts)


def table_attribute(table: str = TABLE) -> bytes:
    """Name the table."""
    return attribute(OBJECT_TABLE, c_string(table))


def c_string(text: str) -> bytes:
    """Return a name as the kernel has it."""
    return text.encode() + b"\0"


def _elements(elements: Sequence[ElementKey]) -> bytes:
    """Name elements of one map."""
    keys = (nested(LIST_ELEM, nested(SET_ELEM_KEY, attribute(DATA_VALUE, key))) for _, key in elements)
    in_map = attribute(SET_ELEM_LIST_SET, c_string(elements[0][0]))
    return body(table_attribute(), in_map, nested(SET_ELEM_LIST_ELEMENTS, *keys))


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
