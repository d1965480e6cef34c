"""Measure new connections per second through the last of many host ports, compared with a node that has only that one.

Usage: sudo .venv/bin/python tests/bench.py [MAPPINGS ...]

The mappings are those of other pods once, and once those of the very pod that is connected to.

Each node is a network of its own. The nodes take turns, so that a machine whose speed drifts slows both; medians and
their ratio are printed.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time
from contextlib import ExitStack

from lab import NODE4, Node, Pod, config, mapping

ROUNDS = 15
CONNECTIONS = 1500
PORT = 65000
MAPPINGS_OF_A_POD = 100


def fill(node: Node, mappings: int) -> None:
    """Give the node this many mappings, of pods that are only on paper; the ports are below ``PORT``."""
    for first in range(0, mappings, MAPPINGS_OF_A_POD):
        number = first // MAPPINGS_OF_A_POD
        address = f"10.99.{number >> 8}.{number & 255}/16"
        call = config(
            PAPER, *(mapping(1024 + first + port) for port in range(min(MAPPINGS_OF_A_POD, mappings - first)))
        )
        call["prevResult"] = {"cniVersion": "1.1.0", "ips": [{"address": address}]}
        call["snat"] = False  # a route to the pod is needed for nothing else
        outcome = node.cni("ADD", PAPER, call, CONTAINERID=f"paper{number}")
        if outcome.status:
            raise SystemExit(outcome.stdout)


class _Paper(Pod):
    """A pod that exists in requests only."""

    def __init__(self) -> None:
        self.name = self.id = "paper"
        self.path = "/run/netns/paper"
        self.addresses = []


PAPER = _Paper()


def per_second(node: Node, port: int) -> float:
    """Open connections from the client, one after the other, and return how many fit into a second."""
    with node.client.inside():
        started = time.perf_counter()
        for _ in range(CONNECTIONS):
            socket.create_connection((NODE4, port)).close()
        return CONNECTIONS / (time.perf_counter() - started)


def prepared(stack: ExitStack, others: int, own: int) -> Node:
    """Make a node with a pod that answers on ``PORT``, the last of its own mappings, and mapped after all others."""
    node = stack.enter_context(Node())
    # every connection leaves an entry in TIME_WAIT; their ports are to be used again at once
    node.client.set_sysctl("net/ipv4/ip_local_port_range", "1024 65535")
    node.client.set_sysctl("net/ipv4/tcp_tw_reuse", 1)
    fill(node, others)
    pod = node.pod(4)
    pod.serve("tcp", 80, "last")
    node.add(pod, *(mapping(PORT - port) for port in reversed(range(own))))
    return node


def main() -> None:
    """Print a table: mappings of others and of the pod, connections per second, ratio to a node with just one."""
    sizes = [int(argument) for argument in sys.argv[1:]] or [1000, 5000]
    cases = [(0, 1), *((size, 1) for size in sizes), *((0, size) for size in sizes)]
    with ExitStack() as stack:
        nodes = {case: prepared(stack, *case) for case in cases}
        figures: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
        for _ in range(ROUNDS):
            for case, node in nodes.items():
                figures[case].append(per_second(node, PORT))
    base = statistics.median(figures[cases[0]])
    print("| mappings of others | of the pod | connections/s | ratio |\n| --- | --- | --- | --- |")  # noqa: T201
    for (others, own), found in figures.items():
        median = statistics.median(found)
        print(f"| {others} | {own} | {median:.0f} | {median / base:.2f} |")  # noqa: T201


if __name__ == "__main__":
    main()
