"""What a full connection tracking table adds to a call with a UDP mapping."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bench.contenders import COMMANDS, PAUSE, call_for, median, run
from lab import CLIENT4, Node, mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.contenders import Contender

PORT = 5353
Times = dict[tuple[str, str, int], float]  # contender, command, entries at the time: median in milliseconds


def measure(contenders: Sequence[Contender], entries: int, rounds: int) -> Times:
    """Time calls of hostport's, in turns, on nodes without entries and with many."""
    figures: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as stack:
        places = []
        for contender in contenders:
            for wanted in (0, entries) if contender.is_ours else ():
                node = stack.enter_context(Node())
                pod = node.pod(4)
                places.append((contender, node, pod))
                for command in ("ADD", "DEL"):
                    call = call_for(contender, pod, mapping(PORT, 53, "udp"))
                    run(contender, node, command, (pod.id, pod.path), call)  # nftables has the kernel track connections
                _track(node, wanted)
        counts = [int(node.get_sysctl("net/netfilter/nf_conntrack_count")) for _, node, _ in places]
        for _ in range(rounds):
            for (contender, node, pod), count in zip(places, counts, strict=True):
                for command in COMMANDS:
                    time.sleep(PAUSE)
                    call = call_for(contender, pod, mapping(PORT, 53, "udp"))
                    took = run(contender, node, command, (pod.id, pod.path), call)
                    figures.setdefault((contender.name, command, count), []).append(took)
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
    lines = [
        "Milliseconds of a call with a UDP mapping, by entries in the connection tracking table.",
        "",
        "| call | entries | ms | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for (name, command, count), took in sorted(times.items()):
        base = min((other for other in times if other[:2] == (name, command)), key=lambda other: other[2])
        lines.append(f"| {name} {command} | {count:,} | {took:.1f} | {took / times[base]:.2f} |")
    return "\n".join(lines)
