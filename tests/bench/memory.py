"""Memory: the most that a call has resident at once, and what the resident process holds all the time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from bench.contenders import call_for, environment
from bench.markdown import table
from lab import Node, mapping

if TYPE_CHECKING:
    import argparse

    from bench.contenders import Contender, Installation
    from lab import Pod

KIB = 1024


def measure(installation: Installation, _options: argparse.Namespace) -> dict[str, float]:
    """Return MiB by what uses them."""
    found = {}
    for contender in installation.contenders:
        with Node() as node:
            pod = node.pod(4)
            for call, mappings in (("ADD", [mapping(8080)]), ("ADD without mappings", [])):
                call_config = json.dumps(call_for(contender, pod, *mappings)).encode()
                peak = _peak(contender, installation.interpreter, node, pod, call_config)
                found[f"{contender.name}, {call}, peak"] = peak
    resident = installation.resident_id
    children = Path(f"/proc/{resident}/task/{resident}/children").read_text().split()
    found["resident process"] = _kib(resident, "Rss") / KIB
    found["resident process and its waiting children, shared memory counted once"] = (
        sum(_kib(process, "Pss") for process in (resident, *map(int, children))) / KIB
    )
    return found


# a process's peak counts what it had before its exec, which of this one is much: a small one starts the command
PEAK = """
import os, sys
child = os.fork() or os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
sys.stderr.write(f"\\n{usage.ru_maxrss}")
os._exit(os.waitstatus_to_exitcode(status))
"""


def _peak(contender: Contender, interpreter: str, node: Node, pod: Pod, call: bytes) -> float:
    command = [interpreter, "-IS", "-c", PEAK, *contender.command]
    with node.inside():
        ran = subprocess.run(
            command, input=call, capture_output=True, check=True, env=environment("ADD", pod.id, pod.path)
        )
    return int(ran.stderr.split()[-1]) / KIB


def _kib(process: int, what: str) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def report(found: dict[str, float]) -> str:
    """Return the figures as Markdown."""
    return "\n".join(table(["memory", "MiB"], [[name, f"{mib:.0f}"] for name, mib in found.items()]))
