"""Many ADDs at once, as on a node that boots: the time from the first one's start to the last one's end."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.contenders import OURS, call_for, environment, median
from lab import Node, mapping

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from bench.contenders import Contender, Installation
    from lab import Pod

PAUSE = 0.4  # seconds before each burst, in which what earlier calls left to be done after their answer is done
Bursts = dict[str, tuple[int, float, float, int]]  # contender: pods, median of ADDs and DELs in milliseconds, failures


def measure(installation: Installation, options: argparse.Namespace) -> Bursts:
    """Start the ADDs of all pods of a node together, then their DELs; each contender in turn."""
    figures: dict[str, list[tuple[float, float, int]]] = {}
    with ExitStack() as stack:
        places = []
        for contender in installation.contenders:
            node = stack.enter_context(Node())
            places.append((contender, node, [node.pod(4) for _ in range(options.burst)]))
        for turn in range(options.rounds + 1):
            for contender, node, pods in places:
                adds, failed = _at_once(contender, node, "ADD", pods)
                deletions, undeleted = _at_once(contender, node, "DEL", pods)
                if turn:
                    figures.setdefault(contender.name, []).append((adds, deletions, failed + undeleted))
    return {
        name: (options.burst, median([add for add, _, _ in rounds]), median([delete for _, delete, _ in rounds]),
               sum(failures for *_, failures in rounds))
        for name, rounds in figures.items()
    }  # fmt: skip


def _at_once(contender: Contender, node: Node, command: str, pods: Sequence[Pod]) -> tuple[float, int]:
    """Return the milliseconds that a call for each pod takes, all together, and how many of them failed."""
    calls = [
        (environment(command, pod.id, pod.path), json.dumps(call_for(contender, pod, mapping(8000 + number))).encode())
        for number, pod in enumerate(pods)
    ]
    time.sleep(PAUSE)
    with node.inside():
        started, processes = time.perf_counter(), []
        for variables, stdin in calls:
            process = subprocess.Popen(
                contender.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables
            )
            processes.append(process)
            process.stdin.write(stdin)  # type: ignore[union-attr]  # a pipe holds it all
            process.stdin.close()  # type: ignore[union-attr]
            process.stdin = None
        for process in processes:
            process.communicate()
    took = time.perf_counter() - started
    return took * 1000, sum(process.returncode != 0 for process in processes)


def report(bursts: Bursts) -> str:
    """Return the medians as Markdown, and what they are of the better portmap's."""
    best = [min((found[which] for name, found in bursts.items() if name not in OURS), default=None) for which in (1, 2)]
    pods = next(iter(bursts.values()))[0]
    lines = [
        f"Milliseconds from the first start to the last end of {pods} calls started together"
        " (in brackets: as a ratio to the better of portmap's back ends).",
        "",
        "| at once | ADDs | DELs | failed calls |",
        "| --- | --- | --- | --- |",
    ]
    for name, (_, *took, failures) in bursts.items():
        cells = [
            f"{value:.0f}" + (f" ({value / least:.2f})" if least and name in OURS else "")
            for value, least in zip(took, best, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {failures} |")
    return "\n".join(lines)
