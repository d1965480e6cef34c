"""What a check or an explanation says: one statement after another, each for a person to act on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a statement bears on host ports."""

    OK = "ok"
    NOTE = "note"  # worth knowing, and no reason for anything to fail
    PROBLEM = "problem"


@dataclass(frozen=True)
class Statement:
    """What is so; what that means, and what to do, where there is something to do; and lines that show it."""

    status: Status
    text: str
    meaning: str = ""
    remedy: str = ""
    details: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Return it without what it does not have."""
        return {key: value for key, value in asdict(self).items() if value}


def ok(text: str, *details: str) -> Statement:
    """Say that something is as it should be."""
    return Statement(Status.OK, text, details=details)


def note(text: str, meaning: str = "", remedy: str = "", details: tuple[str, ...] = ()) -> Statement:
    """Say something worth knowing."""
    return Statement(Status.NOTE, text, meaning, remedy, details)


def problem(text: str, meaning: str = "", remedy: str = "", details: tuple[str, ...] = ()) -> Statement:
    """Say what is wrong."""
    return Statement(Status.PROBLEM, text, meaning, remedy, details)
