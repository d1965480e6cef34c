"""New connections per second through the last of many mappings, beside a node that has only that one.

A connection is made and reset by one process, in whose time the kernel does everything else as well: the pod's end is
established by the time ``connect`` returns, and accepted after the turn. So a turn waits for no other process and can
be short, and what disturbs the machine meets both nodes of a pair alike.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.contenders import COLD, IPTABLES, OURS, call_for, fill_with_few_pods, interval, median, run
from bench.markdown import table
from lab import NODE4, Node, mapping

if TYPE_CHECKING:
    import argparse

    from bench.contenders import Contender, Installation

CONNECTIONS = 100  # in one turn
PORT = 65000
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: nothing stays in TIME_WAIT, where it would keep its port
Ratios = dict[tuple[str, int], tuple[float, float, float]]  # kind of mappings, how many: median ratio, its interval
OTHERS, OWN = "of other pods", "of the same pod"


def measure(installation: Installation, options: argparse.Namespace) -> Ratios:
    """Compare each case with an only mapping, in pairs of turns, in one order and the other.

    Each has an only mapping of its own: a node that has more turns than the other of a pair is a hundredth faster. One
    of the cases is an only mapping itself: what its ratio is beside 1 is the method's own error.
    """
    # portmap's iptables back end runs three commands for each mapping, each of which reads all rules: hours
    measured = [item for item in installation.contenders if item.name not in {IPTABLES, *OURS} or item.name == COLD]
    figures: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        pairs = []
        for contender in measured:
            for kind in (OTHERS, OWN) if contender.is_ours else (OTHERS,):
                for size in (0, *options.connections) if kind == OTHERS else options.connections:
                    case = f"{contender.name.removesuffix(' cold')}, {kind}", size
                    only = _Target(stack, contender, OTHERS, 0)
                    pairs.append((case, _Target(stack, contender, kind, size), only))
        gc.disable()
        stack.callback(gc.enable)
        for turn in range(options.turns):
            for case, target, only in pairs:
                order = (target, only) if turn % 2 else (only, target)
                rates = {item: item.per_second() for item in order}
                figures.setdefault(case, []).append(rates[target] / rates[only])
    return {case: (median(ratios), *interval(ratios)) for case, ratios in figures.items()}


class _Target:
    """A node with a pod that listens at ``PORT``, mapped after all others."""

    def __init__(self, stack: ExitStack, contender: Contender, kind: str, size: int) -> None:
        node = stack.enter_context(Node())
        self._client = node.client
        node.client.set_sysctl("net/ipv4/ip_local_port_range", "1024 65535")
        if kind == OTHERS:
            fill_with_few_pods(contender, node, size)
        pod = node.pod(4)
        pod.set_sysctl("net/core/somaxconn", 2 * CONNECTIONS)
        self._listening = stack.enter_context(pod.socket("tcp", "0.0.0.0"))
        self._listening.bind(("0.0.0.0", 80))
        self._listening.listen(2 * CONNECTIONS)
        self._listening.settimeout(0)
        ports = [PORT - number for number in range(size)] if kind == OWN else [PORT]
        mappings = [mapping(port) for port in reversed(ports)]
        run(contender, node, "ADD", (pod.id, pod.path), call_for(contender, pod, *mappings))
        node.set_sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", 1)
        self.per_second()  # loads what later turns find in memory

    def per_second(self) -> float:
        """Open connections from the client, one after the other."""
        with self._client.inside():
            started = time.perf_counter()
            for _ in range(CONNECTIONS):
                connection = socket.socket()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                connection.connect((NODE4, PORT))
                connection.close()
            took = time.perf_counter() - started
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listening.accept()[0].close()
        return CONNECTIONS / took


def report(ratios: Ratios) -> str:
    """Return the ratios as Markdown."""
    sizes = sorted({size for _, size in ratios})
    lines = [
        "New connections per second through the last of so many mappings, as a ratio to those of the only one:",
        "median of pairs of turns, and in which interval it lies in 95 of 100 cases. With 0, the only one is compared",
        "with another only one.",
        "",
    ]
    rows = [
        [
            name,
            *(
                "{:.3f} ({:.3f} to {:.3f})".format(*ratios[name, size]) if (name, size) in ratios else ""
                for size in sizes
            ),
        ]
        for name in dict.fromkeys(name for name, _ in ratios)
    ]
    return "\n".join([*lines, *table(["mappings", *(f"{size:,}" for size in sizes)], rows)])
