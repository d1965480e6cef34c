"""The rules that a packet met, in nft's words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.explain.trace import Hop

NOTRACK = re.compile(r"\bnotrack\b", re.IGNORECASE)


class RuleListing:
    """The rules of the node's chains as nft lists them, each chain listed once."""

    def __init__(self, nft: Nft) -> None:
        """Take the nft that lists them."""
        self.nft = nft
        self._chains: dict[str, dict[int, str]] = {}

    def rules(self, chain: str) -> dict[int, str]:
        """Return the rules of a chain, ``FAMILY TABLE NAME``, by handle."""
        if chain not in self._chains:
            self._chains[chain] = self.nft.rules(chain)
        return self._chains[chain]

    def text(self, hop: Hop) -> str:
        """Return the rule of a hop, empty for a policy."""
        return self.rules(hop.place).get(hop.handle, f"rule {hop.handle}") if hop.handle else ""

    def lines(self, hops: Iterable[Hop]) -> tuple[str, ...]:
        """Return a line for each rule that a packet met, and for a policy that dropped it."""
        return tuple(self._lines(hops))

    def _lines(self, hops: Iterable[Hop]) -> Iterator[str]:
        for hop in hops:
            if hop.handle:
                yield f"{hop.place}: {self.text(hop)}"
            elif hop.verdict == "drop":
                yield f"{hop.place}: policy drop"

    def notrack_hop(self, hops: Iterable[Hop]) -> Hop | None:
        """Return the rule that kept a packet from connection tracking, ``None`` if the packet met no such rule."""
        return next((hop for hop in hops if NOTRACK.search(self.text(hop))), None)
