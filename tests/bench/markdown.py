"""The tables of the benchmark's report, as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.contenders import OURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def with_ratios(took: Mapping[str, float], digits: int) -> dict[str, str]:
    """Return figures of contenders, by name; of ours with the ratio to the better of portmap's back ends."""
    best = min((value for name, value in took.items() if name not in OURS), default=None)
    return {
        name: f"{value:.{digits}f}" + (f" ({value / best:.2f})" if best and name in OURS else "")
        for name, value in took.items()
    }
