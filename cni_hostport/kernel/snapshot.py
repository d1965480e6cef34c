"""All that an attachment's connections pass through, from the kernel's messages, to be compared with ``==``.

This is how CHECK compares most attachments: it is faster than nft's listings, which ``ruleset.differences`` compares
where two snapshots differ, or where there is none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from cni_hostport.names import MAPS, SETS, dnat_chain, masq_chain
from cni_hostport.netlink import attributes
from cni_hostport.nf_tables import (
    CHAIN_FLAGS,
    CHAIN_HOOK,
    CHAIN_POLICY,
    CHAIN_TYPE,
    CHAIN_USE,
    GETCHAIN,
    GETSET,
    GETTABLE,
    LOOKUP_SET,
    SET_DATA_LEN,
    SET_DATA_TYPE,
    SET_FLAGS,
    SET_KEY_LEN,
    SET_KEY_TYPE,
    SET_TIMEOUT,
    TABLE_FLAGS,
    c_string,
    get_chain,
    get_set,
    get_table,
    nested_value,
    packed_expressions,
    unpacked_expressions,
)
from cni_hostport.ruleset.base import BASE_CHAINS

if TYPE_CHECKING:
    from cni_hostport.lookup import Lookup

# by the kind of an object, the attributes on which its effect depends
COMPARED = {
    GETTABLE: (TABLE_FLAGS,),
    GETSET: (SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_TIMEOUT),
    # a chain is in use by its rules, and by the elements and rules that lead there
    GETCHAIN: (CHAIN_HOOK, CHAIN_POLICY, CHAIN_USE, CHAIN_TYPE, CHAIN_FLAGS),
}

SAME_RULES = 64  # so many or more are the same in what is compared: those of the base
_BASE_SETS = {c_string(name) for name in (*MAPS, *SETS)}


def snapshot(lookup: Lookup, key: str) -> object:
    """Return all that an attachment's connections pass through, to be compared with ``==``.

    ``None`` where something in it cannot be compared. Raises ``NFTError`` as the methods of ``Lookup`` do.
    """
    chains = (*BASE_CHAINS, masq_chain(key), dnat_chain(key))
    messages = [get_table(), *map(get_set, (*MAPS, *SETS)), *map(get_chain, chains)]
    answers = zip(messages, lookup.ask(*messages), strict=True)
    objects = [answer and effect(kind, answer) for (kind, _, _), answer in answers]
    rules = [lookup.rules(chain) for chain in chains]
    effects = [[effect_of_rule(rule) for rule in rules_of_chain] for rules_of_chain in rules]
    if any(None in effects_of_chain for effects_of_chain in effects):
        return None
    return objects, effects, lookup.elements(key, rules[-1]), lookup.guarded_interface(key)


def effect(kind: int, answer: bytes) -> list[tuple[int, bytes]]:
    """Return the attributes on which the effect of a table, set or chain depends, from the answer for it."""
    return [(number, value) for number, value in attributes(answer[4:]) if number in COMPARED[kind]]


def effect_of_rule(rule: bytes) -> list[tuple[str, bytes]] | None:
    """Return a rule's expressions, without what its counter has counted; ``None`` if one uses a set besides the base's.

    What is in such a set is part of the rule's effect, and one without a name has another name in every table.
    """
    return _effect_of_expressions(packed_expressions(rule))


@lru_cache(SAME_RULES)
def _effect_of_expressions(packed: bytes) -> list[tuple[str, bytes]] | None:
    effects = [(name, b"" if name == "counter" else data) for name, data in unpacked_expressions(packed)]
    used = {nested_value(data, LOOKUP_SET) for name, data in effects if name == "lookup"}
    return effects if used <= _BASE_SETS else None
