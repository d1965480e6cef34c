"""In what an attachment and the base below it are not as they should be: nft's listings of both, compared. Pure."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from cni_hostport.installed import MAP_LISTINGS, elements, token_of
from cni_hostport.table import BASE_CHAINS, FAMILY, TABLE, masq_chain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    State = Mapping[str, Sequence[dict[str, Any]]]  # listings, by what was listed

TABLES = f"tables {FAMILY}"
NOT_ITS_EFFECT = frozenset({"family", "table", "chain", "handle", "comment", "elem"})  # of an object in a listing


def state_of(key: str) -> list[str]:
    """Return what to list to see all that an attachment's connections pass through."""
    base = [f"chain {FAMILY} {TABLE} {name}" for name in BASE_CHAINS]
    return [TABLES, *MAP_LISTINGS, *base, token_of(key), f"chain {FAMILY} {TABLE} {masq_chain(key)}"]


def differences(key: str, expected: State, actual: State) -> list[str]:
    """Say, one sentence each, in what an attachment and the base below it are not as expected."""
    if not _comparable(key, actual[TABLES]):
        return [f"table {FAMILY} {TABLE} is missing"]
    found = []
    for what in expected:
        wanted, present = (_comparable(key, state[what]) for state in (expected, actual))
        if not present:
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
            if kind in {"map", "chain", "rule"}:
                own = {name: value for name, value in body.items() if name not in NOT_ITS_EFFECT}
                lines.append(f"{kind} {json.dumps(_essence(own), sort_keys=True)}")
    return lines


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
