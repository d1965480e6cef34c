"""Somebody else's set, as nftables 1.1.3 and later declare it with ``type``, and up to 1.1.1 crash on reading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.netlink import NETLINK_NETFILTER, NLM_F_CREATE, Netlink, attribute
from cni_hostport.nf_answers import SET_KEY_LEN, SET_KEY_TYPE, SET_USERDATA
from cni_hostport.nf_tables import SET_NAME, body, c_string, table_attribute, transaction

if TYPE_CHECKING:
    from lab import Node

    from cni_hostport.netlink import Message

SET = "set inet foreign blocked"
NEWTABLE, DELTABLE, NEWSET = 0x0A00, 0x0A02, 0x0A09
SET_ID = 10
INET_SERVICE = 13  # enum datatypes of nftables' include/datatype.h
# the byte order of the key; and what it was declared by (typeof): an expression of kind 4, a type, without more of it
USERDATA = b"\x00\x04\x02\x00\x00\x00" + b"\x03\x08" + b"\x00\x04\x04\x00\x00\x00" + b"\x01\x00"


def declare_set(node: Node, table: str = "foreign", family: str = "inet") -> None:
    """Declare the set on a node; ``SET`` if in no other table."""
    numbers = ((SET_KEY_TYPE, INET_SERVICE), (SET_KEY_LEN, 2), (SET_ID, 1))
    declared = b"".join(attribute(kind, number.to_bytes(4)) for kind, number in numbers)
    name, notes = attribute(SET_NAME, c_string("blocked")), attribute(SET_USERDATA, USERDATA)
    change(
        node,
        (NEWTABLE, NLM_F_CREATE, body(table_attribute(table), family=family)),
        (NEWSET, NLM_F_CREATE, body(table_attribute(table), name, declared, notes, family=family)),
    )


def delete_table(node: Node) -> None:
    """Delete this plugin's table, which nft cannot where it crashes."""
    change(node, (DELTABLE, 0, body(table_attribute())))


def change(node: Node, *messages: Message) -> None:
    """Run a transaction of nf_tables' messages on a node."""
    with node.inside(), Netlink(NETLINK_NETFILTER) as netlink:
        outcomes = [error for error, _ in netlink.ask(transaction(*messages))[1:-1]]
    if any(outcomes):
        raise AssertionError(outcomes)


def crashes_nft(node: Node) -> bool:
    """Tell whether this machine's nft crashes on the set."""
    return node.run("nft", *f"list {SET}".split(), check=False).returncode < 0
