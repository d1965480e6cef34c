"""The registry of cases: each is a function that is given a node, and raises where the node's plugin falls short."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from compare.plugins import Bench

MODULES = (
    *("parsing", "mappings", "packets", "sources", "addresses", "networks", "foreign_dnat"),
    *("ownership", "delete", "parallel", "check", "conntrack", "security"),
)


@dataclass(frozen=True)
class Case:
    """``title`` is a sentence; ``because`` says why a user wants it so, where plugins can be of two minds.

    ``declined`` says why hostport does not do it, where that is by design.
    """

    run: Callable[[Bench], None]
    title: str
    because: str
    declined: str

    @property
    def name(self) -> str:
        return self.run.__name__


CASES: dict[str, Case] = {}


def case(because: str = "", declined: str = "") -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Register a case; its docstring is its title."""

    def register(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CASES[run.__name__] = Case(run, (run.__doc__ or "").strip().rstrip("."), because, declined)
        return run

    return register


def load() -> list[Case]:
    """Return all cases in the table's order."""
    for module in MODULES:
        importlib.import_module(f"compare.cases_{module}")
    return list(CASES.values())
