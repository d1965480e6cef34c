"""The order in which ports of ranges are tried: another one for each pod, and always the same for one. Pure.

So a pod that is started again gets its port again if that is free, and pods that start at once seldom want the same.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from cni_hostport.attachment import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.dynamic_ports.ranges import PortRange


def first_ports(ranges: Sequence[PortRange], length: int, *seed: str) -> Iterator[int]:
    """Yield each port at which ``length`` neighbours of one range begin, once, in the order that a seed gives.

    ``ranges`` have their first and last port, and do not touch each other.
    """
    counts = [max(0, last - first + 2 - length) for first, last in ranges]
    total = sum(counts)
    if not total:
        return
    number = int(digest(*seed), 16)
    start, step = number % total, number // total % total or 1
    while gcd(step, total) != 1:  # only then every place is reached
        step += 1
    for turn in range(total):
        place = (start + turn * step) % total
        for (first, _), count in zip(ranges, counts, strict=True):
            if place < count:
                yield first + place
                break
            place -= count
