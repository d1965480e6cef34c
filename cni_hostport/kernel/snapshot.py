"""All that an attachment's connections pass through, from the kernel's messages, to be compared with ``==``.

This is how CHECK compares most attachments: it is faster than nft's listings, which ``ruleset.differences`` compares
where two snapshots differ, or where there is none.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from sys import byteorder
from typing import TYPE_CHECKING

from cni_hostport.names import (
    HASH_BYTES,
    LOCALNET,
    LOCALNET_NEEDS,
    MAPS,
    SETS,
    TABLE,
    WAITING_MAPS,
    dnat_chain,
    key_in,
    localnet_chain,
    masq_chain,
    unpacked,
)
from cni_hostport.netlink import attributes
from cni_hostport.nf_answers import (
    CHAIN_FLAGS,
    CHAIN_HOOK,
    CHAIN_POLICY,
    CHAIN_TYPE,
    CHAIN_USE,
    LOOKUP_SET,
    RULE_EXPRESSIONS,
    SET_DATA_LEN,
    SET_DATA_TYPE,
    SET_FLAGS,
    SET_KEY_LEN,
    SET_KEY_TYPE,
    SET_TIMEOUT,
    TABLE_FLAGS,
    VERDICT_CHAIN,
    members,
    members_with_verdicts,
    nested_value,
    packed_expressions,
    unpacked_expressions,
)
from cni_hostport.nf_tables import (
    CHAIN_NAME,
    GETCHAIN,
    GETSET,
    GETTABLE,
    OBJECT_TABLE,
    RULE_CHAIN,
    c_string,
    get_all_chains,
    get_all_rules,
    get_chain,
    get_elements,
    get_set,
    get_table,
)
from cni_hostport.ruleset.base import BASE_CHAINS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.lookup import Lookup

# by the kind of an object, the attributes on which its effect depends
COMPARED = {
    GETTABLE: (TABLE_FLAGS,),
    GETSET: (SET_FLAGS, SET_KEY_TYPE, SET_KEY_LEN, SET_DATA_TYPE, SET_DATA_LEN, SET_TIMEOUT),
    # a chain is in use by its rules, and by the elements and rules that lead there
    GETCHAIN: (CHAIN_HOOK, CHAIN_POLICY, CHAIN_USE, CHAIN_TYPE, CHAIN_FLAGS),
}

SAME_RULES = 64  # rules of which the effect is kept: more than the base has, which is the same in every comparison
ATTACHMENT_BYTES = 2 * HASH_BYTES  # of an attachment's key
WITH_CONTENT = c_string("lookup"), c_string("counter")  # expressions of rules, to which more belongs than is compared
_BASE_SETS = {c_string(name) for name in (*MAPS, *SETS)}


def snapshot(lookup: Lookup, key: str) -> object:
    """Return all that an attachment's connections pass through, to be compared with ``==``.

    ``None`` where something in it cannot be compared. Raises ``NFTError`` as the methods of ``Lookup`` do.
    """
    found = _comparable(lookup, masq_chain(key), dnat_chain(key))
    if not found:
        return None
    objects, effects, rules = found
    return objects, effects, lookup.elements(key, rules[-1]), lookup.guarded_interface(key)


def base_snapshot(lookup: Lookup) -> object:
    """Return the base below all attachments, to be compared with ``==``, as ``snapshot`` does."""
    found = _comparable(lookup)
    return found and found[:2]


def _comparable(
    lookup: Lookup, *others: str
) -> tuple[Sequence[object], Sequence[object], Sequence[Sequence[bytes]]] | None:
    """Return what is compared of the base's objects, of its rules and other chains', and these rules themselves."""
    chains = (*BASE_CHAINS, *others)
    messages = [get_table(), *map(get_set, (*MAPS, *SETS)), *map(get_chain, chains)]
    answers = zip(messages, lookup.ask(*messages), strict=True)
    objects = [answer and effect(kind, answer) for (kind, _, _), answer in answers]
    rules = [lookup.rules(chain) for chain in chains]
    effects = [[effect_of_rule(rule) for rule in rules_of_chain] for rules_of_chain in rules]
    if any(None in effects_of_chain for effects_of_chain in effects):
        return None
    return objects, effects, rules


def snapshots(lookup: Lookup) -> dict[str, object] | None:
    """Return what the table has of each attachment, the base aside, by its key, to be compared with ``==``.

    Attachments of which something cannot be compared are left out. ``None`` if the ruleset was changed meanwhile.
    Raises ``NFTError`` as the methods of ``Lookup`` do.
    """
    questions = get_all_chains(), get_all_rules(), *map(get_elements, (LOCALNET, *MAPS))
    answers = [lookup.dump(question) for question in questions]
    if None in answers:
        return None
    chains, rules, guards, *maps = (answer or () for answer in answers)
    found: defaultdict[str, dict[object, list[object]]] = defaultdict(dict)
    for chain in chains:
        values = dict(attributes(chain[4:]))
        if values[OBJECT_TABLE] == c_string(TABLE):
            name = values[CHAIN_NAME]
            found[_key_in(name)][name] = [effect(GETCHAIN, chain)]
    incomparable = {""}
    for rule in rules:
        values = dict(attributes(rule[4:]))
        name, expressions = values[RULE_CHAIN], values.get(RULE_EXPRESSIONS, b"")
        found[_key_in(name)].setdefault(name, []).append(expressions)
        if any(word in expressions for word in WITH_CONTENT):
            incomparable.add(_key_in(name))
    guarded = {c_string(localnet_chain(int.from_bytes(key, byteorder))) for answer in guards for key in members(answer)}
    for map_name, elements in zip(MAPS, maps, strict=True):
        for key, verdict in (element for answer in elements for element in members_with_verdicts(answer)):
            chain = nested_value(verdict, VERDICT_CHAIN)
            begins_with_waiter = map_name in WAITING_MAPS or map_name == LOCALNET_NEEDS
            held = found[unpacked(key[:ATTACHMENT_BYTES]) if begins_with_waiter else _key_in(chain)]
            held[map_name, key] = [verdict]
            if map_name == LOCALNET_NEEDS:
                held[LOCALNET] = [chain in guarded]
    return {key: held for key, held in found.items() if key not in incomparable}


def _key_in(chain: bytes) -> str:
    return key_in(chain.rstrip(b"\0").decode(errors="replace"))


def effect(kind: int, answer: bytes) -> list[tuple[int, bytes]]:
    """Return the attributes on which the effect of a table, set or chain depends, from the answer for it."""
    return [(number, value) for number, value in attributes(answer[4:]) if number in COMPARED[kind]]


def effect_of_rule(rule: bytes) -> tuple[tuple[str, bytes], ...] | None:
    """Return a rule's expressions, without what its counter has counted; ``None`` if one uses a set besides the base's.

    What is in such a set is part of the rule's effect, and one without a name has another name in every table.
    """
    return _effect_of_expressions(packed_expressions(rule))


@lru_cache(SAME_RULES)
def _effect_of_expressions(packed: bytes) -> tuple[tuple[str, bytes], ...] | None:
    effects = tuple((name, b"" if name == "counter" else data) for name, data in unpacked_expressions(packed))
    used = {nested_value(data, LOOKUP_SET) for name, data in effects if name == "lookup"}
    return effects if used <= _BASE_SETS else None
