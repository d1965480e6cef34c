"""The time of one call, from the executable's start to its end, beside that of a bare interpreter."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.contenders import COLD, COMMANDS, PAUSE, WARM, call_for, median, run, timed
from lab import Node, mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contenders import Contender

PORT = 65000
FLOORS = {"python3 -IS -c pass": "pass", "python3 -IS -c 'import json'": "import json"}
Times = dict[tuple[int, str, str], float]  # pods on the node, call, contender: median in milliseconds
CALLS = [f"{command}{without}" for without in ("", " without mappings") for command in COMMANDS]


def measure(contenders: Sequence[Contender], interpreter: str, sizes: Sequence[int], rounds: int) -> Times:
    """Time every call of every contender, in turns, on nodes with this many pods; and the bare interpreter's start."""
    figures: dict[tuple[int, str, str], list[float]] = {}
    with ExitStack() as stack:
        nodes = [(contender, stack.enter_context(Node())) for contender in contenders]
        places = [(contender, node, node.pod(4)) for contender, node in nodes]
        present = 0
        for size in sorted(sizes):
            for contender, node in nodes:
                contender.fill(node, present, size)
            present = size
            for turn in range(rounds + 1):  # the first one does not count: it loads what later ones find in memory
                found = {}
                for contender, node, pod in places:
                    for call in CALLS:
                        mappings = [] if "without" in call else [mapping(PORT)]
                        time.sleep(PAUSE)
                        command, subject = call.partition(" ")[0], call_for(contender, pod, *mappings)
                        found[size, call, contender.name] = run(contender, node, command, (pod.id, pod.path), subject)
                for name, code in FLOORS.items():
                    time.sleep(PAUSE)
                    found[size, name, ""] = timed([interpreter, "-IS", "-c", code], b"", {})
                for key, took in found.items() if turn else ():
                    figures.setdefault(key, []).append(took)
    return {key: median(values) for key, values in figures.items()}


def report(times: Times) -> str:
    """Return the medians as Markdown, and what they are of the better portmap's."""
    names = list(dict.fromkeys(name for _, call, name in times if call in CALLS))
    sizes = sorted({size for size, _, _ in times})
    lines = [
        "Milliseconds from start to end (in brackets: as a ratio to the better of portmap's back ends).",
        "",
        f"| call | pods on the node | {' | '.join(names)} |",
        f"| --- | --- |{' --- |' * len(names)}",
    ]
    for call in CALLS:
        for size in sizes:
            theirs = [times[size, call, name] for name in names if name not in {WARM, COLD}]
            cells = []
            for name in names:
                took = times[size, call, name]
                ratio = f" ({took / min(theirs):.2f})" if theirs and name in {WARM, COLD} else ""
                cells.append(f"{took:.1f}{ratio}")
            lines.append(f"| {call} | {size:,} | {' | '.join(cells)} |")
    floors = {name: median([times[size, name, ""] for size in sizes]) for name in FLOORS}
    lines += ["", *(f"`{name}`: {took:.1f} ms." for name, took in floors.items())]
    without = times[sizes[0], "ADD without mappings", COLD] / times[sizes[0], "python3 -IS -c 'import json'", ""]
    lines += [f"ADD without mappings, cold, as a ratio to `import json`: {without:.2f}."]
    if len(sizes) > 1:
        growth = times[sizes[-1], "DEL", WARM] / times[sizes[0], "DEL", WARM]
        lines += [f"Warm DEL with {sizes[-1]:,} pods as a ratio to that with {sizes[0]:,}: {growth:.2f}."]
    return "\n".join(lines)
