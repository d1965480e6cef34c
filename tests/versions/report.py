# ruff: noqa: T201 - a command that prints
"""What the tests of this folder find, as a table; and all tests, run in a root of another release."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from go_tools import ROOT, TOOLS
from versions.roots import SUITES, Root, made

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = "here"
TOLD = "the versions are told"  # which is what the table begins with
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".cache", "__pycache__", ".*_cache")


class Results:
    """Counts what passes, by behaviour and system: a plugin of pytest's."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str]] = {}
        self.passed = Counter[tuple[str, str]]()
        self.all = Counter[tuple[str, str]]()
        self.facts: dict[str, dict[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            params: dict[str, Any] = {**item.callspec.params}
            behaviour = item.originalname.removeprefix("test_").replace("_", " ")
            system = str(params.get("system", params.get("suite")))
            if "pair" in params:
                writer, reader = params["pair"]
                system = reader if writer == HERE else writer
                behaviour += ": written by this machine" if writer == HERE else ": continued by this machine"
            self.of[item.nodeid] = behaviour, system
            self.all[behaviour, system] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.passed[self.of[report.nodeid]] += report.passed
            _, system = self.of[report.nodeid]
            self.facts.setdefault(system, {}).update((name, str(value)) for name, value in report.user_properties)

    def table(self) -> str:
        systems = [HERE, *SUITES]
        lines = [["", *(self.facts.get(of, {}).get("system", of) for of in systems)], ["---"] * (len(systems) + 1)]
        lines += [[what, *(self.facts.get(of, {}).get(what, "") for of in systems)] for what in ("nftables", "Python")]
        for behaviour in dict.fromkeys(behaviour for behaviour, _ in self.all if behaviour != TOLD):
            counts = [(self.passed[behaviour, of], self.all[behaviour, of]) for of in systems]
            lines.append([behaviour, *(f"{passed} of {count}" if count else "" for passed, count in counts)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table() -> int:
    """Run the tests of this folder and print the table; return pytest's status."""
    results, said = Results(), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = int(pytest.main(["-q", f"--rootdir={ROOT}", str(Path(__file__).parent)], plugins=[results]))
    print(results.table())
    if status:
        print(said.getvalue(), file=sys.stderr)
    return status


def run_all(suite: str, arguments: Sequence[str]) -> int:
    """Run ``install.sh --test`` in a root; return its status."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "source")
        shutil.copytree(ROOT, source, ignore=LEFT_OUT)
        if TOOLS.is_dir():
            shutil.copytree(TOOLS, source / ".cache" / "bin")
        with Root(made(suite, source, Path(work)), source, Path(work, "root")) as root:
            root.run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")
            options = shlex.join(["--ignore=tests/versions", *arguments])
            environment = {**root.environment, "PYTEST_ADDOPTS": options}
            command = [*root.prefix, "/source/install.sh", "--test"]
            return subprocess.run(command, check=False, env=environment).returncode


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say, and return an exit status."""
    if os.geteuid():
        print("needs root, for network namespaces", file=sys.stderr)
        return 2
    if not arguments:
        return print_table()
    suite, *others = arguments
    if suite not in SUITES:
        print(f"{suite} is not one of {', '.join(SUITES)}", file=sys.stderr)
        return 2
    return run_all(suite, others)
