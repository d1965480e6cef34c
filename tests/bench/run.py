"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import calls, connections, conntrack, memory
from bench.contenders import Installation, portmap_version
from installation import Machine

PARTS = ("calls", "connections", "memory", "conntrack")


def main() -> int:
    """Measure what the options ask for, and print it as Markdown."""
    options = _options().parse_args()
    if os.geteuid():
        sys.exit("the benchmark makes network namespaces and needs root")
    parts = options.only or PARTS
    times: calls.Times = {}
    ratios: connections.Ratios = {}
    with tempfile.TemporaryDirectory() as top:
        installation = Installation(Machine.installed(Path(top)))
        contenders = installation.contenders()
        _print(_conditions())
        with installation.resident() as resident:
            if "calls" in parts:
                times = calls.measure(contenders, installation.interpreter, options.sizes, options.rounds)
                _print(calls.report(times))
            if "connections" in parts:
                ratios = connections.measure(contenders, options.connections, options.rounds)
                _print(connections.report(ratios))
            if "memory" in parts:
                _print(memory.report(memory.measure(contenders, installation.interpreter, resident)))
            if "conntrack" in parts:
                _print(conntrack.report(conntrack.measure(contenders, options.entries, options.rounds)))
    if options.plot and times:
        from bench.plot import draw

        draw(options.plot, times, ratios)
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="how often each is measured (default: %(default)s)")
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[0, 100, 250, 1000],
        metavar="PODS",
        help="on the nodes (default: %(default)s)",
    )
    parser.add_argument(
        "--connections", type=int, nargs="+", default=[1000, 5000, 20000], metavar="MAPPINGS",
        help="on the nodes, for the part connections (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--entries", type=int, default=200_000, help="in the table, for the part conntrack (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts (default: all)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw calls and connections (.svg or .png)")
    return parser


def _conditions() -> str:
    nft = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return (
        f"Linux {platform.release().partition('-')[0]}, {os.cpu_count()} CPUs, Python {platform.python_version()},"
        f" nftables {nft}, {portmap_version()}."
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n\n")
    sys.stdout.flush()
