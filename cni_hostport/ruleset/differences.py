"""In what an attachment and the base below it are not as they should be: nft's listings of both, compared. Pure."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from cni_hostport.names import FAMILY, TABLE, masq_chain
from cni_hostport.ruleset.base import BASE_CHAINS, target_maps
from cni_hostport.ruleset.installed import MAP_LISTINGS, elements, token_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    State = Mapping[str, Sequence[dict[str, Any]]]  # listings, by what was listed

TABLES, WHOLE_TABLE = f"tables {FAMILY}", f"table {FAMILY} {TABLE}"
# the types of what keys are declared by, which newer versions of nftables list; older ones of this plugin gave types
TYPES = {
    '{"meta": {"key": "nfproto"}}': "nf_proto",
    '{"meta": {"key": "l4proto"}}': "inet_proto",
    '{"payload": {"protocol": "th", "field": "dport"}}': "inet_service",
    '{"payload": {"protocol": "ip", "field": "daddr"}}': "ipv4_addr",
    '{"payload": {"protocol": "ip6", "field": "daddr"}}': "ipv6_addr",
}
NOT_ITS_EFFECT = frozenset({"family", "table", "chain", "handle", "comment", "elem"})  # of an object in a listing


def state_of(key: str) -> list[str]:
    """Return what to list to see all that an attachment's connections pass through."""
    base = [f"chain {FAMILY} {TABLE} {name}" for name in BASE_CHAINS]
    own = [f"map {FAMILY} {TABLE} {name}" for name in target_maps(key)]
    return [TABLES, *MAP_LISTINGS, *own, *base, token_of(key), f"chain {FAMILY} {TABLE} {masq_chain(key)}"]


def parts(listing: Iterable[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Return the parts of the listing of the whole table that ``state_of`` names, but for the table itself."""
    found: dict[str, list[dict[str, Any]]] = {what: [] for what in state_of(key) if what != TABLES}
    for item in listing:
        for kind, body in item.items():
            name = body.get("chain") if kind == "rule" else body.get("name")
            what = f"{'chain' if kind == 'rule' else kind} {FAMILY} {TABLE} {name}"
            if what in found:
                found[what].append(item)
    return found


def differences(key: str, expected: State, actual: State) -> list[str]:
    """Say, one sentence each, in what an attachment and the base below it are not as expected."""
    if not _comparable(key, actual[TABLES]):
        return [f"table {FAMILY} {TABLE} is missing"]
    found = []
    for what in expected:
        wanted, present = (_comparable(key, state[what]) for state in (expected, actual))
        if wanted and not present:
            found.append(f"{what} is missing")
            continue
        lacking, extra = Counter(wanted) - Counter(present), Counter(present) - Counter(wanted)
        found += [f"{what} lacks {line}" for line in lacking] + [f"{what} has {line}" for line in extra]
        if wanted != present and not lacking and not extra:
            found.append(f"{what} has its rules in another order")
    return found


def _comparable(key: str, listing: Iterable[dict[str, Any]]) -> list[str]:
    """Reduce the objects of a listing to what they do, for one attachment: no handles, counters and comments."""
    lines = []
    for item in listing:
        for kind, body in item.items():
            if kind == "table" and body["name"] == TABLE:
                lines.append(f"table {TABLE}, dormant" if "flags" in body else f"table {TABLE}")
            if kind == "map":
                mine = [element for element in elements(body) if key == (element.waiter or element.holder)]
                lines += sorted(
                    f"element {{ {' . '.join(filter(None, (of.waiter, of.key)))} : goto {of.chain} }}" for of in mine
                )
                if body["name"] in target_maps(key):
                    lines += sorted(f"element {json.dumps(element)}" for element in body.get("elem", ()))
            if kind in {"map", "chain", "rule"}:
                own = {name: value for name, value in body.items() if name not in NOT_ITS_EFFECT}
                own |= {"type": _types(own["type"])} if "type" in own else {}
                lines.append(f"{kind} {json.dumps(_essence(own), sort_keys=True)}")
    return lines


def _types(declared: Any) -> list[Any]:
    """Return the types of the parts of a key, from how a listing says of what it is: by those, or by expressions."""
    expression = declared.get("typeof", {}) if isinstance(declared, dict) else {}
    parts = expression.get("concat", [expression]) if expression else declared
    return [TYPES.get(json.dumps(part), part) for part in (parts if isinstance(parts, list) else [parts])]


def _essence(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: None if key == "counter" else _unordered(item) if key == "set" else _essence(item)
            for key, item in value.items()
            if key not in {"used", "used_unit"}  # what a quota has counted
        }
    if isinstance(value, list):
        return [_essence(item) for item in value]
    return value


def _unordered(members: Any) -> Any:
    # the kernel lists a set in the order of its hash table
    return sorted((_essence(member) for member in members), key=json.dumps) if isinstance(members, list) else members
