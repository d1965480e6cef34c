"""What the time of a cold call with a mapping goes into."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from bench import stopwatch
from bench.contenders import COLD, COMMANDS, PAUSE, call_for, environment, median, run, timed
from bench.markdown import table
from lab import Node, mapping

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from bench.contenders import Installation

START, END = "the interpreter's start", "the process's end"
WHOLE, UNWATCHED = "**whole, with stopwatches**", "**whole, without**"
Parts = dict[tuple[str, str], float]  # item, command: median in milliseconds


def measure(installation: Installation, options: argparse.Namespace) -> Parts:
    """Run calls with stopwatches in the executable and without, in turns."""
    figures: dict[tuple[str, str], list[float]] = {}
    (contender,) = (item for item in installation.contenders if item.name == COLD)
    file = installation.machine.top / "figures"
    watched = [installation.interpreter, "-IS", stopwatch.__file__, str(file), str(installation.cold["Python"])]
    with Node() as node:
        pod = node.pod(4)
        call = call_for(contender, pod, mapping(8080))
        for turn in range(options.rounds + 1):
            for command in COMMANDS:
                time.sleep(PAUSE)
                plain = run(contender, node, command, (pod.id, pod.path), call)
                if command != "CHECK":  # undone, to be done again with stopwatches
                    run(contender, node, {"ADD": "DEL", "DEL": "ADD"}[command], (pod.id, pod.path), call)
                time.sleep(PAUSE)
                with node.inside():
                    begun = time.perf_counter()
                    whole = timed(watched, json.dumps(call).encode(), environment(command, pod.id, pod.path))
                found = {UNWATCHED: plain, WHOLE: whole, **_read(file, begun, whole)}
                for item, took in found.items() if turn else ():
                    figures.setdefault((item, command), []).append(took)
    return {key: median(values) for key, values in figures.items()}


def _read(file: Path, begun: float, whole: float) -> dict[str, float]:
    """Return the milliseconds by what they went into; the clock is the same in all processes."""
    lines = (line.split(" ", 1) for line in file.read_text().splitlines())
    seconds = {item: float(number) for number, item in lines}
    start, end = seconds.pop("start"), seconds.pop("end")
    found = {item: number * 1000 for item, number in seconds.items()}
    return {START: (start - begun) * 1000, **found, END: whole - (end - begun) * 1000}


def report(parts: Parts) -> str:
    """Return the medians as Markdown, with what part of the whole they are."""
    lines = [
        "What a cold call with one mapping goes into, in milliseconds.",
        "",
    ]
    rows = []
    items = dict.fromkeys(item for item, _ in parts)
    for item in sorted(items, key=lambda item: (item in {WHOLE, UNWATCHED}, -parts.get((item, "ADD"), 0))):
        cells = [
            f"{parts[item, command]:.1f} ({parts[item, command] / parts[WHOLE, command]:.0%})"
            if (item, command) in parts
            else ""
            for command in COMMANDS
        ]
        rows.append([item, *cells])
    return "\n".join([*lines, *table(["cold", *COMMANDS], rows)])
