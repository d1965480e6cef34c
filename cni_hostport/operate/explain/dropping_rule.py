"""The rule or the policy that drops a packet: whose it is, and how its owner lets the packet pass."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cni_hostport.names import FAMILY, TABLE
from cni_hostport.operate import firewalls
from cni_hostport.operate.statements import problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni_hostport.operate.explain.rule_listing import RuleListing
    from cni_hostport.operate.explain.trace import Hop
    from cni_hostport.operate.firewalls import Connections
    from cni_hostport.operate.statements import Statement

REJECTION = re.compile(r"\breject\b", re.IGNORECASE)
INVALID_STATE = re.compile(r"\bct state [\w,{} ]*\binvalid\b", re.IGNORECASE)
FINAL_VERDICTS = {"drop", "queue", "stolen"}


def statement(listing: RuleListing, subject: str, hops: Sequence[Hop], connections: Connections) -> Statement | None:
    """Say which rule or policy stopped a packet, and what lets it pass; ``None`` if the last hop did not stop it.

    ``subject`` names the packet, as a sentence does. ``connections`` are those that the firewall is to accept.
    Raises ``NFTError`` if it cannot be told who manages the table.
    """
    last = hops[-1] if hops else None
    if last is None or last.verdict.partition(" ")[0] not in FINAL_VERDICTS:
        return None
    details = listing.lines(hops)
    if (last.family, last.table) == (FAMILY, TABLE):
        meaning = "127.0.0.0/8 is for the node itself: connections from elsewhere have no business there."
        return problem(f"{subject} is dropped by this plugin's chain {last.chain}", meaning, "", details)
    if last.handle and last.verdict != "drop":
        return problem(
            f"{subject} is handed over by a rule in {last.place} ({last.verdict})",
            "What becomes of it is up to the program that takes it, and could not be seen.",
            details=details,
        )
    remedy = firewalls.acceptance(listing.nft, last.family, last.table, last.chain, connections)
    if not last.handle:
        text = f"{subject} is dropped by {last.place}: no rule there accepts it, and the chain's policy is drop"
        return problem(text, "", remedy, details)
    rule = listing.text(last)
    verb = "rejected" if REJECTION.search(rule) else "dropped"
    is_for_invalid = INVALID_STATE.search(rule)
    meaning = "Connection tracking does not know the connection that it belongs to." if is_for_invalid else ""
    return problem(f"{subject} is {verb} by a rule in {last.place}", meaning, remedy, details)
