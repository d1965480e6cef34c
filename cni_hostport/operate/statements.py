"""The statements of a check or an explanation, each for a person to act on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

RESTORE = "hostport restore"  # the remedy for rules of this plugin that are missing or changed


class Status(StrEnum):
    """How a statement bears on host ports."""

    OK = "ok"
    NOTE = "note"  # worth knowing, and no reason for anything to fail
    PROBLEM = "problem"


@dataclass(frozen=True)
class Statement:
    """A sentence about the node; what that means, what to do about it, and lines that show it, where there are any."""

    status: Status
    text: str
    meaning: str = ""
    remedy: str = ""
    details: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Return its parts without those that are empty."""
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
