"""Messages to the kernel's nf_tables: requests for objects, and changes. ``nf_answers`` takes the answers apart. Pure.

Numbers and layouts are those of linux/netfilter/nf_tables.h, names those of its enums without the prefix.
"""

from __future__ import annotations

import struct
from _socket import AF_INET, AF_INET6, inet_pton
from sys import byteorder

from cni_hostport.names import (
    DELETED,
    FAMILY,
    LOCALNET,
    LOCALNET_NEEDS,
    PROTOCOL_NUMBERS,
    TABLE,
    localnet_chain,
    packed,
    waiting_map,
)
from cni_hostport.netlink import NLM_F_CREATE, NLM_F_DUMP, attribute, nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cni_hostport.netlink import Message

NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
GETTABLE, DELTABLE, GETCHAIN, DELCHAIN, GETRULE, GETSET, NEWSETELEM, GETSETELEM, DELSETELEM = (
    NFNL_SUBSYS_NFTABLES << 8 | number for number in (1, 2, 4, 5, 7, 10, 12, 13, 14)
)
FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}

OBJECT_TABLE = 1  # the name of its table, in messages about a set, chain, rule or element
TABLE_NAME, CHAIN_HANDLE, CHAIN_NAME, RULE_CHAIN, SET_NAME = 1, 2, 3, 2, 2
SET_ELEM_LIST_SET, SET_ELEM_LIST_ELEMENTS = 2, 3
LIST_ELEM, SET_ELEM_KEY, DATA_VALUE = 1, 1, 1

ElementKey = tuple[str, bytes]  # the map, and the key as the kernel has it: every part padded to four bytes


def get_table(name: str = TABLE, family: str = FAMILY) -> Message:
    """Ask for a table."""
    return GETTABLE, 0, body(attribute(TABLE_NAME, c_string(name)), family=family)


def delete_table() -> Message:
    """Delete the table with all that is in it."""
    return DELTABLE, 0, body(attribute(TABLE_NAME, c_string(TABLE)))


def get_set(name: str) -> Message:
    """Ask for a set or map, without its elements."""
    return GETSET, 0, body(table_attribute(), attribute(SET_NAME, c_string(name)))


def get_sets() -> Message:
    """Ask for all sets and maps of all tables, without their elements."""
    return GETSET, NLM_F_DUMP, struct.pack(">BBH", 0, 0, 0)


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
