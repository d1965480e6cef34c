"""The rules that a packet met on its way, in nft's words, and the one that stopped it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cni_hostport.names import FAMILY, TABLE
from cni_hostport.operate import firewalls
from cni_hostport.operate.statements import problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.explain.trace import Hop
    from cni_hostport.operate.firewalls import Connections
    from cni_hostport.operate.statements import Statement

REJECTION = re.compile(r"\breject\b", re.IGNORECASE)
INVALID = re.compile(r"\bct state [\w,{} ]*\binvalid\b", re.IGNORECASE)
UNTRACKED = re.compile(r"\bnotrack\b", re.IGNORECASE)
STOPS = {"drop", "queue", "stolen"}


class Rules:
    """The rules of a node's chains, each chain listed once."""

    def __init__(self, nft: Nft) -> None:
        """Take where to list them."""
        self.nft = nft
        self._of: dict[str, dict[int, str]] = {}

    def of(self, chain: str) -> dict[int, str]:
        """Return the rules of a chain, ``FAMILY TABLE NAME``, by handle."""
        if chain not in self._of:
            self._of[chain] = self.nft.rules(chain)
        return self._of[chain]

    def text(self, hop: Hop) -> str:
        """Return the rule of a hop, empty for a policy."""
        return self.of(hop.place).get(hop.handle, f"rule {hop.handle}") if hop.handle else ""

    def lines(self, hops: Iterable[Hop]) -> tuple[str, ...]:
        """Show the rules that a packet met, without the chains that only let it pass."""
        return tuple(self._shown(hops))

    def _shown(self, hops: Iterable[Hop]) -> Iterator[str]:
        for hop in hops:
            if hop.handle:
                yield f"{hop.place}: {self.text(hop)}"
            elif hop.verdict == "drop":
                yield f"{hop.place}: policy drop"

    def untracking(self, hops: Iterable[Hop]) -> Hop | None:
        """Return the rule that kept a packet from connection tracking, if it met one."""
        return next((hop for hop in hops if UNTRACKED.search(self.text(hop))), None)

    def stop(self, what: str, hops: Sequence[Hop], acceptable: Connections) -> Statement | None:
        """Say which rule or policy stopped a packet, and what lets it pass; ``None`` if none did.

        Raises ``NFTError`` if it cannot be told who manages the table.
        """
        last = hops[-1] if hops else None
        if last is None or last.verdict.partition(" ")[0] not in STOPS:
            return None
        details = self.lines(hops)
        if (last.family, last.table) == (FAMILY, TABLE):
            meaning = "127.0.0.0/8 is for the node itself: connections from elsewhere have no business there."
            return problem(f"{what} is dropped by this plugin's chain {last.chain}", meaning, "", details)
        if last.handle and last.verdict != "drop":
            return problem(
                f"{what} is handed over by a rule in {last.place} ({last.verdict})",
                "What becomes of it is up to the program that takes it, and could not be seen.",
                details=details,
            )
        remedy = firewalls.acceptance(self.nft, last.family, last.table, last.chain, acceptable)
        if not last.handle:
            text = f"{what} is dropped by {last.place}: no rule there accepts it, and the chain's policy is drop"
            return problem(text, "", remedy, details)
        rule = self.text(last)
        verb = "rejected" if REJECTION.search(rule) else "dropped"
        unknown = "Connection tracking does not know the connection that it belongs to." if INVALID.search(rule) else ""
        return problem(f"{what} is {verb} by a rule in {last.place}", unknown, remedy, details)
