"""New connections per second through the last of many mappings, beside a node that has only that one."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.contenders import IPTABLES, WARM, call_for, fill_with_few_pods, median, run
from lab import NODE4, Node, mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contenders import Contender

CONNECTIONS = 1500  # in one turn
PORT = 65000
Ratios = dict[tuple[str, int], float]  # contender and kind of mappings, how many of them: ratio to none
OTHERS, OWN = "of other pods", "of the same pod"


def measure(contenders: Sequence[Contender], sizes: Sequence[int], rounds: int) -> Ratios:
    """Measure all cases in turns, so that a machine whose speed drifts slows all of them."""
    # portmap's iptables back end runs three commands for each mapping, each of which reads all rules: hours
    measured = [contender for contender in contenders if contender.name not in {WARM, IPTABLES}]
    with ExitStack() as stack:
        nodes = {}
        for contender in measured:
            kinds = [(OTHERS, size) for size in (0, *sizes)] + [(OWN, size) for size in sizes if contender.is_ours]
            for kind, size in kinds:
                nodes[f"{contender.name.partition(' cold')[0]}, {kind}", size] = _node(stack, contender, kind, size)
        figures: dict[tuple[str, int], list[float]] = {case: [] for case in nodes}
        for _ in range(rounds):
            for case, node in nodes.items():
                figures[case].append(_per_second(node))
    medians = {case: median(found) for case, found in figures.items()}
    return {
        (name, size): found / medians[f"{name.partition(',')[0]}, {OTHERS}", 0]
        for (name, size), found in medians.items()
    }


def _node(stack: ExitStack, contender: Contender, kind: str, size: int) -> Node:
    """Make a node with a pod that answers on ``PORT``, mapped after all others."""
    node = stack.enter_context(Node())
    # every connection leaves an entry in TIME_WAIT; their ports are to be used again at once
    node.client.set_sysctl("net/ipv4/ip_local_port_range", "1024 65535")
    node.client.set_sysctl("net/ipv4/tcp_tw_reuse", 1)
    if kind == OTHERS:
        fill_with_few_pods(contender, node, size)
    pod = node.pod(4)
    pod.serve("tcp", 80, "last")
    ports = [PORT - number for number in range(size)] if kind == OWN else []
    mappings = [mapping(port) for port in reversed(ports or [PORT])]
    run(contender, node, "ADD", (pod.id, pod.path), call_for(contender, pod, *mappings))
    return node


def _per_second(node: Node) -> float:
    """Open connections from the client, one after the other."""
    with node.client.inside():
        started = time.perf_counter()
        for _ in range(CONNECTIONS):
            socket.create_connection((NODE4, PORT)).close()
        return CONNECTIONS / (time.perf_counter() - started)


def report(ratios: Ratios) -> str:
    """Return the ratios as Markdown."""
    sizes = sorted({size for _, size in ratios})
    lines = [
        "New connections per second through the last of so many mappings, as a ratio to those of the only one.",
        "",
        f"| mappings | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"| --- |{' --- |' * len(sizes)}",
    ]
    for name in dict.fromkeys(name for name, _ in ratios):
        cells = [f"{ratios[name, size]:.2f}" if (name, size) in ratios else "" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
