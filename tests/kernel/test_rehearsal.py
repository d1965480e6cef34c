from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from resident import Resident, eventually

if TYPE_CHECKING:
    from pathlib import Path

# notes what a rehearsal comes to
NOTED = """
rehearse = resident._run_in_rehearsal
def noted(environ):
    status = rehearse(environ)
    with open("{notes}", "a") as out:
        out.write(f"{{environ['CNI_COMMAND']}} {{status}}\\n")
    return status
resident._run_in_rehearsal = noted
"""


def opened(process: int) -> Counter[str]:
    """Count the descriptors of a process by their kinds, but for the pipes, of which each child has its own."""
    files = (os.readlink(f"/proc/{process}/fd/{number}") for number in os.listdir(f"/proc/{process}/fd"))
    return Counter(file.partition("[")[0] for file in files if not file.startswith("pipe:"))


def test_a_child_that_rehearsed_has_nothing_more_open_than_one_that_did_not(tmp_path: Path) -> None:
    with Resident(tmp_path / "socket") as resident:
        assert eventually(lambda: len(resident.children) == 2)  # that of the addresses of Services has ended
        first, second = resident.children
        assert opened(first) == opened(second)


def test_calls_of_a_rehearsal_are_answered_and_succeed(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with Resident(tmp_path / "socket", NOTED.format(notes=notes)):
        assert notes.read_text() == "ADD 0\nDEL 0\n"
