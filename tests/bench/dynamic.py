"""One dynamic host port beside one that is asked for by its number, and many in a range that is nearly full."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from bench.burst import at_once
from bench.contenders import COLD, COMMANDS, PAUSES, WARM, call_for, fill_range, median, run
from bench.markdown import table
from lab import Node, mapping

from cni_hostport.dynamic_ports.keys import CAPABILITY

if TYPE_CHECKING:
    import argparse
    from typing import Any

    from bench.contenders import Contender, Installation
    from lab import Pod

FIXED, DYNAMIC = "by its number", "dynamic"
FEW, NEARLY_FULL = "with few pods", "in a range that is 95 % full"
PORT, FIRST = 1024, 40000  # the one that is asked for by its number, and where ranges begin
REQUEST = "80/tcp"


@dataclass
class Ports:
    """What both kinds of ports took, all in milliseconds."""

    took: dict[tuple[str, str, str, str], list[float]] = field(default_factory=dict)  # place, command, contender, kind
    together: dict[str, list[float]] = field(default_factory=dict)  # kind: until all had their ports
    pods: int = 0  # that ask together
    failures: int = 0


def measure(installation: Installation, options: argparse.Namespace) -> Ports:
    """Time the calls of pods with one port of either kind, in turns; each turn has another container."""
    found = Ports(pods=options.together)
    warm, cold = (next(item for item in installation.contenders if item.name == name) for name in (WARM, COLD))
    with ExitStack() as stack:
        places = []
        for name, contender in product((FEW, NEARLY_FULL), (warm, cold)):
            node = stack.enter_context(Node())
            if name == NEARLY_FULL:
                fill_range(node, [FIRST + n for n in range(options.range) if n % 20], REQUEST)  # that is 95 %
            places.append((name, contender, node, node.pod(4)))
        for turn in range(options.rounds + 1):  # the first does not count: it loads what later ones find in memory
            for (name, contender, node, pod), kind in product(places, (FIXED, DYNAMIC)):
                call = _call(contender, pod, kind, options.range)
                for command in COMMANDS:
                    time.sleep(PAUSES.get(command, PAUSES["ADD"]))
                    took = run(contender, node, command, (f"{pod.id}-{turn}", pod.path), call)
                    if turn:
                        found.took.setdefault((name, command, contender.name, kind), []).append(took)
        node = stack.enter_context(Node())
        pods = [node.pod(4) for _ in range(options.together)]
        for turn, kind in product(range(min(options.rounds, 5) + 1), (FIXED, DYNAMIC)):
            calls = [_call(warm, pod, kind, options.together, PORT + number) for number, pod in enumerate(pods)]
            for command in ("ADD", "DEL"):
                took, failures = at_once(warm, node, command, pods, calls)
                found.failures += failures
                if turn and command == "ADD":
                    found.together.setdefault(kind, []).append(took)
    return found


def _call(contender: Contender, pod: Pod, kind: str, ports: int, port: int = PORT) -> dict[str, Any]:
    if kind == FIXED:
        return call_for(contender, pod, mapping(port))
    call = {**call_for(contender, pod), "dynamicPorts": f"{FIRST}-{FIRST + ports - 1}"}
    return {**call, "runtimeConfig": {CAPABILITY: REQUEST}}


def report(ports: Ports) -> str:
    """Return the medians as Markdown, with what a dynamic port takes of one by its number."""
    rows = []
    for place, command in product((FEW, NEARLY_FULL), COMMANDS):
        cells = []
        for contender in (WARM, COLD):
            fixed, dynamic = (median(ports.took[place, command, contender, kind]) for kind in (FIXED, DYNAMIC))
            cells += [f"{fixed:.1f}", f"{dynamic:.1f} ({dynamic / fixed:.2f})"]
        rows.append([f"{command} {place}", *cells])
    fixed, dynamic = (median(ports.together[kind]) for kind in (FIXED, DYNAMIC))
    together = f"{ports.pods} ADDs at once in a range of as many ports: {dynamic:.0f} ms ({dynamic / fixed:.2f})"
    return "\n".join(
        [
            "Milliseconds for one host port (in brackets: as a ratio to one that is asked for by its number).",
            "",
            *table(["one port", *(f"{name}, {kind}" for name in ("warm", "cold") for kind in (FIXED, DYNAMIC))], rows),
            "",
            f"{together}; failed calls: {ports.failures}.",
        ]
    )
