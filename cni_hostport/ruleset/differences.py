"""What CHECK regards as a difference: nft's listings of an attachment and the base below it, compared. Pure.

``kernel.snapshot`` comes first, and compares the same from the kernel's messages: what it does not see, CHECK does not.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from cni_hostport.names import FAMILY, TABLE, masq_chain
from cni_hostport.ruleset.base import BASE_CHAINS, target_maps
from cni_hostport.ruleset.elements import elements
from cni_hostport.ruleset.installed import MAP_LISTINGS, token_listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    State = Mapping[str, Sequence[dict[str, Any]]]  # listings, by what was listed

TABLES, WHOLE_TABLE = f"tables {FAMILY}", f"table {FAMILY} {TABLE}"
# The types of the expressions by which keys are declared. Newer versions of nftables list the expressions; older
# versions of this plugin declared keys by types.
TYPES = {
    '{"meta": {"key": "nfproto"}}': "nf_proto",
    '{"meta": {"key": "l4proto"}}': "inet_proto",
    '{"payload": {"protocol": "th", "field": "dport"}}': "inet_service",
    '{"payload": {"protocol": "ip", "field": "daddr"}}': "ipv4_addr",
    '{"payload": {"protocol": "ip6", "field": "daddr"}}': "ipv6_addr",
}
# the properties of an object in a listing on which its effect does not depend
WITHOUT_EFFECT = frozenset({"family", "table", "chain", "handle", "comment", "elem"})


def listing_names(key: str) -> list[str]:
    """Return what nft has to list to show all that an attachment's connections pass through."""
    base = [f"chain {FAMILY} {TABLE} {name}" for name in BASE_CHAINS]
    targets = [f"map {FAMILY} {TABLE} {name}" for name in target_maps(key)]
    return [TABLES, *MAP_LISTINGS, *targets, *base, token_listing(key), f"chain {FAMILY} {TABLE} {masq_chain(key)}"]


def attachment_listings(listing: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Return the listings that ``listing_names`` names, but the first, from one of the whole table."""
    listings: dict[str, list[dict[str, Any]]] = {name: [] for name in listing_names(key) if name != TABLES}
    for item in listing:
        for kind, body in item.items():
            name = body.get("chain") if kind == "rule" else body.get("name")
            listing_name = f"{'chain' if kind == 'rule' else kind} {FAMILY} {TABLE} {name}"
            if listing_name in listings:
                listings[listing_name].append(item)
    return listings


def differences(key: str, expected: State, actual: State) -> list[str]:
    """Say, one sentence each, in what an attachment and the base below it are not as expected."""
    if not _comparable(key, actual[TABLES]):
        return [f"table {FAMILY} {TABLE} is missing"]
    found = []
    for name in expected:
        wanted, present = (_comparable(key, state[name]) for state in (expected, actual))
        if wanted and not present:
            found.append(f"{name} is missing")
            continue
        lacking, extra = Counter(wanted) - Counter(present), Counter(present) - Counter(wanted)
        found += [f"{name} lacks {line}" for line in lacking] + [f"{name} has {line}" for line in extra]
        if wanted != present and not lacking and not extra:
            found.append(f"{name} has its rules in another order")
    return found


def _comparable(key: str, listing: Iterable[dict[str, Any]]) -> list[str]:
    """Reduce the objects of a listing to their effect on one attachment: no handles, counters and comments."""
    lines = []
    for item in listing:
        for kind, body in item.items():
            if kind == "table" and body["name"] == TABLE:
                lines.append(f"table {TABLE}, dormant" if "flags" in body else f"table {TABLE}")
            if kind == "map":
                lines += sorted(
                    f"element {{ {' . '.join(filter(None, (element.waiter, element.key)))} : goto {element.chain} }}"
                    for element in elements(body)
                    if key == (element.waiter or element.holder)
                )
                if body["name"] in target_maps(key):
                    lines += sorted(f"element {json.dumps(element)}" for element in body.get("elem", ()))
            if kind in {"map", "chain", "rule"}:
                effect = {name: value for name, value in body.items() if name not in WITHOUT_EFFECT}
                effect |= {"type": _types(effect["type"])} if "type" in effect else {}
                lines.append(f"{kind} {json.dumps(_without_counts(effect), sort_keys=True)}")
    return lines


def _types(declared: Any) -> list[Any]:
    """Return the types of the parts of a key that a listing declares by types or by expressions."""
    expression = declared.get("typeof", {}) if isinstance(declared, dict) else {}
    parts = expression.get("concat", [expression]) if expression else declared
    return [TYPES.get(json.dumps(part), part) for part in (parts if isinstance(parts, list) else [parts])]


def _without_counts(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: None if key == "counter" else _unordered(item) if key == "set" else _without_counts(item)
            for key, item in value.items()
            if key not in {"used", "used_unit"}  # what a quota has counted
        }
    if isinstance(value, list):
        return [_without_counts(item) for item in value]
    return value


def _unordered(members: Any) -> Any:
    # the kernel lists a set in the order of its hash table
    return (
        sorted((_without_counts(member) for member in members), key=json.dumps)
        if isinstance(members, list)
        else members
    )
