"""The time of one call, from the executable's start to its end, beside that of a bare interpreter."""

from __future__ import annotations

import time
from contextlib import ExitStack
from itertools import product
from typing import TYPE_CHECKING

from bench.contenders import COLD, COMMANDS, OURS, PAUSE, call_for, median, run, timed
from bench.markdown import table, with_ratios
from lab import Node, mapping

if TYPE_CHECKING:
    import argparse

    from bench.contenders import Installation

PORT = 65000
FLOORS = {"python3 -IS -c pass": "pass", "python3 -IS -c 'import json'": "import json"}
Times = dict[tuple[int, str, str], float]  # pods on the node, call, contender: median in milliseconds
CALLS = [f"{command}{without}" for without in ("", " without mappings") for command in COMMANDS]


def measure(installation: Installation, options: argparse.Namespace) -> Times:
    """Time every call of every contender on every number of pods in turns, and the bare interpreter's start.

    Each has a node of its own. Only hostport's have the greatest number of pods: portmap would need hours to add them.
    """
    figures: dict[tuple[int, str, str], list[float]] = {}
    with ExitStack() as stack:
        places = []
        for contender in installation.contenders:
            for size in sorted({*options.sizes, *([options.most] if contender.is_ours else [])}):
                node = stack.enter_context(Node())
                contender.fill(node, size)
                places.append((contender, size, node, node.pod(4)))
        for turn in range(options.rounds + 1):  # the first does not count: it loads what later ones find in memory
            found = {}
            for contender, size, node, pod in places:
                for call in CALLS:
                    mappings = [] if "without" in call else [mapping(PORT)]
                    time.sleep(PAUSE)
                    command, subject = call.partition(" ")[0], call_for(contender, pod, *mappings)
                    found[size, call, contender.name] = run(contender, node, command, (pod.id, pod.path), subject)
            for name, code in FLOORS.items():
                time.sleep(PAUSE)
                found[0, name, ""] = timed([installation.interpreter, "-IS", "-c", code], b"", {})
            for key, took in found.items() if turn else ():
                figures.setdefault(key, []).append(took)
    return {key: median(values) for key, values in figures.items()}


def report(times: Times) -> str:
    """Return the medians as Markdown, what they are of the better portmap's, and how ours grow with the pods."""
    names = list(dict.fromkeys(name for _, call, name in times if call in CALLS))
    sizes = sorted({size for size, call, _ in times if call in CALLS})
    lines = [
        "Milliseconds from start to end (in brackets: as a ratio to the better of portmap's back ends).",
        "",
    ]
    rows = []
    for call, size in product(CALLS, sizes):
        took = {name: times[size, call, name] for name in names if (size, call, name) in times}
        cells = with_ratios(took, 1)
        rows.append([call, f"{size:,}", *(cells.get(name, "") for name in names)])
    lines += table(["call", "pods on the node", *names], rows)
    fewest, most = sizes[0], sizes[-1]
    ours = [name for name in names if name in OURS]
    lines += [
        "",
        f"With {most:,} pods, as a ratio to the same call with {fewest:,}.",
        "",
        *table(
            ["growth", *ours],
            [
                [call, *(f"{times[most, call, name] / times[fewest, call, name]:.2f}" for name in ours)]
                for call in CALLS
            ],
        ),
    ]
    lines += ["", *(f"`{name}`: {times[0, name, '']:.1f} ms." for name in FLOORS)]
    without = times[fewest, "ADD without mappings", COLD] / times[0, "python3 -IS -c 'import json'", ""]
    lines += [f"ADD without mappings, cold, as a ratio to `import json`: {without:.2f}."]
    return "\n".join(lines)
