"""What a full connection tracking table adds to a call with a UDP mapping."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.contenders import PAUSE, call_for, median, run
from lab import CLIENT4, Node, mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contenders import Contender

PORT = 5353
COMMANDS = ("ADD", "DEL")
Times = dict[tuple[str, str, int], float]  # command, contender, entries at the time: median in milliseconds


def measure(contenders: Sequence[Contender], entries: int, rounds: int) -> Times:
    """Time calls in turns, first without entries, then with many on each node.

    The kernel has one table for all nodes, and who looks for some of its entries passes those of others as well.
    """
    figures: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as stack:
        places = [(contender, node, node.pod(4)) for contender in contenders for node in [stack.enter_context(Node())]]
        for count in (0, entries):
            for turn in range(rounds + 1):
                for contender, node, pod in places:
                    for command in COMMANDS:
                        time.sleep(PAUSE)
                        call = call_for(contender, pod, mapping(PORT, 53, "udp"))
                        took = run(contender, node, command, (pod.id, pod.path), call)
                        if turn:
                            figures.setdefault((command, contender.name, count), []).append(took)
            if not count:
                _track(places[0][1], entries)
    return {key: median(values) for key, values in figures.items()}


def _track(node: Node, entries: int) -> None:
    """Have the node send so many datagrams to the client, each of a flow of its own."""
    node.set_sysctl("net/netfilter/nf_conntrack_udp_timeout", 3600)
    ports = 50_000
    for start in range(0, entries, ports):
        with node.socket("udp", CLIENT4) as sending:
            for port in range(10_000, 10_000 + min(ports, entries - start)):
                try:
                    sending.sendto(b"", (CLIENT4, port))
                except ConnectionRefusedError:  # of an earlier one
                    sending.sendto(b"", (CLIENT4, port))


def report(times: Times) -> str:
    """Return the medians as Markdown."""
    most = max(count for _, _, count in times)
    lines = [
        f"Milliseconds of a call with a UDP mapping, without connection tracking entries and with {most:,} of others.",
        "",
        "| call | without | with | difference |",
        "| --- | --- | --- | --- |",
    ]
    for command, name in dict.fromkeys((command, name) for command, name, _ in times):
        without, full = times[command, name, 0], times[command, name, most]
        lines.append(f"| {command}, {name} | {without:.1f} | {full:.1f} | {full - without:.1f} |")
    return "\n".join(lines)
