"""``sudo .venv/bin/python tests/attack [FACTOR]``: all attacks, FACTOR times as long, and their numbers."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest


class Counts:
    """What tests say of the numbers of their cases."""

    def __init__(self) -> None:
        self.cases = Counter[str]()
        self.failed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up what one test says."""
        self.failed += report.failed
        if report.when == "call":
            self.cases.update({name: number for name, number in report.user_properties if isinstance(number, int)})


def main() -> int:
    """Run the attacks, print the table, and return the exit status of pytest."""
    os.environ["HOSTPORT_TESTS_ATTACK"] = (sys.argv[1:] or ["1"])[0]
    counts = Counts()
    status = pytest.main(["-q", str(Path(__file__).parent)], plugins=[counts])
    rows = [f"| {name} | {number:,} |" for name, number in counts.cases.items()]
    sys.stdout.write("\n".join(["", "| attack | cases |", "| --- | --- |", *rows, ""]))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
