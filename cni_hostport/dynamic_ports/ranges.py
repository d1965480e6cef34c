"""The ranges that a network gives dynamic host ports from. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cni_hostport.dynamic_ports.request import MAX_PORT
from cni_hostport.errors import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable

PortRange = tuple[int, int]  # the first and the last port


def parse(value: object) -> tuple[PortRange, ...]:
    """Read ``["40000-40999", "42000"]`` or ``"40000-40999, 42000"``; ranges that touch or overlap become one.

    Raises ``ValueError`` with the end of a sentence about it.
    """
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        msg = "is not a list of port ranges, such as '40000-40999'"
        raise ValueError(msg)
    found = sorted(_range(item.strip()) for text in texts for item in text.split(","))
    joined = found[:1]
    for first, last in found[1:]:
        before = joined[-1]
        if first <= before[1] + 1:
            joined[-1] = before[0], max(before[1], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def written(ranges: Iterable[PortRange]) -> str:
    """Write ranges as they are read: ``40000-40999, 42000``."""
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges)


def _range(text: str) -> PortRange:
    first, dash, last = text.partition("-")
    numbers = [
        int(number) if number.isascii() and number.isdecimal() else 0 for number in (first, last if dash else first)
    ]
    if not 1 <= numbers[0] <= numbers[1] <= MAX_PORT:
        msg = f"has {quoted(text)}, which is not a range of ports from 1 to {MAX_PORT}, as in '40000-40999'"
        raise ValueError(msg)
    return numbers[0], numbers[1]
