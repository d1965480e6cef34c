"""What became of attachments that were to be restored, and how that is printed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cni_hostport.operate import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence


class OutcomeStatus(StrEnum):
    """What became of an attachment."""

    RESTORED = "restored"
    MISSING = "missing"  # and not restored: a dry run
    PRESENT = "present"
    GONE = "gone"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of an attachment, or of the base of the ruleset; ``attachment`` is its name for people.

    ``mappings`` are its host ports, ``text`` says why, and ``commands`` are what a dry run would have run.
    """

    status: OutcomeStatus
    attachment: str
    mappings: tuple[str, ...] = ()
    text: str = ""
    commands: tuple[str, ...] = ()


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print the commands of outcomes to stdout, and the rest to stderr."""
    printed = set[str]()  # what every attachment needs is printed once
    for outcome in outcomes:
        if outcome.text:
            terminal.log(f"{outcome.status}: {outcome.attachment}: {outcome.text}")
        if outcome.commands:
            terminal.print_line(f"# {outcome.attachment}: {', '.join(outcome.mappings)}")
        for command in outcome.commands:
            if command not in printed:
                terminal.print_line(command)
        printed.update(outcome.commands)
    counts = Counter(outcome.status for outcome in outcomes)
    terminal.log(", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "Nothing to restore.")
