"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import burst, calls, cold, connections, conntrack, dynamic, flood, memory, repair
from bench.contenders import Installation, portmap_version
from installation import Machine

PARTS = {
    "calls": calls,
    "burst": burst,
    "connections": connections,
    "flood": flood,
    "repair": repair,
    "cold": cold,
    "memory": memory,
    "conntrack": conntrack,
    "dynamic": dynamic,
}
AMOUNTS: dict[str, tuple[str, int | list[int], str]] = {  # option: unit, default, of what it is the amount
    "rounds": ("TIMES", 15, "how often each is measured, at most in some parts"),
    "sizes": ("PODS", [0, 250, 1000], "calls: on the nodes"),
    "most": ("PODS", 5000, "calls: on further nodes, which only hostport has"),
    "burst": ("PODS", 20, "burst: at once"),
    "connections": ("MAPPINGS", [1000, 5000, 20_000], "connections: on the nodes"),
    "turns": ("TIMES", 2000, "connections: how often each pair is measured"),
    "flood": ("CONNECTIONS", 10_000, "flood: at once"),
    "attachments": ("PODS", [500, 1000, 5000], "repair: on the node"),
    "entries": ("ENTRIES", 200_000, "conntrack: in the table"),
    "range": ("PORTS", 1000, "dynamic: in the range that is nearly full"),
    "together": ("PODS", 64, "dynamic: at once, in a range of as many ports"),
}


def main() -> int:
    """Measure what the options ask for, and print it as Markdown."""
    options = _options().parse_args()
    if os.geteuid():
        sys.exit("the benchmark makes network namespaces and needs root")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as top:
        installation = Installation(Machine.installed(Path(top)))
        _print(_conditions())
        with installation.resident():
            for part in options.only or PARTS:
                found[part] = PARTS[part].measure(installation, options)
                _print(PARTS[part].report(found[part]))
    if options.plot and "calls" in found:
        from bench.plot import draw

        draw(options.plot, found["calls"], found.get("connections", {}))
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/bench", description=__doc__)
    for name, (unit, default, purpose) in AMOUNTS.items():
        many: dict[str, Any] = {"nargs": "+"} if isinstance(default, list) else {}
        explanation = f"{purpose} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=default, metavar=unit, help=explanation, **many)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts (default: all)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw calls and connections (.svg or .png)")
    return parser


def _conditions() -> str:
    nft = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    load = os.getloadavg()[0]  # others that use the processors slow the longer calls down more than the shorter ones
    return (
        f"Linux {platform.release().partition('-')[0]}, {os.cpu_count()} CPUs, Python {platform.python_version()},"
        f" nftables {nft}, {portmap_version()}; load before: {load:.1f}."
    )


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n\n")
    sys.stdout.flush()
