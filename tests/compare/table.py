# ruff: noqa: T201 - a command that prints
"""Runs every case on every plugin, and prints what comes of it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from compare.cases import load
from compare.expect import ShortcomingError
from compare.plugins import PLUGINS, Bench, Plugin
from go_tools import unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compare.cases import Case

PROGRAMS = ("ip", "nft", "iptables", "ip6tables", "nsenter", "conntrack", "setpriv", "unshare")


def missing() -> str:
    """Return what of the comparison's needs is missing here, building the reference plugin if it can be built."""
    if os.geteuid():
        return "root, for network namespaces"
    if not Path("/proc/sys/net/bridge").exists():
        return "the kernel's br_netfilter"
    if programs := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"the programs {', '.join(programs)}"
    return unavailable("plugins", "portmap")


def attempt(case: Case, plugin: Plugin) -> str:
    """Run one case in a fresh network; return what the plugin falls short of, in a few words, or nothing."""
    with Bench(plugin) as node:
        try:
            case.run(node)
        except ShortcomingError as shortcoming:
            return " ".join(str(shortcoming).split())
        except Exception as error:
            error.add_note(f"in case {case.name} with {plugin.name}")
            raise
    return ""


def print_table(cases: Sequence[Case], plugins: Sequence[Plugin] = PLUGINS) -> bool:
    """Print a Markdown table, a line as soon as it is known.

    Return whether each case that the last plugin, which is this project's, passes alone says why that is right, and
    each that it fails says why that is by design.
    """
    passed = dict.fromkeys(plugins, 0)
    fine = True
    print("| | case |", *(f"{plugin.name} |" for plugin in plugins), "why |")
    print("| --- " * (len(plugins) + 3) + "|")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        jobs = [[threads.submit(attempt, case, plugin) for plugin in plugins] for case in cases]
        for number, (case, row) in enumerate(zip(cases, jobs, strict=True), 1):
            results = [job.result() for job in row]
            for plugin, found in zip(plugins, results, strict=True):
                passed[plugin] += not found
            *others, own = results
            fine = fine and (not own or bool(case.declined)) and (not others or not all(others) or bool(case.because))
            why = (own and case.declined) or (case.because if any(results) else "")
            cells = [f"fails: {found}".replace("|", "\\|") if found else "ok" for found in results]
            print(f"| {number} | {case.title} |", *(f"{cell} |" for cell in cells), f"{why} |", flush=True)
    print(f"| | **{len(cases)} cases: ok** |", *(f"**{count}** |" for count in passed.values()), "|")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests/compare",
        description="Compares hostport with the reference plugin portmap, case by case, in throw-away networks.",
        epilog="Needs root, nft, iptables, and portmap in .cache/bin or a Go toolchain to build it. "
        "The status is 1 if hostport fails a case, or passes one alone without a reason given in the table.",
    )
    parser.add_argument("cases", nargs="*", help="names, or parts of names, of the cases to run; default: all")
    parser.add_argument("--list", action="store_true", help="list the names of the cases and their titles")
    options = parser.parse_args()
    cases = [case for case in load() if not options.cases or any(part in case.name for part in options.cases)]
    if options.list:
        for case in cases:
            print(f"{case.name}: {case.title}")
        return 0
    if need := missing():
        print(f"tests/compare: needs {need}", file=sys.stderr)
        return 2
    return 0 if print_table(cases) else 1
