"""What a full connection tracking table adds to a call with a mapping."""

from __future__ import annotations

import time
from contextlib import ExitStack
from itertools import product
from typing import TYPE_CHECKING

from bench.contenders import PAUSES, call_for, median, run
from bench.markdown import table
from conntrack_entries import crowd
from lab import Node, mapping

if TYPE_CHECKING:
    import argparse

    from bench.contenders import Installation

PORT = 5353
COMMANDS = ("ADD", "DEL")
PROTOCOLS = ("tcp", "udp")
Times = dict[tuple[str, str, str, int], float]  # command, protocol, contender, entries: median in milliseconds


def measure(installation: Installation, options: argparse.Namespace) -> Times:
    """Time calls in turns, first without entries, then with so many, of which each node has its share.

    The kernel has one table for all nodes, and who looks for some of its entries passes those of others as well.
    """
    figures: dict[tuple[str, str, str, int], list[float]] = {}
    with ExitStack() as stack:
        nodes = [(contender, stack.enter_context(Node())) for contender in installation.contenders]
        places = [(contender, node, node.pod(4)) for contender, node in nodes]
        for count in (0, options.entries):
            for turn in range(options.rounds + 1):
                for (contender, node, pod), protocol, command in product(places, PROTOCOLS, COMMANDS):
                    time.sleep(PAUSES[command])
                    call = call_for(contender, pod, mapping(PORT, 53, protocol))
                    took = run(contender, node, command, (pod.id, pod.path), call)
                    if turn:
                        figures.setdefault((command, protocol, contender.name, count), []).append(took)
            if not count:
                for _, node, _ in places:
                    crowd(node, options.entries // len(places))
    return {key: median(values) for key, values in figures.items()}


def report(times: Times) -> str:
    """Return the medians as Markdown."""
    most = max(count for *_, count in times)
    lines = [
        f"Milliseconds of a call with one mapping, without connection tracking entries and with {most:,} of others.",
        "",
    ]
    rows = []
    for command, protocol, name in dict.fromkeys(key[:3] for key in times):
        without, full = (times[command, protocol, name, count] for count in (0, most))
        rows.append([f"{command} {protocol}, {name}", *(f"{took:.1f}" for took in (without, full, full - without))])
    return "\n".join([*lines, *table(["call", "without", "with", "difference"], rows)])
