"""Rules of other programs in nf_tables' messages, iptables' among them: what they say, and how they are deleted. Pure.

Numbers and layouts as in ``nf_tables`` and ``nf_answers``.
"""

from __future__ import annotations

import struct

from cni_hostport.netlink import attribute, attributes
from cni_hostport.nf_answers import (
    CMP_DATA,
    DATA_VERDICT,
    DPORT,
    IMMEDIATE_DATA,
    VERDICT_CHAIN,
    expressions,
    nested_value,
    payload,
)
from cni_hostport.nf_tables import (
    CHAIN_NAME,
    DATA_VALUE,
    DELCHAIN,
    NFNL_SUBSYS_NFTABLES,
    RULE_CHAIN,
    body,
    c_string,
    table_attribute,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni_hostport.netlink import Message

DELRULE = NFNL_SUBSYS_NFTABLES << 8 | 8
RULE_HANDLE = 3
MATCH_NAME, MATCH_INFO = 1, 3
MULTIPORT = struct.Struct("=xB15H")  # linux/netfilter/xt_multiport.h: how many ports there are, and those

Chain = tuple[str, str, str]  # family, table, name
# where the kernel names the tables that iptables has without nf_tables, of the family ip or ip6
LEGACY_TABLE_NAMES = "/proc/thread-self/net/{}_tables_names"


def delete_rule(rule: bytes, chain: Chain) -> Message:
    """Delete a rule of a chain by its handle, from the answer for it."""
    family, table, name = chain
    number = attribute(RULE_HANDLE, dict(attributes(rule[4:]))[RULE_HANDLE])
    return DELRULE, 0, body(table_attribute(table), attribute(RULE_CHAIN, c_string(name)), number, family=family)


def delete_chain(chain: Chain) -> list[Message]:
    """Delete a chain with its rules; the kernel refuses that while others jump there."""
    family, table, name = chain
    return [
        (DELRULE, 0, body(table_attribute(table), attribute(RULE_CHAIN, c_string(name)), family=family)),
        (DELCHAIN, 0, body(table_attribute(table), attribute(CHAIN_NAME, c_string(name)), family=family)),
    ]


def jump_target(rule: bytes) -> str:
    """Return the chain that a rule jumps or goes to, empty if to none, from the answer for it."""
    verdicts = (
        nested_value(data, IMMEDIATE_DATA, DATA_VERDICT, VERDICT_CHAIN)
        for name, data in expressions(rule)
        if name == "immediate"
    )
    return next((target.rstrip(b"\0").decode(errors="replace") for target in verdicts if target), "")


def comment_of_iptables(rule: bytes) -> str:
    """Return the comment that iptables gave a rule, empty if it has none, from the answer for it."""
    matches = (dict(attributes(data)) for name, data in expressions(rule) if name == "match")
    texts = (values[MATCH_INFO] for values in matches if values[MATCH_NAME].rstrip(b"\0") == b"comment")
    return next(texts, b"").partition(b"\0")[0].decode(errors="replace")


def number(rule: bytes) -> int:
    """Return the handle of a rule, from the answer for it."""
    return int.from_bytes(dict(attributes(rule[4:]))[RULE_HANDLE])


def destination_ports(rule: bytes) -> set[int]:
    """Return the destination ports that a rule compares with, from the answer for it.

    They are none as well where it does so in another way than by one comparison each, or by iptables' multiport.
    """
    ports, is_loaded = set[int](), False
    for name, data in expressions(rule):
        values = dict(attributes(data))
        if name == "match" and values[MATCH_NAME].rstrip(b"\0") == b"multiport":
            count, *numbers = MULTIPORT.unpack_from(values[MATCH_INFO])
            ports.update(numbers[:count])
        elif name == "cmp" and is_loaded:
            ports.add(int.from_bytes(nested_value(values[CMP_DATA], DATA_VALUE)))
        is_loaded = name == "payload" and payload(values) == DPORT
    return ports
