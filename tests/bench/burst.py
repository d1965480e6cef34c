"""Many ADDs at once, as on a node that boots: the time from the first one's start to the last one's end."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from bench.contenders import PAUSES, call_for, environment, median
from bench.markdown import table, with_ratios
from lab import Node, mapping

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import Any

    from bench.contenders import Contender, Installation
    from lab import Pod

COMMANDS = ("ADD", "DEL")


@dataclass
class Burst:
    """What became of one contender's calls, of all rounds."""

    pods: int
    took: dict[str, list[float]]  # command: milliseconds for all pods
    failures: int = 0


def measure(installation: Installation, options: argparse.Namespace) -> dict[str, Burst]:
    """Start the ADDs of all pods of a node together, then their DELs; each contender in turn."""
    found = {item.name: Burst(options.burst, {command: [] for command in COMMANDS}) for item in installation.contenders}
    with ExitStack() as stack:
        places = []
        for contender in installation.contenders:
            node = stack.enter_context(Node())
            places.append((contender, node, [node.pod(4) for _ in range(options.burst)]))
        for turn in range(options.rounds + 1):
            for (contender, node, pods), command in product(places, COMMANDS):
                calls = [call_for(contender, pod, mapping(8000 + number)) for number, pod in enumerate(pods)]
                took, failures = at_once(contender, node, command, pods, calls)
                found[contender.name].failures += failures
                if turn:
                    found[contender.name].took[command].append(took)
    return found


def at_once(
    contender: Contender, node: Node, command: str, pods: Sequence[Pod], calls: Sequence[Mapping[str, Any]]
) -> tuple[float, int]:
    """Return the milliseconds that a call for each pod takes, all together, and how many of them failed."""
    inputs = [
        (environment(command, pod.id, pod.path), json.dumps(call).encode())
        for pod, call in zip(pods, calls, strict=True)
    ]
    time.sleep(PAUSES[command])
    with node.inside():
        started, processes = time.perf_counter(), []
        for variables, stdin in inputs:
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


def report(bursts: dict[str, Burst]) -> str:
    """Return the medians as Markdown, and what they are of the better portmap's."""
    adds, dels = (
        with_ratios({name: median(burst.took[command]) for name, burst in bursts.items()}, 0) for command in COMMANDS
    )
    rows = [[name, f"{burst.pods}", adds[name], dels[name], f"{burst.failures}"] for name, burst in bursts.items()]
    return "\n".join(
        [
            "Milliseconds until calls for so many pods, started together, have ended (in brackets: as a ratio to the",
            "better of portmap's back ends).",
            "",
            *table(["at once", "pods", "ADDs", "DELs", "failed calls"], rows),
        ]
    )
